"""Which shape to run while a server has nothing to do: the one whose time is least known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Final

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import features
from sgl_flowprefill.ttft.learning import RefittedTTFT

Batch = tuple[PrefillShape, ...]

LEAST_UNCERTAINTY: Final = 0.005
"""Predictions of a kind are taken to be off by so much at least (natural logarithm): then rows decide."""


class Candidates:
    """Shapes that may be run for their times."""

    def __init__(self, shapes: Iterable[Batch]) -> None:
        self._begun = dict.fromkeys(shapes, 0)
        """Shapes with how often each was begun. One that was given up, or not believed, has left no row."""

    def take(self, ttft: RefittedTTFT, may_run: Callable[[Batch], bool]) -> Batch | None:
        """The least known of the shapes that ``may_run``, which begins now; None without any.

        What is known of a shape is the mean of what batches like it have shown, so it is as uncertain as that: as far
        as their residuals lie apart, over the square root of their number.
        """

        def error(shape: Batch) -> float:
            seen = ttft.journal.reservoir.alike(*features(shape)[:3]) + self._begun[shape]
            return max(ttft.uncertainty(shape), LEAST_UNCERTAINTY) / math.sqrt(1 + seen)

        shape = max(filter(may_run, self._begun), key=error, default=None)
        if shape is not None:
            self._begun[shape] += 1
        return shape
