"""The order of a capacity search's probes: systems take turns, each with a search for each seed and attainment.

A visit starts a system's servers, measures isolated requests, and tries the next rate of each of its searches: few
probes, so that a machine that drifts drifts for every system. When all searches have ended, every system replays all
seeds to the end at one rate, the best stock system's, for what is compared at equal load.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sgl_flowprefill.bench.capacity.prober import Plan, Prober, outcome
from sgl_flowprefill.bench.capacity.probes import Probe
from sgl_flowprefill.bench.capacity.rate_search import (
    SMALL_STEP,
    STEP,
    Bracket,
    RateSearch,
    Verdict,
    bracket,
    mean_bracket,
)
from sgl_flowprefill.bench.simulator.joint import attainments
from sgl_flowprefill.bench.simulator.search import mean_attainment
from sgl_flowprefill.bench.simulator.systems import Setup, Simulated
from sgl_flowprefill.bench.systems.catalog import UNCHUNKED_FCFS
from sgl_flowprefill.bench.systems.endpoint import Endpoint
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.trace import Trace

LEAST_REQUESTS: Final = 20
"""Fewest requests of a probe: searches do not go to rates with fewer."""
MAX_INVALID: Final = 3
"""Probes of a system and seed in which the client may fall behind before its searches are given up."""
START_S: Final = 50.0
"""What a start of servers with its isolated requests takes, before one was timed."""
SIMULATED_PRECISION: Final = 1.1
TOLD_SLO_SCALES: Final = (1.0, 0.8, 0.6, 0.4)
"""SLO scales with which FlowPrefill, which orders by SLOs, is compared. SGLang's own schedulers never see them: their
replay at 1 can be judged at any other."""


@dataclass(frozen=True)
class Goal:
    """What is searched."""

    attainments: tuple[float, ...]
    """Shares of requests that shall meet their TTFT SLO, rising."""
    precision: float
    """A search ends when its rate is known to within this factor."""
    prefilter: int | None = None
    """Stock systems to measure for each attainment, by what the simulator says; all if None."""
    race: bool = False
    """Find the best stock system: one that is known to keep the attainment at lower rates than another, in the mean
    over seeds, is measured no further. The unchunked one, which stands in for DistServe, is measured to the end.
    """


class Campaign:
    """A capacity search: makes the probes that are left, and says what is known from those made."""

    def __init__(
        self, prober: Prober, systems: Sequence[System], goal: Goal, only_compared: Sequence[System] = ()
    ) -> None:
        """``systems`` are searched and compared, ``only_compared`` compared with them. Raises ValueError for a system
        that the log has with other settings.
        """
        self.prober = prober
        self.plan: Plan = prober.plan
        self.log = prober.log
        self.goal = goal
        self.only_compared = [system for system in only_compared if system not in systems]
        self.asked_for = [*systems, *self.only_compared]
        for system in self.asked_for:
            prober.check_settings(system)
        self._give_up_s = math.inf
        self._start_s = START_S
        self._probe_s = prober.plan.duration_s

    def run(self, budget_s: float = math.inf) -> None:
        """Make probes until all is found or the budget is spent; what is begun then is finished."""
        self._give_up_s = time.monotonic() + budget_s
        if not self._is_ready:
            self._visit(self._first)
        while True:
            pending = [system for system in self.systems if self._is_searching(system)]
            if not pending:
                if "comparison_rps" not in self.log.facts:
                    self.log.fix("comparison_rps", self._comparison_rps())
                pending = [system for system in self.systems if any(self._comparisons(system))]
            if not pending:
                return
            for system in self._in_turn(pending):
                if self._is_over():
                    self.prober.say("The budget is spent; the same command goes on from here.")
                    return
                self._visit(system)

    @property
    def _first(self) -> System:
        """The system that is visited before anything can be planned: one that can be simulated, if there is one."""
        return next((one for one in self.asked_for if one.simulated(self.prober.options)), self.asked_for[0])

    @property
    def _is_ready(self) -> bool:
        """Whether enough is known of the machine to plan."""
        simulates = self._first.simulated(self.prober.options) is not None
        return self.prober.is_calibrated and (self.prober.can_simulate or not simulates)

    # ---- what is known, and what is left --------------------------------------------------------------------------

    @property
    def systems(self) -> list[System]:
        """The systems to measure: those asked for, without the stock ones that the simulator puts behind."""
        if self.goal.prefilter is None:
            return self.asked_for
        stock = [system for system in self.asked_for if system.is_stock]
        kept = {UNCHUNKED_FCFS}
        for attainment in self.goal.attainments:
            by_rate = sorted(stock, key=lambda system: -(self.simulated_rps(system, attainment) or 0.0))
            kept.update(system.name for system in by_rate[: self.goal.prefilter])
        return [system for system in self.asked_for if not system.is_stock or system.name in kept]

    def _in_turn(self, systems: Sequence[System]) -> list[System]:
        """The order of visits: in a race the favourites of the simulator first, so that the others have a rate to
        beat."""
        if not self.goal.race:
            return list(systems)

        def most_rps(system: System) -> float:
            return max(self.simulated_rps(system, share) or 0.0 for share in self.goal.attainments)

        return sorted(systems, key=lambda system: -most_rps(system))

    def is_beaten(self, system: System, attainment: float) -> bool:
        """Whether a race showed that another stock system keeps ``attainment`` at a higher rate, in the mean over
        seeds."""
        _, high_rps = self._mean_bracket(system, attainment)
        return any(high_rps <= self._mean_bracket(rival, attainment).low_rps for rival in self._rivals(system))

    def _is_out(self, system: System) -> bool:
        """Whether it was beaten at every attainment, so that it is not compared either."""
        return all(self.is_beaten(system, share) for share in self.goal.attainments)

    def _rivals(self, system: System) -> list[System]:
        """The systems that can put this one out of a race."""
        if not self.goal.race or not system.is_stock or system.name == UNCHUNKED_FCFS:
            return []
        return [other for other in self.systems if other.is_stock and other is not system]

    def _bracket(self, system: System, seed: int, attainment: float) -> Bracket:
        return self.log.bracket(system.name, seed, attainment)

    def _mean_bracket(self, system: System, attainment: float) -> Bracket:
        return mean_bracket(self._bracket(system, seed, attainment) for seed in range(self.plan.seeds))

    def _to_beat_rps(self, system: System, seed: int, attainment: float) -> float:
        """The rate that the best of the rivals, in the mean, is known to keep on this seed; 0 without any."""
        rivals = self._rivals(system)
        best = max(rivals, key=lambda rival: self._mean_bracket(rival, attainment).low_rps, default=None)
        return self._bracket(best, seed, attainment).low_rps if best else 0.0

    def simulated_rps(self, system: System, attainment: float) -> float | None:
        """The highest rate that keeps ``attainment`` by the simulator, with this run's traces and machine; None for
        what cannot be simulated. It is computed once in a run."""
        simulated = system.simulated(self.prober.options)
        if simulated is None or not self.prober.can_simulate:
            return None
        layout = "unified " if system.is_unified else ""
        fact = f"simulated rate of {layout}{simulated} at {attainment:g}, {self.plan.seeds} seeds"
        if fact not in self.log.facts:
            setup = self.prober.setup
            start_rps = self.prober.saturation_rps(self.prober.trace(0, self.plan.workload.rate_rps))
            search = RateSearch(start_rps, self._least_rps, SIMULATED_PRECISION)
            verdicts: list[Verdict] = []
            while (rate_rps := search.next_rps(verdicts)) is not None:
                traces = [self.prober.trace(seed, rate_rps) for seed in range(self.plan.seeds)]
                verdicts.append((rate_rps, self._simulated(simulated, traces, setup) >= attainment))
            self.log.fix(fact, bracket(verdicts).rate_rps)
        return float(self.log.facts[fact])

    def simulated_attainment(self, system: System, rate_rps: float, seeds: Sequence[int]) -> float | None:
        """What the simulator says of ``seeds`` at a rate; None for what cannot be simulated. It is computed once for
        the same isolated requests."""
        simulated = system.simulated(self.prober.options)
        if simulated is None or not self.prober.can_simulate:
            return None
        visits = len(self.log.solo_ttft_s[system.name])
        fact = f"simulated attainment of {system.name} at {rate_rps:g}, seeds {[*seeds]}, {visits} visits"
        if fact not in self.log.facts:
            traces = [self.prober.trace(seed, rate_rps) for seed in seeds]
            self.log.fix(fact, self._simulated(simulated, traces, self.prober.setup_of(system)))
        return float(self.log.facts[fact])

    def _simulated(self, simulated: Simulated, traces: Sequence[Trace], setup: Setup) -> float:
        """Attainment by the simulator, judged as that of the servers is."""
        if self.plan.judge == "ttft":
            return mean_attainment(simulated, traces, setup)
        return attainments(simulated, traces, setup)[self.plan.judge]

    def probes_left(self) -> int:
        """About how many probes are still to be made."""
        if not self._is_ready:
            return len(self.asked_for)
        searched = sum(
            self._search(system, seed, attainment).probes_left(self.log.verdicts(system.name, seed, attainment))
            for system in self.systems
            for seed, attainment in self._searches
            if self.next_rps(system, seed, attainment) is not None
        )
        if "comparison_rps" in self.log.facts:
            return searched + sum(len(list(self._comparisons(system))) for system in self.systems)
        in_comparison = [system for system in self.systems if not self._is_out(system)]
        return searched + sum(len(self._told_scales(system)) for system in in_comparison) * self.plan.seeds

    @property
    def _least_rps(self) -> float:
        return LEAST_REQUESTS / self.plan.duration_s

    @property
    def _searches(self) -> list[tuple[int, float]]:
        """(seed, attainment) of the searches of each system."""
        return [(seed, attainment) for seed in range(self.plan.seeds) for attainment in self.goal.attainments]

    def _is_given_up(self, system: System, seed: int) -> bool:
        """Whether the client fell behind too often."""
        probes = [probe for probe in self.log.probes if (probe.system, probe.seed) == (system.name, seed)]
        return sum(not probe.run.client.valid for probe in probes) >= MAX_INVALID

    def _search(self, system: System, seed: int, attainment: float, *, race: bool = True) -> RateSearch:
        """Begins where the system's other seeds ended, or where the simulator does."""
        found = [self._bracket(system, other, attainment).rate_rps for other in range(self.plan.seeds)]
        known = [rate_rps for rate_rps in found if rate_rps]
        return RateSearch(
            guess_rps=float(np.median(known)) if known else self._guess_rps(system, attainment),
            least_rps=self._least_rps,
            precision=self.goal.precision,
            step=SMALL_STEP if known else STEP,
            to_beat_rps=self._to_beat_rps(system, seed, attainment) if race else 0.0,
        )

    def _guess_rps(self, system: System, attainment: float) -> float:
        """Where a first search begins: by the simulator, or where the system's isolated requests, one after the other,
        fill it."""
        simulated_rps = self.simulated_rps(system, attainment)
        if simulated_rps is not None:
            return simulated_rps
        if system.name not in self.log.solo_ttft_s:
            return self._least_rps
        return self.prober.one_by_one_rps(self.prober.trace(0, self.plan.workload.rate_rps), system)

    def next_rps(self, system: System, seed: int, attainment: float) -> float | None:
        """The rate that a search wants next; None when it has ended."""
        if self._is_given_up(system, seed) or system in self.only_compared or self.is_beaten(system, attainment):
            return None

        def following(seed: int, *, race: bool) -> float | None:
            search = self._search(system, seed, attainment, race=race)
            return search.next_rps(self.log.verdicts(system.name, seed, attainment))

        rate_rps = following(seed, race=True)
        if rate_rps is None and all(following(other, race=True) is None for other in range(self.plan.seeds)):
            rate_rps = following(seed, race=False)  # beaten on some seeds, but not in the mean: that has to be known
        return None if rate_rps is None else round(rate_rps, 4)

    def _is_searching(self, system: System) -> bool:
        return any(self.next_rps(system, *search) is not None for search in self._searches)

    def _told_scales(self, system: System) -> Sequence[float]:
        is_told = system.orders_by_slo and system not in self.only_compared and self.plan.judge == "ttft"
        return TOLD_SLO_SCALES if is_told else (1.0,)

    def _comparisons(self, system: System) -> Iterator[tuple[int, float, float]]:
        """(seed, rate, SLO scale) of what is still to be replayed to the end at the rate at which systems are
        compared."""
        rate_rps = self.log.facts.get("comparison_rps")
        if rate_rps is None or self._is_out(system):
            return
        for seed, scale in itertools.product(range(self.plan.seeds), self._told_scales(system)):
            if not self._is_given_up(system, seed) and not self.log.complete_at(rate_rps, system.name, seed, scale):
                yield seed, rate_rps, scale

    def _comparison_rps(self) -> float:
        """The highest rate of any stock system at the lowest attainment, or of any system if there is no stock one."""

        def mean_rps(system: System) -> float:
            found = [self._bracket(system, seed, self.goal.attainments[0]) for seed in range(self.plan.seeds)]
            return float(np.mean([one.rate_rps for one in found]))

        among = [system for system in self.systems if system.is_stock] or self.systems
        return round(max(self._least_rps, *map(mean_rps, among)), 4)

    # ---- making it ------------------------------------------------------------------------------------------------

    def _visit(self, system: System) -> None:
        """Start a system, and probe what it wants next."""
        started_s = time.monotonic()
        with self.prober.serving(system) as served:
            self._start_s = time.monotonic() - started_s
            if self._is_searching(system):
                for seed, attainment in self._searches:
                    rate_rps = self.next_rps(system, seed, attainment)
                    if rate_rps is not None and not self._is_over():
                        self._probe(served, system, seed, rate_rps, attainment)
            else:
                for seed, rate_rps, slo_scale in list(self._comparisons(system)):
                    if not self._is_over():
                        self._probe(served, system, seed, rate_rps, None, slo_scale)

    def _probe(
        self,
        served: Endpoint,
        system: System,
        seed: int,
        rate_rps: float,
        attainment: float | None,
        slo_scale: float = 1.0,
    ) -> None:
        begin_s = time.monotonic()
        probe = self.prober.probe(served, system, seed, rate_rps, attainment, slo_scale)
        self._probe_s += 0.2 * (time.monotonic() - begin_s - self._probe_s)
        bounds = f"; {self._bounds(probe, attainment)}" if attainment is not None else ""
        slos = f", SLOs x {slo_scale:g}" if slo_scale != 1 else ""
        self.prober.say(f"  {rate_rps:.2f} req/s, seed {seed}{slos}: {outcome(probe)}{bounds}; {self._left()}")

    def _bounds(self, probe: Probe, attainment: float) -> str:
        low_rps, high_rps = self.log.bracket(probe.system, probe.seed, attainment)
        return f"{attainment:.0%} ends between {low_rps:.2f} and {high_rps:.2f} req/s"

    def _left(self) -> str:
        """What is left, as text: within a budget, what is left of it."""
        probes = self.probes_left()
        visits = math.ceil(probes / len(self._searches))
        left_s = probes * self._probe_s + visits * self._start_s
        budget_s = self._give_up_s - time.monotonic()
        return f"about {probes} probes, {left_s / 60:.0f} min left" + (
            f" (budget {max(0.0, budget_s) / 60:.0f} min)" if budget_s < left_s else ""
        )

    def _is_over(self) -> bool:
        return time.monotonic() > self._give_up_s
