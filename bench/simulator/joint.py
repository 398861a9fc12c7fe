"""Joint attainment of simulated unified servers, and the highest rate that keeps it: also of the best stock setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from sgl_flowprefill.bench.metrics.joint import Answered, share
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.search import PRECISION, highest
from sgl_flowprefill.bench.simulator.systems import Setup, Simulated, run
from sgl_flowprefill.bench.workloads.trace import Trace

JUDGES: Final[tuple[Judge, ...]] = ("gaps", "mean")
"""How unified servers are judged."""
LEAST_RATE: Final = 1 / 16
"""Share of the traces' own rate: a system that keeps an attainment at lower rates only is not looked at closely."""
SCREENED: Final = (150, 40)
RANKED: Final = (400, 6)
"""Settings of a search are compared on so many requests of the first trace, and so many go on to the next round."""
SCREENED_AT: Final = (0.4, 0.7, 1.1, 1.6)
"""Rates of the first round, as shares of the traces' own: some at which the good settings differ."""


def answered(request: SimRequest) -> Answered:
    """What is judged of ``request``."""
    return Answered(request.met, request.tbt_slo_s, request.tbt_s)


def attainments(system: Simulated, traces: Sequence[Trace], setup: Setup) -> dict[Judge, float]:
    """Attainment over all requests of ``traces``, by how it is judged."""
    answers = [answered(request) for trace in traces for request in run(system, trace, setup).requests]
    return {
        "ttft": share(answer.meets_ttft for answer in answers),
        "gaps": share(answer.meets_both for answer in answers),
        "mean": share(answer.meets_both_by_mean for answer in answers),
    }


@dataclass
class Search:
    """Looks for the highest rate at which ``judge`` finds ``attainment`` of the requests of ``traces`` served."""

    traces: Sequence[Trace]
    setup: Setup
    _seen: dict[tuple[str, float], dict[Judge, float]] = field(default_factory=dict)

    @property
    def own_rps(self) -> float:
        """The rate of the traces as they are. Raises ValueError where one has none."""
        return sum(trace.positive_rate_rps() for trace in self.traces) / len(self.traces)

    def attainment(self, system: Simulated, rate_rps: float, judge: Judge) -> float:
        """Joint attainment over all requests, the same draws at every rate."""
        key = str(system), rate_rps
        if key not in self._seen:
            scaled = [trace.scaled(rate_scale=rate_rps / self.own_rps) for trace in self.traces]
            self._seen[key] = attainments(system, scaled, self.setup)
        return self._seen[key][judge]

    def max_rate_rps(self, system: Simulated, attainment: float, judge: Judge) -> float:
        """The highest rate of ``system``; 0 where none above LEAST_RATE will do."""
        return highest(
            lambda rate_rps: self.attainment(system, rate_rps, judge) >= attainment, self.own_rps, LEAST_RATE
        )

    def best(self, systems: Iterable[Simulated], attainment: float, judge: Judge) -> tuple[Simulated | None, float]:
        """Which of ``systems`` has the highest rate, and that rate. What does not keep the attainment at the rate of
        another is looked at no further.
        """
        best, rate_rps = None, 0.0
        for system in systems:
            if best is None or self.attainment(system, rate_rps * (1 + PRECISION), judge) >= attainment:
                found_rps = self.max_rate_rps(system, attainment, judge)
                if found_rps > rate_rps:
                    best, rate_rps = system, found_rps
        return best, rate_rps


class TunedSearch:
    """Looks for the best of many settings in three rounds: all on few requests at some rates, the better ones on more
    requests at the highest rate that one of them keeps, and the best of these on all.
    """

    def __init__(self, traces: Sequence[Trace], setup: Setup, systems: Sequence[Simulated]) -> None:
        self._all, self._ranked, self._screened = (
            Search(some, setup)
            for some in (traces, [traces[0].limited(requests=RANKED[0])], [traces[0].limited(requests=SCREENED[0])])
        )
        self._systems = systems

    def best(self, attainment: float, judge: Judge) -> tuple[Simulated | None, float]:
        """The best setting and its highest rate; None and 0 where none keeps the attainment at any rate."""
        rates_rps = [share_of_own * self._screened.own_rps for share_of_own in SCREENED_AT]
        screened = sorted(
            self._systems,
            key=lambda system: -sum(self._screened.attainment(system, rate_rps, judge) for rate_rps in rates_rps),
        )[: SCREENED[1]]
        _, rate_rps = self._ranked.best(screened, attainment, judge)
        rate_rps = rate_rps or self._ranked.own_rps / 4
        ranked = sorted(screened, key=lambda system: -self._ranked.attainment(system, rate_rps, judge))
        return self._all.best(ranked[: RANKED[1]], attainment, judge)
