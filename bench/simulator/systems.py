"""The systems that can be simulated, by name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sgl_flowprefill.bench.simulator.checkpoints import GRANULARITIES, Preemption
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.flowprefill import FlowPrefillInstance
from sgl_flowprefill.bench.simulator.instance import Instance, Machine
from sgl_flowprefill.bench.simulator.requests import Conditions, SimRequest, prepare
from sgl_flowprefill.bench.simulator.router import ROUTERS
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.stock import ORDERS, StockInstance
from sgl_flowprefill.bench.simulator.stock_unified import StockUnifiedInstance
from sgl_flowprefill.bench.simulator.unified import UnifiedInstance
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.policy import POLICIES, DecodeLimits, Limits, make_policy

HEADLINE: Final = (
    "feasible",
    "s-edf",
    "feasible/layer",
    "stock-fcfs",
    "stock-spf",
    "stock-fcfs-512",
    "stock-fcfs-2048",
    "stock-fcfs-8192",
    "stock-spf-512",
    "stock-spf-2048",
    "stock-priority-512",
    "stock-priority-2048",
)
"""What a comparison runs by default; stock-fcfs stands in for DistServe."""
UNIFIED_HEADLINE: Final = (
    "feasible",
    "s-edf",
    "feasible/chunk",
    "stock-fcfs-8192",
    "stock-spf-2048",
    "stock-spf-1024-i1",
    "stock-spf-1024-mixed",
    "stock-priority-1024-mixed",
)
"""What a comparison of unified servers runs by default; stock-fcfs-8192 is SGLang's default on large GPUs."""
NAMES_HELP: Final = (
    f"{', '.join(POLICIES)}, with /layer or /chunk for coarser preemption, or stock-ORDER[-CHUNK] with ORDER "
    f"{', '.join(ORDERS)}, e.g. stock-spf-2048"
)
UNIFIED_NAMES_HELP: Final = (
    f"{NAMES_HELP}; on unified servers also stock-ORDER-CHUNK-mixed (mixed chunks) and stock-ORDER[-CHUNK[-mixed]]-iN "
    "(N decode steps behind each forward of prompts)"
)


@dataclass(frozen=True)
class Unified:
    """Instances that decode what they have prefilled."""

    step_cost: StepCost
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    step_error: float = 0.0
    """Standard deviation of the logarithm of the times of steps around the predicted ones."""


@dataclass(frozen=True)
class Setup:
    """Everything but the system and the trace."""

    machine: Machine
    conditions: Conditions = field(default_factory=Conditions)
    limits: Limits = field(default_factory=lambda: Limits(max_suspended=16, max_batch_tokens=2048))
    max_starvation_s: float = 60.0
    max_operator_s: float = 0.005
    lookahead: int = 0
    hub_s: float = 0.0
    instances: int = 1
    router: str = "least-work"
    unified: Unified | None = None
    """None: prefill instances."""


@dataclass(frozen=True)
class StreamFigures:
    """What became of the streams of a run, besides their tokens."""

    steps: int
    step_s: float
    """Time in decode steps, without those in mixed forwards."""
    retractions: int
    give_backs: int
    late_s: Sequence[float]
    """For each step that had to start while a prefill ran, how much later it did."""
    margin_s: float
    """At the end, the largest of all instances."""


@dataclass(frozen=True)
class Run:
    """A simulated run."""

    requests: Sequence[SimRequest]
    blocking_s: Sequence[float] | None
    """None for a system that does not preempt."""
    streams: StreamFigures | None = None
    """None for prefill instances."""

    @property
    def attainment(self) -> float:
        """Share of requests whose first token came in time."""
        return sum(request.met for request in self.requests) / max(1, len(self.requests))

    @property
    def duration_s(self) -> float:
        """From 0 s to the last first token."""
        done = [request.first_token_s for request in self.requests if request.first_token_s < float("inf")]
        return max(done, default=0.0)


def new_instance(system: str, setup: Setup) -> Instance:
    """An idle instance of ``system``. Raises ValueError with the names that there are."""
    machine, unified = setup.machine, setup.unified
    stock = re.fullmatch(r"stock-([a-z]+)(?:-(\d+)(-mixed)?)?(?:-i(\d+))?", system)
    if stock and stock[1] in ORDERS and stock[2] != "0":
        order, chunk_tokens = stock[1], int(stock[2]) if stock[2] else None
        if unified is not None:
            return StockUnifiedInstance(
                machine,
                order,
                chunk_tokens,
                unified.step_cost,
                mixed=bool(stock[3]),
                interval=int(stock[4] or 0),
                step_error=unified.step_error,
            )
        if not stock[3] and not stock[4]:
            return StockInstance(machine, order, chunk_tokens)
    kind, _, granularity = system.partition("/")
    if stock or granularity not in ("", *GRANULARITIES):
        raise ValueError(f"no system is called {system!r}; there are {UNIFIED_NAMES_HELP if unified else NAMES_HELP}")
    preemption = Preemption(granularity or "operator", setup.max_operator_s, setup.lookahead)
    policy = make_policy(kind, setup.limits, setup.max_starvation_s)
    if unified is not None:
        return UnifiedInstance(
            machine, policy, preemption, unified.step_cost, unified.limits, setup.hub_s, unified.step_error
        )
    return FlowPrefillInstance(machine, policy, preemption, setup.hub_s)


def run(system: str, trace: Trace, setup: Setup) -> Run:
    """Simulate ``trace`` on ``setup.instances`` instances of ``system``."""
    requests = prepare(trace, setup.machine.cost, setup.conditions)
    instances = [new_instance(system, setup) for _ in range(setup.instances)]
    simulate(requests, instances, ROUTERS[setup.router](setup.instances))
    preempting = [instance for instance in instances if isinstance(instance, FlowPrefillInstance)]
    blocking_s = [value_s for instance in preempting for value_s in instance.blocking_s] if preempting else None
    return Run(requests, blocking_s, _stream_figures(instances))


def _stream_figures(instances: Sequence[Instance]) -> StreamFigures | None:
    decoding = [instance for instance in instances if isinstance(instance, UnifiedInstance | StockUnifiedInstance)]
    if not decoding:
        return None
    ours = [instance for instance in decoding if isinstance(instance, UnifiedInstance)]
    return StreamFigures(
        steps=sum(instance.step_times.steps for instance in decoding),
        step_s=sum(instance.step_times.total_s for instance in decoding),
        retractions=sum(instance.streams.retractions for instance in decoding),
        give_backs=sum(instance.give_backs for instance in ours),
        late_s=[late_s for instance in ours for late_s in instance.late_s],
        margin_s=max((instance.policy.margin_s for instance in ours), default=0.0),
    )
