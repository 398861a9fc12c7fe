"""A unified instance under FlowPrefill: the runtime's own hub, with decode steps between the operators of prefills."""

from __future__ import annotations

from collections.abc import Sequence

from sgl_flowprefill.bench.simulator.checkpoints import Preemption
from sgl_flowprefill.bench.simulator.flowprefill import (
    Blocking,
    HubInstance,
    SimEngine,
    SimShape,
    objective_of,
)
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.streams import FIRST_RATIO, OutputKv, RunningStreams, StepTimes
from sgl_flowprefill.hub.parts import TTFT
from sgl_flowprefill.hub.role import Arrival, Decoder
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import ColocatedPolicy, DecodeLimits, Policy, Stream

Colocated = ColocatedPolicy[WaitingRequest, PrefillTask]


class SimStep:
    """A decode step, whose result is on the host at its end."""

    copy_done = None


class UnifiedEngine(SimEngine, Decoder):
    """The engine that the hub of a unified instance drives: prefills, and the streams that they become."""

    kv: OutputKv

    def __init__(self, machine: Machine, preemption: Preemption, policy: Colocated, forward_error: float = 0.0) -> None:
        super().__init__(machine, preemption, OutputKv(machine), forward_error)
        self.policy = policy
        self.streams = RunningStreams(self.kv)
        self.give_backs = 0
        self._streams: dict[SimRequest, Stream] = {}
        """What the policy knows of each."""
        self._held_back: list[tuple[SimRequest, int]] = []
        """Requests whose tasks were given back, with their numbers: they come again when KV cache has been freed by
        something else.
        """
        self._has_freed = False
        """Whether KV cache has been freed since the last look."""

    # ---- what the hub asks of its role ------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        has_freed, self._has_freed = self._has_freed, False
        return has_freed

    def finish(self, task: PrefillTask) -> None:
        joined = []
        requests: Sequence[SimRequest] = task.batch.requests
        self.kv.first_tokens(requests, self.now_s)
        for request in requests:
            if self.streams.join(request, self.now_s):
                stream = self._streams[request] = Stream(request.tbt_slo_s, sum(request.shape), self.now_s)
                joined.append(stream)
            else:
                self._freed()
        self.policy.joined(joined)
        self.completed.extend(request for request in requests if request.came_tokens == 1)

    def rest(self) -> bool:
        """An idle server of SGLang's forgets how much of answers was not needed."""
        if not self.waiting():
            self.kv.ratio = FIRST_RATIO
        return super().rest()

    # ---- what the hub asks of its decoder ---------------------------------------------------------------------------

    def missing_tokens(self) -> int:
        return len(self.streams) - self.kv.free_tokens

    def give_back(self, task: PrefillTask) -> None:
        for request, member in zip(task.batch.requests, task.members, strict=True):
            self.kv.free(request, sum(request.shape))
            self._held_back.append((request, member.number))
        self.give_backs += 1

    def step(self) -> DecodeStep:
        """A step begins. Where it lacks KV cache, no task is left that gives its own back: streams are retracted."""
        while self.missing_tokens() > 0:
            request = self.streams.retract()
            request.predicted_s = self._cost.predict_s([request.shape])
            self.policy.left([self._streams.pop(request)])
            # Due one objective from now on: its old deadline would make it infeasible.
            due_s = self.now_s + request.deadline_s - request.arrival_s
            shape = SimShape.of(request, self._cost)
            promised = objective_of(request)
            self._come.append(
                Arrival(request, (), shape, self.now_s, due_s, self.now_s, retracted=True, objective=promised)
            )
        self.policy.began(self.now_s)
        return DecodeStep(SimStep())

    def finish_step(self, step: DecodeStep) -> None:
        """The step is over: all streams have got a token."""
        ended = [self._streams.pop(request) for request in self.streams.step(self.now_s)]
        self.policy.stepped(self.now_s, ended)
        if ended:
            self._freed()

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def _freed(self) -> None:
        """KV cache has been freed, and not by giving a task back."""
        self._has_freed = True
        for request, number in self._held_back:
            self.come(request, self.now_s, number)
        self._held_back.clear()


class UnifiedInstance(HubInstance[UnifiedEngine]):
    """Lets time pass for decode steps, too, each as a whole. A running task comes back at the first preemption
    checkpoint after a step has to start.
    """

    def __init__(
        self,
        machine: Machine,
        policy: Policy[WaitingRequest, PrefillTask],
        preemption: Preemption,
        step_cost: StepCost,
        limits: DecodeLimits,
        hub_s: float = 0.0,
        step_error: float = 0.0,
        recorder: Blocking | None = None,
        ttft: TTFT | None = None,
        forward_error: float = 0.0,
    ) -> None:
        """``ttft``: what predicts forwards of prompts, as ``HubInstance``."""
        colocated: Colocated = ColocatedPolicy(policy, step_cost, limits)
        engine = UnifiedEngine(machine, preemption, colocated, forward_error)
        super().__init__(engine, colocated, machine, ttft, hub_s, recorder, engine)
        self.step_times = StepTimes(step_cost, step_error, machine.slowdown)
        self.lateness_s: list[float] = []
        """For each step that had to start while a prefill ran, how much later it did."""
        self._step: DecodeStep | None = None
        """The step that runs."""

    @property
    def streams(self) -> RunningStreams:
        return self.engine.streams

    @property
    def give_backs(self) -> int:
        """Prefills that were given up for streams."""
        return self.engine.give_backs

    def step(self) -> None:
        if self._step is None:
            super().step()
            return
        self.now_s = self.next_s
        step, self._step = self._step, None
        self.engine.finish_step(step)
        self._turn()

    def _look_soon(self) -> None:
        if self._step is None:
            super()._look_soon()

    def _begin_step(self) -> None:
        """The step of ``Hub.step``, whose end comes later."""
        streams, start_by_s = self.engine.streams, self.policy.load.start_by_s
        self.hub.make_room_for_step()
        self._running, self._step = None, self.engine.step()
        if self.hub.work.tasks.running is not None and self.now_s >= start_by_s:
            self.lateness_s.append(self.now_s - start_by_s)
        begin_s = self.now_s + self._hub_s
        self.next_s = self.step_times.end_s(begin_s, len(streams), streams.context_tokens)
