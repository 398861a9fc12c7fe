"""How requests fared in the last minutes, counted by class and second: to tell it costs the same however many there
were.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import Final

from sgl_flowprefill.live.state import ClassAttainment

WINDOW_S: Final = 300.0
"""Past that attainment is of."""
BIN_S: Final = 15.0
"""A stretch of it that is told by itself."""
MINUTE_S: Final = 60.0
RATIO: Final = 1.02
"""Times to the first token that differ by less are counted as one."""
LEAST_TTFT_S: Final = 1e-3


class _Second:
    """The outcomes of a class that were known within a second."""

    __slots__ = ("met", "middle_s", "missed", "ttfts")

    def __init__(self, middle_s: float) -> None:
        self.middle_s = middle_s
        self.met = self.missed = 0
        self.ttfts: Counter[int] = Counter()


class _Class:
    """The outcomes of a class within WINDOW_S."""

    def __init__(self) -> None:
        self._seconds: deque[_Second] = deque()
        self._ttfts: Counter[int] = Counter()
        """Requests by the power of RATIO that is closest to their TTFT."""

    def add(self, ended_s: float, met: bool, ttft_s: float | None) -> None:
        middle_s = math.floor(ended_s) + 0.5
        if not self._seconds or self._seconds[-1].middle_s < middle_s:
            self._seconds.append(_Second(middle_s))
        second = self._seconds[-1]
        if met:
            second.met += 1
        else:
            second.missed += 1
        if ttft_s is not None:
            power = round(math.log(max(ttft_s, LEAST_TTFT_S), RATIO))
            second.ttfts[power] += 1
            self._ttfts[power] += 1

    def told(self, slo_class: str, now_s: float) -> ClassAttainment | None:
        """None without any."""
        while self._seconds and self._seconds[0].middle_s < now_s - WINDOW_S:
            self._ttfts -= self._seconds.popleft().ttfts
        bins = [(0, 0)] * round(WINDOW_S / BIN_S)
        met = missed = met_in_minute = missed_in_minute = 0
        for second in self._seconds:
            age_s = now_s - second.middle_s
            place = max(0, len(bins) - 1 - int(age_s / BIN_S))
            bins[place] = bins[place][0] + second.met, bins[place][1] + second.missed
            met, missed = met + second.met, missed + second.missed
            if age_s <= MINUTE_S:
                met_in_minute, missed_in_minute = met_in_minute + second.met, missed_in_minute + second.missed
        if not self._seconds:
            return None
        return ClassAttainment(
            slo_class=slo_class,
            met=met,
            missed=missed,
            ttft_p50_s=self._ttft_s(0.5),
            ttft_p99_s=self._ttft_s(0.99),
            last_minute=_share(met_in_minute, missed_in_minute),
            bins=[_share(*one) for one in bins],
        )

    def _ttft_s(self, share: float) -> float | None:
        left = math.ceil(share * self._ttfts.total())
        for power in sorted(self._ttfts):
            left -= self._ttfts[power]
            if left <= 0:
                return float(RATIO**power)
        return None


class Attainment:
    """Counts how requests fare."""

    def __init__(self) -> None:
        self._classes: dict[str, _Class] = {}

    def add(self, slo_class: str, ended_s: float, met: bool, ttft_s: float | None) -> None:
        """What became of a request was known at ``ended_s``, not before that of the last one."""
        if slo_class not in self._classes:
            self._classes[slo_class] = _Class()
        self._classes[slo_class].add(ended_s, met, ttft_s)

    def told(self, now_s: float) -> list[ClassAttainment]:
        """How each class fared in the last WINDOW_S, in the order of their names; TTFTs within a hundredth."""
        told = (self._classes[name].told(name, now_s) for name in sorted(self._classes))
        return [one for one in told if one is not None]


def _share(met: int, missed: int) -> float | None:
    return met / (met + missed) if met + missed else None
