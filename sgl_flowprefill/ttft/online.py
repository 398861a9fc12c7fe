"""A TTFT model that follows the machine: corrected by the tasks that complete, with a margin for what stays uncertain.

The profile is one machine on one day. The ratio of measured to profiled time is tracked twice, over all tasks and, as
what that leaves, by size of the task. Both are medians of the last tasks, so that a step change is followed once it is
the majority and an absurd measurement changes next to nothing. By what nearly all tasks of a size are off, they say
nothing of the machine: a burst of them is not corrected for it twice. What both leave is kept by kind of batch
(``ttft.kinds``): the margin of a batch is a quantile over batches like it, and wider for a kind that has not been seen.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.ttft.base import YARDSTICK, PrefillShape, TTFTModel
from sgl_flowprefill.ttft.kinds import BANDS_TOKENS, band_of, kind_of
from sgl_flowprefill.ttft.levels import USUAL_TASKS, level_of, usual_level

ALL_TASKS: Final = 15
"""Tasks of which the global correction is the median: a step change is followed after half of them."""
BAND_TASKS: Final = 31
"""Tasks of which a size band's correction is the median: more, so that what the global correction is about to explain
is not counted twice."""
AGREEING: Final = 25
"""So many of these have to be off to the same side, or tasks of their size have no level (``ttft.levels``)."""
RESIDUAL_TASKS: Final = 101
"""Tasks of all kinds of which the margin over all is a quantile. So many are kept for when another model takes over."""
KIND_TASKS: Final = 41
"""Tasks of a kind of which its margin is a quantile."""
LEAST_OF_KIND: Final = 4
"""Residuals of a profile that say how uncertain a kind is. With fewer it counts as unknown."""
UNKNOWN: Final = 2.0
"""Residuals of an unknown kind are taken to be so many times those of all kinds."""
LEAST_FACTOR: Final = 1 / 16
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

    def __init__(
        self,
        quantile: float,
        model: TTFTModel,
        residuals: Sequence[float] = (),
        kinds: Sequence[int] = (),
        correction: float = 1.0,
    ) -> None:
        """``quantile`` in (0, 1) is the share of tasks that shall take no longer than planned; 0.5 is no margin.

        ``residuals``: log ratios of measured to predicted time on held-out shapes, the margin's first estimate, and
        ``kinds``, those of these shapes. ``correction``: what tasks took over the model's time when this was last seen.
        """
        if not 0.0 < quantile < 1.0:
            raise ValueError(f"a quantile lies between 0 and 1, got {quantile}")
        self._quantile = quantile
        self._observed = 0
        self._recent: deque[tuple[Sequence[PrefillShape], float]] = deque(maxlen=RESIDUAL_TASKS)
        self._paces: dict[int, Pace] = {}
        self._begin(model, residuals, kinds, correction)

    def _begin(self, model: TTFTModel, residuals: Sequence[float], kinds: Sequence[int], correction: float) -> None:
        self.model = model
        self._yardstick_s = model.predict_s([YARDSTICK])
        self._all = _Window([math.log(correction)] * ALL_TASKS)
        self._bands = [_Window([0.0] * BAND_TASKS) for _ in range(len(BANDS_TOKENS) + 1)]
        self._usual: deque[int] = deque(maxlen=USUAL_TASKS)
        """Size bands of the last tasks."""
        self._residuals = _Window(_thinned(residuals, RESIDUAL_TASKS))
        self._of_kind: dict[int, list[float]] = {}
        for kind, residual in zip(kinds, residuals, strict=False):
            self._of_kind.setdefault(kind, []).append(residual)
        self._of_unknown = [UNKNOWN * residual for residual in residuals] if kinds else list(residuals)
        self._margins: dict[int, _Window] = {}

    def replace(self, model: TTFTModel, residuals: Sequence[float] = (), kinds: Sequence[int] = ()) -> None:
        """Predict with ``model`` from now on, corrected by the last tasks as if it had predicted these, too."""
        self._begin(model, residuals, kinds, self.correction)
        for batch, measured_s in list(self._recent):
            self._learn(batch, measured_s)

    def predict(self, batch: Sequence[PrefillShape]) -> Prediction:
        """Times of ``batch`` by the present state of the correction."""
        kind = kind_of(batch)
        raw_s = self.model.predict_s(batch)
        expected_s = raw_s * self._factor(band_of(kind))
        return Prediction(raw_s, expected_s, expected_s * self._margin_of(kind))

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return self.predict(batch).planned_s

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        """What prefills of the kind of ``batch`` have in common: their planned over their profiled time."""
        kind = kind_of(batch)
        pace = self._paces.get(kind)
        if pace is None:
            pace = self._paces[kind] = Pace(self._planned_factor(kind))
        return pace

    def follow(self) -> bool:
        """Bring the paces up to date, but for changes of less than LEAST_CHANGE. Whether any has changed."""
        changed = False
        for kind, pace in self._paces.items():
            factor = self._planned_factor(kind)
            if abs(factor - pace.factor) > LEAST_CHANGE * pace.factor:
                pace.factor = factor
                changed = True
        return changed

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        """A task of ``batch`` is done and executed for ``measured_s``; what was predicted before this was known.

        Nonsense (zero, negative, NaN) is not learned from.
        """
        prediction = self._learn(batch, measured_s)
        if prediction is None:
            return self.predict(batch)
        self._recent.append((batch, measured_s))
        self._observed += 1
        return prediction

    def explored(self, batch: Sequence[PrefillShape], measured_s: float, slowness: float) -> None:
        """``batch`` was run for its time alone and took ``measured_s``, on a machine that was ``slowness`` times slower
        than in the profile. This says how far predictions of such batches are off, and nothing of the machine.
        """
        kind = kind_of(batch)
        log_ratio = math.log(measured_s / (self.model.predict_s(batch) * slowness))
        band = self._bands[band_of(kind)]
        self._margin_window(kind).push(log_ratio - band.at(0.5))
        band.push(log_ratio)

    def slowness(self, batch: Sequence[PrefillShape], measured_s: float) -> float:
        """How many times slower than in the profile the machine was when ``batch`` took ``measured_s``."""
        usual_s = self.model.predict_s(batch) * math.exp(self._bands[band_of(kind_of(batch))].at(0.5))
        return measured_s / usual_s

    def uncertainty(self, batch: Sequence[PrefillShape]) -> float:
        """How far predictions of batches like ``batch`` are off: the mean of the quartiles of their residuals."""
        kind = kind_of(batch)
        residuals = self._margins.get(kind) or self._profiled_window(kind)
        return (abs(residuals.at(0.25)) + abs(residuals.at(0.75))) / 2

    def _learn(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction | None:
        """As ``observe``; None for nonsense."""
        if not 0.0 < measured_s < math.inf:
            return None
        prediction = self.predict(batch)
        if not prediction.raw_s > 0.0:
            return None
        kind = kind_of(batch)
        log_ratio = math.log(measured_s / prediction.raw_s)
        residual = math.log(measured_s / prediction.expected_s)
        self._residuals.push(residual)
        self._margin_window(kind).push(residual)
        self._usual.append(band_of(kind))
        band = self._bands[band_of(kind)]
        self._all.push(log_ratio - self._levels()[band_of(kind)])
        band.push(log_ratio - self._all.at(0.5))
        return prediction

    def _levels(self) -> list[float]:
        """Levels of all sizes. Where most of the last tasks have some, levels begin there from now on: predictions of
        the sizes that these have stay as they are.
        """
        levels = [band.level for band in self._bands]
        usual = usual_level(levels[band] for band in self._usual)
        if usual:
            self._all.shift(usual)
            for band in set(self._usual):
                self._bands[band].shift(-usual)
            levels = [band.level for band in self._bands]
        return levels

    @property
    def correction(self) -> float:
        """Measured over profiled time beyond what sizes are off by, as the median of the last tasks of all sizes."""
        return math.exp(self._all.at(0.5))

    @property
    def yardstick_s(self) -> float:
        """Expected time of the YARDSTICK."""
        return self._yardstick_s * self._factor(band_of(kind_of([YARDSTICK])))

    @property
    def margin(self) -> float:
        """Factor from the expected time to the planned one over all kinds; at least 1 for quantiles of at least 0.5."""
        return self._factor_of(self._residuals)

    def state(self) -> dict[str, float]:
        """For metrics: completed tasks, the correction over all and by band (from that many new tokens), the margin
        over all kinds, and the widest of a kind that was met.
        """
        bands = {f"correction_from_{first}": self._factor(i) for i, first in enumerate((0, *BANDS_TOKENS))}
        widest = max(map(self._factor_of, self._margins.values()), default=self.margin)
        values = {"correction": self.correction, **bands, "margin": self.margin, "widest_margin": widest}
        return {"observed": self._observed} | {name: round(value, 4) for name, value in values.items()}

    def _factor(self, band: int) -> float:
        factor = math.exp(self._all.at(0.5) + self._bands[band].at(0.5))
        return min(max(factor, LEAST_FACTOR), GREATEST_FACTOR)

    def _planned_factor(self, kind: int) -> float:
        return self._factor(band_of(kind)) * self._margin_of(kind)

    def _margin_of(self, kind: int) -> float:
        return self._factor_of(self._margin_window(kind))

    def _factor_of(self, residuals: _Window) -> float:
        log_margin = residuals.at(self._quantile)
        return math.exp(max(0.0, log_margin) if self._quantile >= 0.5 else log_margin)

    def _margin_window(self, kind: int) -> _Window:
        """Residuals of a kind, which has been met from now on."""
        window = self._margins.get(kind)
        if window is None:
            window = self._margins[kind] = self._profiled_window(kind)
        return window

    def _profiled_window(self, kind: int) -> _Window:
        """Residuals of a kind that has not been met: those of its shapes in the profile, or as an unknown one those of
        all shapes, and wider.
        """
        own = self._of_kind.get(kind, [])
        return _Window(_thinned(own if len(own) >= LEAST_OF_KIND else self._of_unknown, KIND_TASKS))


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

    def shift(self, by: float) -> None:
        """All values are so much greater."""
        self._recent = deque(value + by for value in self._recent)
        self._sorted = [value + by for value in self._sorted]

    @property
    def level(self) -> float:
        """As tasks of a size have one."""
        return level_of(self._sorted, AGREEING)

    def at(self, quantile: float) -> float:
        return self._sorted[min(int(quantile * len(self._sorted)), len(self._sorted) - 1)]


def _thinned(values: Sequence[float], count: int) -> list[float]:
    """``count`` values with the quantiles of ``values``; zeros when there are none."""
    if not values:
        return [0.0] * count
    ordered = sorted(values)
    return [ordered[int((i + 0.5) / count * len(ordered))] for i in range(count)]
