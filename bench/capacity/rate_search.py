"""The highest rate that keeps an attainment, by bisection over what has been measured so far. No servers here.

The state of a search is the list of its verdicts (rate, whether the attainment was kept), so a search that was stopped
goes on from the verdicts that are on disk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final, NamedTuple

ROUNDING: Final = 1e-9
STEP: Final = 1.4
"""Factor between rates until one was kept and one was not, from a guess by the simulator."""
SMALL_STEP: Final = 1.15
"""Factor between rates until one was kept and one was not, from what another seed has found."""

Verdict = tuple[float, bool]


class Bracket(NamedTuple):
    """The highest rate that was kept (0 if none was), and the lowest above it that was not (infinite if none was)."""

    low_rps: float
    high_rps: float

    @property
    def rate_rps(self) -> float:
        """The estimate: the geometric mean, or the bound that is known."""
        if self.low_rps == 0.0 or math.isinf(self.high_rps):
            return self.low_rps
        return math.sqrt(self.low_rps * self.high_rps)


def mean_bracket(brackets: Iterable[Bracket]) -> Bracket:
    """Mean of both ends; infinite where one of ``brackets`` has no upper end."""
    lows_rps, highs_rps = zip(*brackets, strict=True)
    return Bracket(fmean(lows_rps), fmean(highs_rps))


def decided(met: int, missed: int, total: int, attainment: float) -> bool | None:
    """Whether ``attainment`` of ``total`` requests is kept, once those that are known to have ``met`` or ``missed``
    their SLO decide it; None before."""
    needed = attainment * total - ROUNDING
    if met >= needed:
        return True
    return False if total - missed < needed else None


def bracket(verdicts: Sequence[Verdict]) -> Bracket:
    """Where the attainment ends to be kept.

    Noise can let a higher rate be kept than one that was not. The end is then put where the fewest verdicts contradict
    it, and of several such places at the lowest.
    """
    rates = sorted({rate for rate, _ in verdicts})

    def contradictions(low: float) -> int:
        return sum(kept != (rate <= low) for rate, kept in verdicts)

    low = min([0.0, *rates], key=lambda rate: (contradictions(rate), rate))
    return Bracket(low, min((rate for rate in rates if rate > low), default=math.inf))


@dataclass(frozen=True)
class RateSearch:
    """A search for one system, seed and attainment."""

    guess_rps: float
    """Where to begin."""
    least_rps: float
    """Below this rate a probe has too few requests: the search ends with 0."""
    precision: float
    """The search ends when the bracket's ends are this factor apart."""
    step: float = STEP
    to_beat_rps: float = 0.0
    """The search also ends when the rate is known to lie below this one, for then it is of no interest."""

    def next_rps(self, verdicts: Sequence[Verdict]) -> float | None:
        """The rate to try next; None when the search has ended."""
        low_rps, high_rps = bracket(verdicts)
        if high_rps <= max(self.to_beat_rps, low_rps * self.precision):
            return None
        if low_rps < self.to_beat_rps:
            return self.to_beat_rps
        if low_rps == 0.0 and math.isinf(high_rps):
            return max(self.guess_rps, self.least_rps)
        if low_rps == 0.0:
            return None if high_rps <= self.least_rps else max(self.least_rps, high_rps / self.step)
        if math.isinf(high_rps):
            return low_rps * self.step
        return math.sqrt(low_rps * high_rps)

    def probes_left(self, verdicts: Sequence[Verdict]) -> int:
        """About how many more rates it will try."""
        if self.next_rps(verdicts) is None:
            return 0
        low_rps, high_rps = bracket(verdicts)
        if low_rps < self.to_beat_rps:
            return 1
        open_ended = low_rps == 0.0 or math.isinf(high_rps)
        ratio = self.step if open_ended else high_rps / low_rps
        return open_ended + max(0, math.ceil(math.log2(math.log(ratio) / math.log(self.precision)) - ROUNDING))
