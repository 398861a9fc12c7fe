"""Learning from the tasks that complete: which of them are rows, what is fitted to these, and whether that is better.

A task that has completed is compared with its prediction. What it took more than that has two causes: the machine was
slower, or the model is wrong about its shape, which is what is learned. The machine's part is the median of the tasks
around, of each beyond the *level* of its kind, by which nearly all of that kind were off before. Only the sum of both
is measured, and so levels begin where most tasks are. A burst of a kind that the model is wrong about passes for no
slow machine then, if that kind has shown its level; where most tasks are of such a kind, the others have levels. A
measurement far from all that its kind has shown is refused: somebody stopped the process, or its clock jumped.

A *challenger* is fitted to the rows but those of the newest tasks, and judged by these, which neither it nor the
*champion*, the model in use, has seen. What was explored is fitted to and judges nothing: it was chosen because the
champion knows it least, and clients may never send it. No clock, no file, no process here: ``profiling.refit`` runs
``refit`` in a process of its own.
``RefittedTTFT`` is the round that a server and a simulated one go through: observe, keep the row, refit, take over.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.boosted import LEAST_SHAPES, BoostedTTFT, Fitted, fit_rows
from sgl_flowprefill.ttft.features import Array, Features, features
from sgl_flowprefill.ttft.kinds import kind
from sgl_flowprefill.ttft.levels import USUAL_TASKS, level_of, usual_level
from sgl_flowprefill.ttft.online import AdaptiveTTFT, Prediction
from sgl_flowprefill.ttft.reservoir import (
    EXPLORED,
    NUMBER,
    OF_PROFILE,
    SLOWNESS,
    Reservoir,
    Row,
    cell,
    features_of,
    usual_seconds,
)

REFIT_TASKS: Final = 50
"""Tasks from one refit to the next, at least."""
AROUND: Final = 7
"""Tasks before a task, and behind it, that say how slow the machine was."""
KIND_MEMORY: Final = 5
"""Last tasks of a kind: a measurement is too far off if it is so from both the prediction and their median."""
LEVEL_MEMORY: Final = 15
"""Last tasks of a kind of which its level is the median."""
AGREEING: Final = 12
"""So many of them have to be off to the same side, by more than LEAST_LEVEL, or the kind has no level."""
RESIDUALS: Final = 101
"""Last tasks of which the spread says what is too far off."""
TOO_FAR: Final = 8.0
"""A measurement is too far off if it deviates by so many times the median deviation of the last tasks."""
LEAST_TOO_FAR: Final = 0.4
"""No smaller deviation is too far off, whatever the median is (natural logarithm: a factor of 1.5)."""
SUPERSEDED: Final = 8
"""Rows of a cell that the server has measured itself, from which those of the profile are not needed any more."""
LEAST_JUDGED: Final = 16
MOST_JUDGED: Final = 50
JUDGED_SHARE: Final = 1 / 3
"""Share of the rows that the champion has not seen, which judge."""
MOST_PARTS: Final = 5
"""Challengers that are fitted: to all rows, to the newer half of them, to the newest quarter, and so on."""
LEAST_PART: Final = 40
"""Rows of the smallest of these parts, at least."""
LEAST_ALONE: Final = 60
"""From so many rows of the server's own on, a challenger is also fitted to these alone: the profile may be wrong."""
HANDICAP: Final = 1.1
"""A challenger without the profile has to be better than the others by this factor, as it knows less of shapes that
the server has not met.
"""
LEAST_GAIN: Final = 0.02
"""Part of the champion's error by which a challenger has to be better, at least."""
SIGNIFICANT: Final = 2.0
"""Standard errors of the difference between the two by which it has to be better."""
ABSURD: Final = 1.0
"""No judging row counts for an error larger than this."""


