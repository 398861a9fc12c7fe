"""What can be simulated: an instance under FlowPrefill with one of its policies, or under SGLang's own scheduler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sgl_flowprefill.bench.simulator.checkpoints import Preemption
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.flowprefill import FlowPrefillInstance, HubInstance
from sgl_flowprefill.bench.simulator.instance import Instance, Machine, Slowdown
from sgl_flowprefill.bench.simulator.learned import LearnedTTFT
from sgl_flowprefill.bench.simulator.requests import Conditions, SimRequest, prepare
from sgl_flowprefill.bench.simulator.router import ROUTERS
from sgl_flowprefill.bench.simulator.step_cost import StepCost, step_cost
from sgl_flowprefill.bench.simulator.stock import MAX_PREFILL_TOKENS, StockInstance
from sgl_flowprefill.bench.simulator.stock_unified import StockUnifiedInstance
from sgl_flowprefill.bench.simulator.unified import UnifiedInstance
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.policy import DecodeLimits, Limits, make_policy


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
    forward_error: float = 0.0
    """Standard deviation of the logarithm of the times of FlowPrefill's forwards around the cost model's."""
    learned: bool = False
    """Whether FlowPrefill predicts as a server does (``simulator.learned``), instead of by what the machine takes now.
    Steps are always corrected by those that ran."""
    step_cost: StepCost | None = None
    """Cost of decode steps on unified instances; None: as the machine's cost model has it."""
    step_error: float = 0.0
    """Standard deviation of the logarithm of the times of steps around the predicted ones."""
    slower: float = 0.0
    """Share by which the machine becomes slower in the middle of a trace, or faster where it is negative. Nothing tells
    a policy whose predictions are learned."""

    def met_by(self, trace: Trace) -> Setup:
        """With the machine that ``trace`` meets."""
        if not self.slower:
            return self
        slowdown = Slowdown(1 + self.slower, trace.middle_s)
        return dataclasses.replace(self, machine=dataclasses.replace(self.machine, slowdown=slowdown))

    @property
    def change(self) -> str:
        """What becomes of the machine in the middle, for titles."""
        return f"{self.slower:.0%} slower" if self.slower >= 0 else f"{-self.slower:.0%} less time"

    def steps(self) -> StepCost:
        """What decode steps cost."""
        return self.step_cost or step_cost(self.machine.cost)

    def title(self, name: str, traces: Sequence[Trace], *, rate: bool = True) -> str:
        """What a table about ``traces``, which are called ``name``, is headed by; with their ``rate``, or without."""
        at = f" at {traces[0].rate_rps:.2f} req/s" if rate else ""
        requests = len(traces[0].requests)
        return f"{name}{at}, {len(traces)} x {requests} requests, {self.instances} x {self.machine.cost.name}"


class Simulated(Protocol):
    """A scheduler whose instances can be simulated; its text is its name."""

    def new_instance(self, setup: Setup) -> Instance:
        """An idle instance."""

    def max_batch_tokens(self, setup: Setup) -> int:
        """Most new tokens of a forward of several requests."""


def _learned(setup: Setup) -> LearnedTTFT | None:
    return LearnedTTFT(setup.machine.cost, setup.forward_error) if setup.learned else None


@dataclass(frozen=True)
class SimulatedFlowPrefill:
    """FlowPrefill with a policy, one of ``sgl_flowprefill.policy.POLICIES``, and a granularity of preemption."""

    policy: str
    granularity: str = "operator"

    def __str__(self) -> str:
        return self.policy if self.granularity == "operator" else f"{self.policy}/{self.granularity}"

    def new_instance(self, setup: Setup) -> Instance:
        preemption = Preemption(self.granularity, setup.max_operator_s, setup.lookahead)
        return FlowPrefillInstance(
            setup.machine,
            make_policy(self.policy, setup.limits, setup.max_starvation_s),
            preemption,
            setup.hub_s,
            ttft=_learned(setup),
            forward_error=setup.forward_error,
        )

    def max_batch_tokens(self, setup: Setup) -> int:
        return setup.limits.max_batch_tokens


