"""A prefill instance under FlowPrefill: the hub of ``runtime.scheduler`` in simulated time, with the same policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sgl_flowprefill.bench.simulator.checkpoints import Checkpoints, Preemption
from sgl_flowprefill.bench.simulator.instance import Instance, KvCache, Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.policy import Job, Policy


class SimTask:
    """A started batch: one forward pass."""

    __slots__ = ("checkpoints", "duration_s", "executed_s", "job", "members", "predicted_s", "ready_s")

    def __init__(
        self,
        members: list[SimRequest],
        winner: Job[SimRequest],
        duration_s: float,
        predicted_s: float,
        checkpoints: Checkpoints,
    ) -> None:
        self.members = members
        self.ready_s = members[0].ready_s
        self.duration_s = duration_s
        self.predicted_s = predicted_s
        self.checkpoints = checkpoints
        self.executed_s = 0.0
        arrival_s = min(member.arrival_s for member in members)
        self.job = Job(self, arrival_s, winner.deadline_s, predicted_s, len(members), winner.number, started=True)

    @property
    def remaining_s(self) -> float:
        """What the runtime believes to be left: by checkpoints passed, or by time where there are none."""
        if not self.checkpoints.total:
            return max(0.0, self.predicted_s - self.executed_s)
        return self.predicted_s * (1 - self.checkpoints.passed(self.executed_s) / self.checkpoints.total)


class FlowPrefillInstance(Instance):
    """Runs one task at a time and asks the policy again at the first checkpoint after something has happened."""

    def __init__(
        self,
        machine: Machine,
        policy: Policy[SimRequest, SimTask],
        preemption: Preemption,
        hub_s: float = 0.0,
    ) -> None:
        self._cost = machine.cost
        self._kv = KvCache(machine)
        self._policy = policy
        self._preemption = preemption
        self._hub_s = hub_s
        self._kv_is_short = False
        self._running: SimTask | None = None
        self._resumed_s = 0.0
        self._stop_elapsed_s = 0.0
        self._stop_s = math.inf
        """When ``_running`` comes back to the hub next, after running for ``_stop_elapsed_s`` in all."""
        self.next_s = math.inf
        self.completed: list[SimRequest] = []
        self.blocking_s: list[float] = []
        """For each preemption, from when the request that won could start to when the task that ran had stopped."""

    def submit(self, request: SimRequest, now_s: float) -> None:
        if sum(request.shape) > self._kv.total_tokens:
            self.completed.append(request)
            return
        self._policy.add(Job(request, request.arrival_s, request.deadline_s, request.predicted_s))
        if self._running is None:
            self._run_next(now_s)
        else:
            self._stop_soon(now_s)

    def step(self) -> None:
        now_s = self.next_s
        if self._kv.release(now_s):
            self._kv_is_short = False
        task = self._running
        if task is not None and now_s < self._stop_s:
            self._stop_soon(now_s)
            return
        if task is not None:
            task.executed_s = self._stop_elapsed_s
            self._policy.remove(task.job)
            if task.executed_s >= task.duration_s:
                self._running = None
                self._kv_is_short = False
                self._kv.transfer(task.members, now_s)
                self.completed.extend(task.members)
            else:
                task.job.remaining_s = task.remaining_s
                self._policy.add(task.job)
        self._run_next(now_s)

    def _stop_soon(self, now_s: float) -> None:
        """The running task comes back at its next checkpoint."""
        task = self._running
        assert task is not None
        elapsed_s = task.executed_s + max(0.0, now_s - self._resumed_s)
        self._stop_at(min(self._stop_elapsed_s, task.checkpoints.next_stop_s(elapsed_s)))

    def _stop_at(self, elapsed_s: float) -> None:
        assert self._running is not None
        self._stop_elapsed_s = elapsed_s
        self._stop_s = self._resumed_s + elapsed_s - self._running.executed_s
        self.next_s = min(self._stop_s, self._kv.next_release_s) if self._kv_is_short else self._stop_s

    def _run_next(self, now_s: float) -> None:
        task = self._pick(now_s)
        if task is None:
            self._running = None
            self.next_s = self._kv.next_release_s if self._kv_is_short else math.inf
            return
        if self._running is not None and task is not self._running:
            # What was there when the hub last chose, lost then: it wins because of something that happened since. A
            # task is resumed in place of another only because of what happens right now: nobody was blocked.
            self.blocking_s.append(0.0 if task.executed_s else now_s - max(task.ready_s, self._resumed_s))
        self._running = task
        self._resumed_s = now_s + self._hub_s
        self._stop_at(task.duration_s)

    def _pick(self, now_s: float) -> SimTask | None:
        running = self._running
        while True:
            job = self._policy.pick(now_s, running.job if running else None, admit=not self._kv_is_short)
            if job is None:
                return None
            if isinstance(job.item, SimTask):
                return job.item
            task = self._start(job, now_s)
            if task is not None:
                return task
            self._kv_is_short = True

    def _start(self, winner: Job[SimRequest], now_s: float) -> SimTask | None:
        jobs = self._policy.batch(winner, now_s, _new_tokens, self._predict_s)
        members = [job.item for job in jobs]
        members = members[: self._kv.fitting(members)]
        if not members:
            return None
        self._kv.take(members)
        for member in members:
            self._kv.send(member, member.shape.cached_tokens, now_s)
        for job in jobs[: len(members)]:
            self._policy.remove(job)
        shapes = [member.shape for member in members]
        duration_s = self._cost.predict_s(shapes)
        checkpoints = Checkpoints(duration_s, self._cost.layers, self._cost.attention_share(shapes), self._preemption)
        task = SimTask(members, winner, duration_s, self._predict_s(members), checkpoints)
        self._policy.add(task.job)
        return task

    def _predict_s(self, requests: Sequence[SimRequest]) -> float:
        """Predicted time of a batch, off by as much as the predictions of its requests."""
        if len(requests) == 1:
            return requests[0].predicted_s
        alone_s = sum(self._cost.predict_s((request.shape,)) for request in requests)
        off = sum(request.predicted_s for request in requests) / alone_s
        return off * self._cost.predict_s([request.shape for request in requests])


def _new_tokens(request: SimRequest) -> int:
    return request.shape.new_tokens
