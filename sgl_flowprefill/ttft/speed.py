"""How fast the machine was while a profile was measured, from reference shapes that were measured again and again.

Each reference says how much longer than usual it took. The machine's slowness at a moment is the median of the
references next to it, of as many as predict a reference best that is left out: on a steady machine that is all of them,
and rows stay as they are; where the machine speeds up and slows down it is few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import numpy as np

from sgl_flowprefill.ttft.features import Array

NEIGHBOURS: Final = (3, 5, 9, 17, 33)
"""Numbers of references of which a moment's slowness may be the median, besides all of them."""
LEAST_GAIN: Final = 0.95
"""Fewer references have to predict one that is left out better than more do, by this factor."""


@dataclass(frozen=True)
class MachineSpeed:
    """The machine's slowness over time, relative to its median over the references."""

    at_s: Array
    """[references] when each was measured, in ascending order."""
    log_ratios: Array
    """[references] log of the time of each over the usual one of its shape."""
    neighbours: int = field(default=0)
    """References of which a moment's slowness is the median; 0: it is always the same."""

    @classmethod
    def of(cls, shapes: Sequence[object], times_s: Sequence[float], at_s: Sequence[float]) -> MachineSpeed:
        """Estimate from measured ``times_s`` of reference ``shapes``, at ``at_s``."""
        order = np.argsort(np.asarray(at_s, dtype=np.float64), kind="stable")
        logs = np.log(np.asarray(times_s, dtype=np.float64))[order]
        logs -= _usual_logs([shapes[index] for index in order], logs)
        at = np.asarray(at_s, dtype=np.float64)[order]
        speed = cls(at, logs - np.median(logs) if len(logs) else logs)
        best = np.inf
        for neighbours in (0, *reversed([count for count in NEIGHBOURS if count < len(at)])):
            error = speed._left_out_error(neighbours)
            if error < LEAST_GAIN * best:
                best, speed = error, cls(speed.at_s, speed.log_ratios, neighbours)
        return speed

    def log_slowness(self, at_s: Sequence[float] | Array) -> Array:
        """Log of the machine's slowness at each of ``at_s``; 0 is usual."""
        at = np.asarray(at_s, dtype=np.float64)
        if not self.neighbours:
            return np.zeros(len(at))
        return np.asarray(np.median(self.log_ratios[self._nearest(at, self.neighbours)], axis=1))

    @property
    def range(self) -> float:
        """By how much the machine was slower in its slowest tenth of the time than in its fastest."""
        if not len(self.at_s):
            return 0.0
        slowness = self.log_slowness(self.at_s)
        return float(np.exp(np.quantile(slowness, 0.9) - np.quantile(slowness, 0.1)) - 1)

    def _left_out_error(self, neighbours: int) -> float:
        """Mean absolute error of the references, each predicted without itself."""
        if len(self.at_s) < 3:
            return 0.0
        if not neighbours:
            return float(np.mean(np.abs(self.log_ratios)))
        nearest = self._nearest(self.at_s, min(neighbours + 1, len(self.at_s)))
        own = nearest == np.arange(len(self.at_s))[:, None]
        values = np.where(own, np.nan, self.log_ratios[nearest])
        return float(np.mean(np.abs(np.nanmedian(values, axis=1) - self.log_ratios)))

    def _nearest(self, at: Array, count: int) -> np.ndarray[tuple[int, int], np.dtype[np.intp]]:
        distances = np.abs(at[:, None] - self.at_s[None, :])
        return np.argsort(distances, axis=1, kind="stable")[:, :count]


def _usual_logs(shapes: Sequence[object], logs: Array) -> Array:
    """The log of the usual time of each of ``shapes``, but for a constant that all have in common.

    What a shape takes longer than another is what it does next to it, at about the same speed of the machine: its
    median over the whole time may be that of a slow half, and the other's that of a fast half. A shape that has come
    once, as a prefix was matched farther by chance, says as much about that as those beside it.
    """
    rows = list(zip(shapes, logs.tolist(), strict=True))
    usual: dict[object, float] = {}
    for shape in dict.fromkeys(shapes):
        beside = [
            usual[known] + log - known_log
            for pair in pairwise(rows)
            for (known, known_log), (other, log) in (pair, pair[::-1])
            if other == shape and known in usual
        ]
        # Right before a shape comes for the first time there is one that is known.
        usual[shape] = float(np.median(beside)) if usual else 0.0
    return np.array([usual[shape] for shape in shapes])
