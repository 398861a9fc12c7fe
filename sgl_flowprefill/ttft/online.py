"""A TTFT model that follows the machine: corrected by the tasks that complete, with a margin for what stays uncertain.

The profile is one machine on one day. The ratio of measured to predicted time is tracked twice, over all tasks and, as
what that leaves, by size of the task. Both are medians of the last tasks, so that a step change is followed once it is
the majority and an absurd measurement changes next to nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.ttft.base import PrefillShape, TTFTModel

ALL_TASKS: Final = 15
"""Tasks of which the global correction is the median: a step change is followed after half of them."""
BAND_TASKS: Final = 31
"""Tasks of which a size band's correction is the median: more, so that what the global correction is about to explain
is not counted twice."""
RESIDUAL_TASKS: Final = 101
"""Tasks of which the margin is a quantile."""
BANDS_TOKENS: Final = (256, 1024, 4096)
"""New tokens at which size bands begin, after the first."""
LEAST_FACTOR: Final = 0.25
GREATEST_FACTOR: Final = 16.0
"""Bounds of the whole correction: no run of odd measurements makes a prefill free, or endless."""
LEAST_CHANGE: Final = 0.03
"""Relative change of a pace below which it is not worth to judge all that waits anew."""


class Prediction(NamedTuple):
    """One batch, before it runs."""

    raw_s: float
    """The model's time, as profiled."""
    expected_s: float
    """The profiled time, corrected by the tasks that completed: as likely too long as too short."""
    planned_s: float
    """The time that slack is computed with: enough in the chosen share of cases."""


class AdaptiveTTFT:
    """``model`` with online correction and a margin. Not thread-safe; one per scheduler."""

    def __init__(self, model: TTFTModel, quantile: float, residuals: Sequence[float] = ()) -> None:
        """``quantile`` in (0, 1) is the share of tasks that shall take no longer than planned; 0.5 is no margin.

        ``residuals``: log ratios of measured to predicted time on held-out shapes, the margin's first estimate.
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, got {quantile}")
        self.model = model
        self._quantile = quantile
        self._all = _Window([0.0] * ALL_TASKS)
        self._bands = [_Window([0.0] * BAND_TASKS) for _ in range(len(BANDS_TOKENS) + 1)]
        self._residuals = _Window(_thinned(residuals, RESIDUAL_TASKS))
        self._observed = 0
        self._paces = [Pace(self._factor(band) * self.margin) for band in range(len(self._bands))]

    def predict(self, batch: Sequence[PrefillShape]) -> Prediction:
        """Times of ``batch`` by the present state of the correction."""
        raw_s = self.model.predict_s(batch)
        expected_s = raw_s * self._factor(_band(batch))
        return Prediction(raw_s, expected_s, expected_s * self.margin)

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return self.predict(batch).planned_s

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        """What prefills of about the size of ``batch`` have in common: their planned over their profiled time."""
        return self._paces[_band(batch)]

    def follow(self) -> bool:
        """Bring the paces up to date, but for changes of less than LEAST_CHANGE. Whether any has changed."""
        changed = False
        for band, pace in enumerate(self._paces):
            factor = self._factor(band) * self.margin
            if abs(factor - pace.factor) > LEAST_CHANGE * pace.factor:
                pace.factor = factor
                changed = True
        return changed

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        """A task of ``batch`` is done and executed for ``measured_s``; what was predicted before this was known.

        Nonsense (zero, negative, NaN) is not learned from.
        """
        prediction = self.predict(batch)
        if not (0.0 < measured_s < math.inf and prediction.raw_s > 0.0):
            return prediction
        band = _band(batch)
        log_ratio = math.log(measured_s / prediction.raw_s)
        self._residuals.push(math.log(measured_s / prediction.expected_s))
        self._all.push(log_ratio)
        self._bands[band].push(log_ratio - self._all.at(0.5))
        self._observed += 1
        return prediction

    @property
    def correction(self) -> float:
        """Measured over profiled time, as the median of the last tasks of all sizes."""
        return math.exp(self._all.at(0.5))

    @property
    def margin(self) -> float:
        """Factor from the expected time to the planned one; at least 1 for quantiles of at least 0.5."""
        log_margin = self._residuals.at(self._quantile)
        return math.exp(max(0.0, log_margin) if self._quantile >= 0.5 else log_margin)

    def state(self) -> dict[str, float]:
        """For metrics: completed tasks, the correction over all and by band (from that many new tokens), the margin."""
        bands = {f"correction_from_{first}": self._factor(i) for i, first in enumerate((0, *BANDS_TOKENS))}
        values = {"correction": self.correction, **bands, "margin": self.margin}
        return {"observed": self._observed} | {name: round(value, 4) for name, value in values.items()}

    def _factor(self, band: int) -> float:
        factor = math.exp(self._all.at(0.5) + self._bands[band].at(0.5))
        return min(max(factor, LEAST_FACTOR), GREATEST_FACTOR)


class _Window:
    """The last values of a series, of which any quantile is one look-up. Starts full."""

    def __init__(self, values: Sequence[float]) -> None:
        self._recent = deque(values)
        self._sorted = sorted(values)

    def push(self, value: float) -> None:
        oldest = self._recent.popleft()
        del self._sorted[bisect_left(self._sorted, oldest)]
        self._recent.append(value)
        insort(self._sorted, value)

    def at(self, quantile: float) -> float:
        return self._sorted[min(int(quantile * len(self._sorted)), len(self._sorted) - 1)]


def _band(batch: Sequence[PrefillShape]) -> int:
    tokens = batch[0].new_tokens if len(batch) == 1 else sum(request.new_tokens for request in batch)
    band = 0
    for first in BANDS_TOKENS:
        band += tokens >= first
    return band


def _thinned(values: Sequence[float], count: int) -> list[float]:
    """``count`` values with the quantiles of ``values``; zeros when there are none."""
    if not values:
        return [0.0] * count
    ordered = sorted(values)
    return [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]