class Journal:
    """Makes rows of the tasks that complete."""

    def __init__(self, reservoir: Reservoir, number: int = 0) -> None:
        """``number``: tasks so far, over all starts of the server."""
        self.reservoir = reservoir
        self.number = number
        self.refused = 0
        """Tasks that were not believed."""
        self.explored_rows = 0
        """Rows of batches that were run for their times alone, since the start."""
        self._pending: deque[tuple[Features, float, float, int]] = deque()
        """Tasks that are not rows yet: features, seconds, the log of their ratio to the prediction, number."""
        self._around: deque[tuple[int, float]] = deque(maxlen=2 * AROUND + 1)
        """Kinds and log ratios of the last tasks."""
        self._usual: deque[int] = deque(maxlen=USUAL_TASKS)
        """Kinds of the last tasks, whichever model predicted them."""
        self._of_kind: dict[int, deque[float]] = {}
        """What the machine leaves of the log ratios of the last tasks of each kind."""
        self._deviations: deque[float] = deque([LEAST_TOO_FAR / TOO_FAR] * (RESIDUALS // 2), maxlen=RESIDUALS)

    def completed(self, batch: Sequence[PrefillShape], measured_s: float, profiled_s: float) -> None:
        """A task of ``batch`` has taken ``measured_s`` of device time; the model says ``profiled_s``."""
        self.number += 1
        if not (0.0 < measured_s < math.inf and profiled_s > 0.0):
            self.refused += 1
            return
        of, log_ratio = features(batch), math.log(measured_s / profiled_s)
        self._pending.append((of, measured_s, log_ratio, self.number))
        self._around.append((kind(*of[:3]), log_ratio))
        self._usual.append(kind(*of[:3]))
        if len(self._around) == 2 * AROUND + 1:
            log_slowness = self._log_slowness()
            while len(self._pending) > AROUND:
                self._keep(*self._pending.popleft(), log_slowness)

    def explored(self, batch: Sequence[PrefillShape], measured_s: float, profiled_s: float, slowness: float) -> None:
        """``batch`` was run for its time alone; how slow the machine was then has been measured beside it."""
        self.number += 1
        log_ratio = math.log(measured_s / profiled_s)
        self.explored_rows += self._keep(
            features(batch), measured_s, log_ratio, self.number, math.log(slowness), explored=True
        )

    def new_model(self) -> None:
        """Another model predicts from now on: how slow the machine is, and which kinds are off, is learned anew."""
        self._pending.clear()
        self._around.clear()
        self._of_kind.clear()

    def _log_slowness(self) -> float:
        """How slow the machine is. Where most of the last tasks have levels, these begin there from now on."""
        levels = self._levels()
        if usual := usual_level(levels.get(of, 0.0) for of in self._usual):
            for last in self._of_kind.values():
                for place in range(len(last)):
                    last[place] -= usual
            levels = self._levels()
        return median(log_ratio - levels.get(of, 0.0) for of, log_ratio in self._around)

    def _levels(self) -> dict[int, float]:
        return {of: level_of(sorted(last), AGREEING) for of, last in self._of_kind.items()}

    def _keep(
        self,
        of: Features,
        seconds: float,
        log_ratio: float,
        number: int,
        log_slowness: float,
        explored: bool = False,
    ) -> bool:
        """Whether the measurement is believed, and a row now."""
        residual = log_ratio - log_slowness
        last = self._of_kind.setdefault(kind(*of[:3]), deque(maxlen=LEVEL_MEMORY))
        # A kind that has not come so often was as predicted.
        deviation = min(abs(residual), abs(residual - median([*[0.0] * KIND_MEMORY, *last][-KIND_MEMORY:])))
        too_far = max(LEAST_TOO_FAR, TOO_FAR * median(self._deviations))
        last.append(residual)
        self._deviations.append(deviation)
        is_believed = deviation <= too_far
        if is_believed:
            self.reservoir.add(Row(*of, seconds, math.exp(log_slowness), float(number), float(explored)))
        else:
            self.refused += 1
        return is_believed


class RefittedTTFT(AdaptiveTTFT, ABC):
    """A TTFT model that is refitted to the tasks that complete. A subclass says who refits it."""

    model: BoostedTTFT

    def __init__(
        self, fitted: Fitted, quantile: float, reservoir: Reservoir, tasks: int = 0, correction: float = 1.0
    ) -> None:
        """``tasks``: how many have completed, over all starts of the server. ``correction``: as ``AdaptiveTTFT``."""
        super().__init__(quantile, *fitted.parts(), correction)
        self.journal = Journal(reservoir, tasks)
        self._asked_at = tasks

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        prediction = super().observe(batch, measured_s)
        self.journal.completed(batch, measured_s, prediction.raw_s)
        self._refit_if_due()
        return prediction

    def explored(self, batch: Sequence[PrefillShape], measured_s: float, slowness: float) -> None:
        super().explored(batch, measured_s, slowness)
        self.journal.explored(batch, measured_s, self.model.predict_s(batch), slowness)
        self._refit_if_due()

    def _refit_if_due(self) -> None:
        tasks = self.journal.number - self._asked_at
        if tasks >= REFIT_TASKS and self.may_refit(tasks):
            self._asked_at = self.journal.number
            self.ask_for_refit()

    def take_over(self, fitted: Fitted) -> None:
        """Predict with ``fitted`` from now on."""
        self.replace(*fitted.parts())
        self.journal.new_model()

    @abstractmethod
    def may_refit(self, tasks: int) -> bool:
        """Whether a refit may be asked for, ``tasks`` after the last one."""

    @abstractmethod
    def ask_for_refit(self) -> None:
        """Have a challenger fitted to the rows of ``journal``, now or aside."""


@dataclass(frozen=True)
class Refit:
    """A challenger, and how it does beside the champion on rows that neither has seen."""

    challenger: Fitted
    trained_through: int
    """Number of the last task that it was fitted to."""
    judged: int
    """Tasks that judged."""
    champion_error: float
    challenger_error: float
    """Mean absolute error of the log of seconds on these, with the median taken out, which the online factor knows."""
    is_better: bool
    slowness: float
    """How many times slower than in the profile the machine was in the median of the judging rows."""


def refit(rows: Array, champion: BoostedTTFT, trained_through: int) -> Refit | None:
    """Fit a challenger of ``champion``, which was fitted to tasks of numbers up to ``trained_through``.

    None with too few tasks that the champion has not seen.
    """
    own = rows[rows[:, NUMBER] > OF_PROFILE]
    own = own[np.argsort(own[:, NUMBER])]
    is_task = own[:, EXPLORED] == 0
    tasks = own[is_task]
    unseen = int((tasks[:, NUMBER] > trained_through).sum())
    if unseen < 2 * LEAST_JUDGED:
        return None
    count = min(max(LEAST_JUDGED, int(JUDGED_SHARE * unseen)), MOST_JUDGED)
    judging = tasks[-count:]
    known = own[~is_task | (own[:, NUMBER] < judging[0, NUMBER])]
    champion_errors = errors(champion, judging)
    parts = [known[len(known) - part :] for part in _parts(len(known))]
    beside = [_fit(needed(rows, part)) for part in parts]
    alone = [_fit(part) for part in parts if len(part) >= LEAST_ALONE]
    handicaps = [1.0] * len(beside) + [HANDICAP] * len(alone)
    challengers = [
        (handicap * float(errors(fitted.model, judging).mean()), index, fitted)
        for index, (handicap, fitted) in enumerate(zip(handicaps, beside + alone, strict=True))
        if fitted is not None and fitted.model.is_sound()
    ]
    if not challengers:
        return None
    challenger = min(challengers)[-1]
    challenger_errors = errors(challenger.model, judging)
    gain = champion_errors - challenger_errors
    least = max(LEAST_GAIN * champion_errors.mean(), SIGNIFICANT * gain.std() / math.sqrt(count))
    return Refit(
        challenger=challenger,
        trained_through=int(tasks[-count - 1, NUMBER]),
        judged=count,
        champion_error=float(champion_errors.mean()),
        challenger_error=float(challenger_errors.mean()),
        is_better=bool(gain.mean() > least),
        slowness=float(np.median(judging[:, SLOWNESS])),
    )


def _parts(count: int) -> list[int]:
    """Numbers of newest rows, of ``count``, that a challenger may be fitted to: an engine may have become another."""
    parts = [count]
    while len(parts) < MOST_PARTS and parts[-1] >= 2 * LEAST_PART:
        parts.append(parts[-1] // 2)
    return parts


def errors(model: BoostedTTFT, rows: Array) -> Array:
    """[rows] absolute errors of the log of seconds, with their median taken out."""
    logs = np.log(usual_seconds(rows) / np.maximum(model.predict_rows_s(features_of(rows)), 1e-9))
    return np.asarray(np.minimum(np.abs(logs - np.median(logs)), ABSURD))


def needed(rows: Array, own: Array) -> Array:
    """``own`` rows of the server, and those of the profile among ``rows`` that are of cells of which it has few."""
    count: dict[tuple[int, int, int], int] = {}
    for row in own[:, :3].tolist():
        count[cell(*row)] = count.get(cell(*row), 0) + 1
    of_profile = rows[rows[:, NUMBER] == OF_PROFILE]
    is_needed = [count.get(cell(*row), 0) < SUPERSEDED for row in of_profile[:, :3].tolist()]
    return np.concatenate([of_profile[np.array(is_needed, dtype=bool)], own])


def _fit(rows: Array) -> Fitted | None:
    return fit_rows(features_of(rows), usual_seconds(rows)) if len(rows) >= LEAST_SHAPES else None
