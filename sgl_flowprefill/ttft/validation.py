"""How well a model predicts shapes that it has not seen: whole lengths and whole batch sizes are held out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape, TTFTModel
from sgl_flowprefill.ttft.boosted import shape_medians
from sgl_flowprefill.ttft.cubic import CubicTTFT

Batch = tuple[PrefillShape, ...]


class Fit(Protocol):
    """Makes a model of measured batches."""

    def __call__(self, batches: Sequence[Batch], times_s: Sequence[float]) -> TTFTModel: ...


@dataclass(frozen=True)
class HeldOut:
    """One shape with the prediction of a model that was fitted without its length or batch size."""

    batch: Batch
    measured_s: float
    """Median time of the shape."""
    predicted_s: float

    @property
    def ape(self) -> float:
        """Absolute percentage error, as a fraction."""
        return abs(self.predicted_s / self.measured_s - 1.0)


class Errors(NamedTuple):
    """Summary of held-out predictions; errors are fractions."""

    shapes: int
    median_ape: float
    p90_ape: float
    worst: HeldOut


def fit_cubic(batches: Sequence[Batch], times_s: Sequence[float]) -> TTFTModel:
    """The baseline: a cubic of the batch's new tokens, whatever else the batch is."""
    return CubicTTFT.fit([sum(request.new_tokens for request in batch) for batch in batches], times_s)


def hold_out(batches: Sequence[Batch], times_s: Sequence[float], fit: Fit) -> list[HeldOut]:
    """Every distinct shape with a prediction of a model that saw no batch of its group.

    One request: the group is its length with the cached prefix. Several: the group is their number.
    """
    measured_s = shape_medians(batches, times_s)
    held_out = []
    for group in dict.fromkeys(map(_group, measured_s)):
        seen = {batch: time_s for batch, time_s in measured_s.items() if _group(batch) != group}
        model = fit(list(seen), list(seen.values()))
        unseen = (batch for batch in measured_s if _group(batch) == group)
        held_out += [HeldOut(batch, measured_s[batch], model.predict_s(batch)) for batch in unseen]
    return held_out


def extrapolation(batches: Sequence[Batch], times_s: Sequence[float], fit: Fit, factor: float) -> list[HeldOut]:
    """The longest single requests, by a model that has seen none of more than their length by ``factor``."""
    measured_s = shape_medians(batches, times_s)
    longest = max(map(_length, measured_s))
    seen = {batch: time_s for batch, time_s in measured_s.items() if _length(batch) * factor <= longest}
    model = fit(list(seen), list(seen.values()))
    unseen = (batch for batch in measured_s if len(batch) == 1 and _length(batch) >= 0.75 * longest)
    return [HeldOut(batch, measured_s[batch], model.predict_s(batch)) for batch in unseen]


STRATA: Final[dict[str, Callable[[Batch], bool]]] = {
    "single": lambda batch: len(batch) == 1 and not batch[0].cached_tokens,
    "batched": lambda batch: len(batch) > 1,
    "prefix_cached": lambda batch: any(request.cached_tokens for request in batch),
}
"""Kinds of batches; a batch of requests with cached prefixes is of two kinds."""


def errors(held_out: Sequence[HeldOut]) -> Errors | None:
    """Summary of ``held_out``, or None when there is none."""
    if not held_out:
        return None
    apes = [prediction.ape for prediction in held_out]
    worst = max(held_out, key=lambda prediction: prediction.ape)
    return Errors(len(apes), float(np.median(apes)), float(np.quantile(apes, 0.9)), worst)


def _group(batch: Batch) -> tuple[str, int]:
    return ("length", _length(batch)) if len(batch) == 1 else ("requests", len(batch))


def _length(batch: Batch) -> int:
    return max(request.new_tokens + request.cached_tokens for request in batch)
