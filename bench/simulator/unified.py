"""A unified instance under FlowPrefill: the runtime's own hub, with decode steps between the operators of prefills."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sgl_flowprefill.bench.simulator.checkpoints import Preemption
from sgl_flowprefill.bench.simulator.flowprefill import Blocking, FlowPrefillInstance, SimBatch, SimEngine
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.streams import OutputKv, RunningStreams, StepTimes
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import Act, ColocatedPolicy, DecodeLimits, Policy, Stream

Colocated = ColocatedPolicy[WaitingRequest, PrefillTask]


class UnifiedEngine(SimEngine):
    """The engine that the hub of a unified instance drives: prefills, and the streams that they become."""

    kv: OutputKv

    def __init__(self, machine: Machine, preemption: Preemption, now_s: Callable[[], float]) -> None:
        super().__init__(machine, preemption, now_s, OutputKv(machine))
        self.streams = RunningStreams(self.kv)
        self.policy: Colocated
        self.give_backs = 0
        self._streams: dict[SimRequest, Stream] = {}
        """What the policy knows of each."""
        self._back: list[Arrival] = []
        """Requests that wait again: their tasks were given back, or they were retracted."""
        self._is_short = False
        """Whether tasks were given back, and no KV cache has been freed by something else since."""

    def arrived(self) -> Sequence[Arrival]:
        back, self._back = self._back, []
        return back

    def abandoned(self, live: Sequence[PrefillTask]) -> Sequence[PrefillTask]:
        """The tasks that are given back so that the next step has KV cache."""
        missing_tokens = len(self.streams) - self.kv.free_tokens
        if missing_tokens <= 0 or not live:
            return ()

        def held_tokens(task: PrefillTask) -> int:
            return sum(sum(request.shape) for request in task.batch.requests)

        def executed_s(task: PrefillTask) -> float:
            executed: float = task.batch.executed_s
            return executed

        given = self.policy.give_back(self._now_s(), missing_tokens, held_tokens, executed_s)
        self.give_backs += len(given)
        return [job.item for job in given]

    def drop(self, task: PrefillTask) -> None:
        for request in task.batch.requests:
            self.kv.free(request, sum(request.shape))
            self._back.append(self.arrival(request))
        self._is_short = True

    def make_batch(self, reqs: Sequence[SimRequest]) -> SimBatch | None:
        return None if self._is_short else super().make_batch(reqs)

    def finish(self, task: PrefillTask) -> None:
        now_s, joined = self._now_s(), []
        requests: Sequence[SimRequest] = task.batch.requests
        self.kv.first_tokens(requests, now_s)
        for request in requests:
            if self.streams.join(request, now_s):
                stream = self._streams[request] = Stream(request.tbt_slo_s, sum(request.shape), now_s)
                joined.append(stream)
            else:
                self._is_short = False
        self.policy.joined(joined)
        self.completed.extend(request for request in requests if request.came_tokens == 1)

    def free_for_step(self) -> None:
        """Retract streams until the next step has KV cache. No tasks are left to be given back."""
        while len(self.streams) > self.kv.free_tokens:
            request = self.streams.retract()
            request.predicted_s = self._cost.predict_s([request.shape])
            self.policy.left([self._streams.pop(request)])
            now_s = self._now_s()
            # Due one objective from now on: its old deadline would make it infeasible.
            due_s = now_s + request.deadline_s - request.arrival_s
            shape = self.arrival(request).shape
            self._back.append(Arrival(request, (), shape, now_s, due_s, now_s, retracted=True))
            self._is_short = True

    def end_step(self, begin_s: float) -> bool:
        """All streams have got a token. Whether KV cache has been freed."""
        now_s = self._now_s()
        ended = [self._streams.pop(request) for request in self.streams.step(now_s)]
        self.policy.stepped(begin_s, now_s, ended)
        if ended:
            self._is_short = False
        return bool(ended)


class UnifiedInstance(FlowPrefillInstance):
    """Lets time pass between the turns of a hub, for tasks as on a prefill instance, and for decode steps as a whole.

    A running task comes back at the first preemption checkpoint after a step has to start.
    """

    engine: UnifiedEngine

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
    ) -> None:
        super().__init__(machine, policy, preemption, hub_s, recorder)
        self.policy: Colocated = ColocatedPolicy(policy, step_cost, limits)
        self.hub.work.colocated = self.engine.policy = self.policy
        self.step_times = StepTimes(step_cost, step_error)
        self.lateness_s: list[float] = []
        """For each step that had to start while a prefill ran, how much later it did."""
        self._step_begin_s: float | None = None
        """When the step that runs began."""
        self._ask_again_s = math.inf

    def _new_engine(self, machine: Machine, preemption: Preemption) -> UnifiedEngine:
        return UnifiedEngine(machine, preemption, lambda: self.now_s)

    @property
    def streams(self) -> RunningStreams:
        return self.engine.streams

    @property
    def give_backs(self) -> int:
        """Prefills that were given up for streams."""
        return self.engine.give_backs

    def submit(self, request: SimRequest, now_s: float) -> None:
        if self._step_begin_s is None:
            super().submit(request, now_s)
        elif self.engine.kv.can_hold(request):
            self.now_s = now_s
            self.hub.work.add(self.engine.arrival(request))
        else:
            self.engine.completed.append(request)

    def step(self) -> None:
        if self._step_begin_s is None:
            if self._running is not None and self.next_s >= self._ask_again_s:
                self._ask_again_s = math.inf
            super().step()
            return
        self.now_s = self.next_s
        if self.engine.end_step(self._step_begin_s):
            self.hub.kv_is_short = False
        self._step_begin_s = None
        self._turn()

    def _turn(self) -> None:
        task = self.hub.next_task()
        if task is Act.STEP:
            self._begin_step()
            return
        self._ask_again_s = self.hub.work.ask_again_s
        self._run(task)

    def _begin_step(self) -> None:
        streams, load = self.engine.streams, self.policy.load
        self.engine.free_for_step()
        self._running = None
        if self.hub.work.tasks.running is not None and self.now_s >= load.start_by_s:
            self.lateness_s.append(self.now_s - load.start_by_s)
        self._step_begin_s = self.now_s
        self.next_s = self.now_s + self._hub_s + self.step_times.draw_s(len(streams), streams.context_tokens)

    def _stop_at(self, task: PrefillTask, elapsed_s: float) -> None:
        super()._stop_at(task, elapsed_s)
        self.next_s = min(self.next_s, max(self._ask_again_s, self.now_s))