@dataclass(frozen=True)
class SimulatedStock:
    """SGLang's own scheduler with an order, one of ``stock.ORDERS``, and a chunk size."""

    order: str
    chunk_tokens: int | None = None
    """None for whole prompts."""

    def __str__(self) -> str:
        return f"stock-{self.order}" + (f"-{self.chunk_tokens}" if self.chunk_tokens else "")

    def new_instance(self, setup: Setup) -> Instance:
        return StockInstance(setup.machine, self.order, self.chunk_tokens)

    def max_batch_tokens(self, setup: Setup) -> int:
        return self.chunk_tokens or MAX_PREFILL_TOKENS


@dataclass(frozen=True)
class SimulatedUnified:
    """FlowPrefill on servers that prefill and decode."""

    policy: str
    granularity: str = "operator"
    limits: DecodeLimits = field(default_factory=DecodeLimits)
    variant: str = ""
    """Name of ``limits``, where they are not the default."""

    def __str__(self) -> str:
        name = str(SimulatedFlowPrefill(self.policy, self.granularity))
        return f"{name}+{self.variant}" if self.variant else name

    def new_instance(self, setup: Setup) -> Instance:
        return UnifiedInstance(
            setup.machine,
            make_policy(self.policy, setup.limits, setup.max_starvation_s),
            Preemption(self.granularity, setup.max_operator_s, setup.lookahead),
            setup.steps(),
            self.limits,
            setup.hub_s,
            setup.step_error,
            ttft=_learned(setup),
            forward_error=setup.forward_error,
        )

    def max_batch_tokens(self, setup: Setup) -> int:
        return setup.limits.max_batch_tokens


@dataclass(frozen=True)
class SimulatedUnifiedStock:
    """SGLang's own scheduler on servers that prefill and decode."""

    order: str
    chunk_tokens: int | None = None
    mixed: bool = False
    interval: int = 0
    """Decode steps behind each forward of prompts."""

    def __str__(self) -> str:
        name = str(SimulatedStock(self.order, self.chunk_tokens)) + ("-mixed" if self.mixed else "")
        return f"{name}-interval-{self.interval}" if self.interval else name

    def new_instance(self, setup: Setup) -> Instance:
        return StockUnifiedInstance(
            setup.machine,
            self.order,
            self.chunk_tokens,
            setup.steps(),
            mixed=self.mixed,
            interval=self.interval,
            step_error=setup.step_error,
        )

    def max_batch_tokens(self, setup: Setup) -> int:
        return self.chunk_tokens or MAX_PREFILL_TOKENS


@dataclass(frozen=True)
class StreamFigures:
    """What became of the streams of a run, besides their tokens."""

    steps: int
    step_s: float
    """Time in decode steps, without forwards of prompts that streams took part in."""
    retractions: int
    give_backs: int
    lateness_s: Sequence[float]
    """For each step that had to start while a prefill ran, how much later it did."""
    margin_s: float
    """At the end, the largest of all instances."""


@dataclass(frozen=True)
class Run:
    """A simulated run."""

    requests: Sequence[SimRequest]
    blocking_s: Sequence[float] | None
    """Of each preemption, as the event log has it; None for a system that does not preempt."""
    streams: StreamFigures | None = None
    """None for prefill instances."""
    switches_without_news: int = 0
    """Beside the preemptions: nobody was blocked."""
    instances: int = 1

    @property
    def attainment(self) -> float:
        """Share of requests whose first token came in time."""
        return sum(request.met for request in self.requests) / max(1, len(self.requests))

    @property
    def duration_s(self) -> float:
        """From 0 s to the last first token."""
        done = [request.first_token_s for request in self.requests if request.first_token_s < float("inf")]
        return max(done, default=0.0)


def run(system: Simulated, trace: Trace, setup: Setup) -> Run:
    """Simulate ``trace`` on ``setup.instances`` instances of ``system``."""
    requests = prepare(trace, setup.machine.cost, setup.conditions)
    setup = setup.met_by(trace)
    instances = [system.new_instance(setup) for _ in range(setup.instances)]
    simulate(requests, instances, ROUTERS[setup.router](setup.instances))
    blocking = [instance.blocking for instance in instances if isinstance(instance, HubInstance)]
    return Run(
        requests,
        [value_s for one in blocking for value_s in one.blocking_s] if blocking else None,
        _stream_figures(instances),
        sum(one.switches_without_news for one in blocking),
        setup.instances,
    )


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
        lateness_s=[late_s for instance in ours for late_s in instance.lateness_s],
        margin_s=max((instance.policy.margin_s for instance in ours), default=0.0),
    )
