"""Joint attainment of simulated unified servers, and the highest rate that keeps it: ours, and the best stock setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from sgl_flowprefill.bench.metrics.joint import Answered, share
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.search import PRECISION, highest
from sgl_flowprefill.bench.simulator.systems import Setup, Simulated, run
from sgl_flowprefill.bench.workloads.trace import Trace

Judge = Literal["gaps", "mean"]
"""How TBT is judged: by each gap, of which 1% may be late, or by their mean."""
JUDGES: Final[tuple[Judge, ...]] = ("gaps", "mean")
SCREENED_REQUESTS: Final = 400
"""Requests of the first trace by which the settings of a search are ranked."""
FINALISTS: Final = 8
"""Settings that are compared on all requests."""


def answered(request: SimRequest) -> Answered:
    """What is judged of ``request``."""
    return Answered(request.met, request.tbt_slo_s, request.tbt_s)


@dataclass
class Search:
    """Looks for the highest rate at which ``judge`` finds ``attainment`` of the requests of ``traces`` served."""

    traces: Sequence[Trace]
    setup: Setup
    _seen: dict[tuple[str, float], dict[Judge, float]] = field(default_factory=dict)

    @property
    def own_rps(self) -> float:
        """The rate of the traces as they are."""
        return sum(trace.rate_rps for trace in self.traces) / len(self.traces)

    def attainment(self, system: Simulated, rate_rps: float, judge: Judge) -> float:
        """Joint attainment over all requests, the same draws at every rate."""
        key = str(system), rate_rps
        if key not in self._seen:
            answers = [
                answered(request)
                for trace in self.traces
                for request in run(system, trace.scaled(rate_scale=rate_rps / self.own_rps), self.setup).requests
            ]
            self._seen[key] = {
                "gaps": share(answer.meets_both for answer in answers),
                "mean": share(answer.meets_both_by_mean for answer in answers),
            }
        return self._seen[key][judge]

    def max_rate_rps(self, system: Simulated, attainment: float, judge: Judge) -> float:
        """The highest rate of ``system``; 0 where no rate will do."""
        return highest(lambda rate_rps: self.attainment(system, rate_rps, judge) >= attainment, self.own_rps)

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
    """Looks for the best of many settings: all on few requests, and the first FINALISTS of these on all."""

    def __init__(self, traces: Sequence[Trace], setup: Setup, systems: Sequence[Simulated]) -> None:
        self._all = Search(traces, setup)
        self._short = Search([traces[0].limited(requests=SCREENED_REQUESTS)], setup)
        self._systems = systems

    def best(self, attainment: float, judge: Judge) -> tuple[Simulated | None, float]:
        """The best setting and its highest rate; None and 0 where no setting keeps the attainment at any rate."""
        _, rate_rps = self._short.best(self._systems, attainment, judge)
        rate_rps = rate_rps or self._short.own_rps / 4
        ranked = sorted(self._systems, key=lambda system: -self._short.attainment(system, rate_rps, judge))
        return self._all.best(ranked[:FINALISTS], attainment, judge)
