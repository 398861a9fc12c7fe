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
from sgl_flowprefill.bench.simulator.stock import ORDERS, StockInstance
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.policy import POLICIES, Limits, make_policy

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
NAMES_HELP: Final = (
    f"{', '.join(POLICIES)}, with /layer or /chunk for coarser preemption, or stock-ORDER[-CHUNK] with ORDER "
    f"{', '.join(ORDERS)}, e.g. stock-spf-2048"
)


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


@dataclass(frozen=True)
class Run:
    """A simulated run."""

    requests: Sequence[SimRequest]
    blocking_s: Sequence[float] | None
    """None for a system that does not preempt."""

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
    stock = re.fullmatch(r"stock-([a-z]+)(?:-(\d+))?", system)
    if stock and stock[1] in ORDERS and stock[2] != "0":
        return StockInstance(setup.machine, stock[1], int(stock[2]) if stock[2] else None)
    kind, _, granularity = system.partition("/")
    if stock or granularity not in ("", *GRANULARITIES):
        raise ValueError(f"no system is called {system!r}; there are {NAMES_HELP}")
    preemption = Preemption(granularity or "operator", setup.max_operator_s, setup.lookahead)
    return FlowPrefillInstance(
        setup.machine, make_policy(kind, setup.limits, setup.max_starvation_s), preemption, setup.hub_s
    )


def run(system: str, trace: Trace, setup: Setup) -> Run:
    """Simulate ``trace`` on ``setup.instances`` instances of ``system``."""
    requests = prepare(trace, setup.machine.cost, setup.conditions)
    instances = [new_instance(system, setup) for _ in range(setup.instances)]
    simulate(requests, instances, ROUTERS[setup.router](setup.instances))
    preempting = [instance for instance in instances if isinstance(instance, FlowPrefillInstance)]
    blocking_s = [value_s for instance in preempting for value_s in instance.blocking_s] if preempting else None
    return Run(requests, blocking_s)
