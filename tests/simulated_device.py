"""An asynchronous device in virtual time, and FlowPrefill's own hub, executor and policy on top of it.

The host pays for every launch and for every decision; the device runs operators one after the other in the order in
which they were launched, and an operator's result exists only once it has run. Real are ``FlowPrefillScheduler`` (its
step, its picks, its deferred finishes), ``Executor`` with its greenlets, ``AttentionSlots``, the policy, and
``QueueDevice``, of which the simulated device is a subclass as the CUDA device is. Replaced is what they ask of SGLang:
admission, the model's forward pass, and the processing of a result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.pace import AS_PREDICTED
from sgl_flowprefill.policy import Limits, make_policy
from sgl_flowprefill.runtime import scheduler as scheduler_module
from sgl_flowprefill.runtime import task as task_module
from sgl_flowprefill.runtime.checkpoints import Progress
from sgl_flowprefill.runtime.device import POLL_S, HostStamp, QueueDevice
from sgl_flowprefill.runtime.journal import Journal
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.task import AttentionSlots, Executor
from sgl_flowprefill.runtime.waiting import WaitingRequests


@dataclass(frozen=True)
class HostCosts:
    """Seconds of the host's time."""

    launch_s: float = 60e-6
    """Queueing one operator's kernels."""
    decision_s: float = 50e-6
    """Taking what has happened and picking."""
    admission_s: float = 150e-6
    """SGLang's admission of a batch and its inputs."""
    plan_s: float = 80e-6
    """Planning attention."""
    finish_s: float = 150e-6
    """Processing a result, with the KV indices read back in the middle of it."""
    plan_waits: bool = False
    """Whether a plan reads its indices back, as FlashInfer's of layers with a sliding window do."""
    send_waits: bool = False
    """Whether KV indices are read back in the queue, not beside it."""


@dataclass
class Operator:
    """One operator on the device."""

    label: Any
    start_s: float
    end_s: float


@dataclass
class SimulatedEvent:
    """Like ``torch.cuda.Event``: marks the end of the queue when it is recorded."""

    device: SimulatedDevice
    at_s: float = math.inf

    def record(self) -> None:
        self.at_s = self.device.busy_until_s

    def query(self) -> bool:
        return self.device.now_s >= self.at_s


class SimulatedDevice(QueueDevice):
    """One in-order queue; ``now_s`` is the host's clock."""

    def __init__(self, lookahead: int, costs: HostCosts) -> None:
        super().__init__(lookahead)
        self.costs = costs
        self.now_s = 0.0
        self.busy_until_s = 0.0
        self.operators: list[Operator] = []
        self.most_queued = 0
        self.events_made = 0

    def launch(self, label: Any, duration_s: float) -> None:
        self.now_s += self.costs.launch_s
        start_s = max(self.now_s, self.busy_until_s)
        self.busy_until_s = start_s + duration_s
        self.operators.append(Operator(label, start_s, self.busy_until_s))

    def synchronize(self) -> None:
        self.now_s = max(self.now_s, self.busy_until_s)

    def record(self) -> None:
        super().record()
        self.most_queued = max(self.most_queued, sum(not event.query() for event in self._queued))

    def fetch(self, batch: Any, result: Any) -> None:
        self.launch(None, 5e-6)
        result.copy_done = self._new_event()
        result.copy_done.record()
        self.record()

    def stamp(self) -> HostStamp:
        return HostStamp(max(self.now_s, self.busy_until_s))

    def _new_event(self) -> SimulatedEvent:
        self.events_made += 1
        return SimulatedEvent(self)

    def _pause(self) -> None:
        self.now_s += POLL_S

    def idle_s(self, requests: Sequence[SimulatedRequest]) -> tuple[float, float]:
        """Seconds in which the device ran nothing although a request was there that was not done on it, and seconds in
        which there was one.
        """
        idle_s = work_s = 0.0
        spans = [(request.arrival_s, request.ran_s) for request in requests]
        edges = sorted({edge for span in spans for edge in span} | {o.start_s for o in self.operators}
                       | {o.end_s for o in self.operators})  # fmt: skip
        running = deque(self.operators)
        present = sorted(spans)
        ends: list[float] = []
        for begin_s, end_s in pairwise(edges):
            while present and present[0][0] <= begin_s:
                ends.append(present.pop(0)[1])
            ends = [end for end in ends if end > begin_s]
            while running and running[0].end_s <= begin_s:
                running.popleft()
            if ends:
                work_s += end_s - begin_s
                if not running or running[0].start_s > begin_s:
                    idle_s += end_s - begin_s
        return idle_s, work_s


@dataclass(eq=False)
class SimulatedRequest:
    """A request and what became of it."""

    rid: str
    arrival_s: float
    tokens: int
    ttft_slo_s: float
    prefix_len: int = 0
    return_logprob: bool = False
    logprob_start_len: int = -1
    trace: list[tuple[str, int]] = field(default_factory=list)
    """(kind, layer) of each operator that ran for it, in the device's order."""
    ran_s: float = math.inf
    """When the device had its token."""
    answered_s: float = math.inf

    @property
    def origin_input_ids(self) -> range:
        return range(id(self), id(self) + self.tokens)  # unlike any other's

    @property
    def bootstrap_room(self) -> int:
        return id(self)

    @property
    def time_stats(self) -> Any:
        return SimpleNamespace(flowprefill_received_s=self.arrival_s, flowprefill_sent_s=self.arrival_s)


@dataclass(frozen=True)
class Model:
    """Operator durations of a decoder."""

    layers: int
    attention_s: Callable[[int], float]
    """By tokens of the batch."""
    mlp_s: Callable[[int], float]

    def forward_s(self, tokens: int) -> float:
        return self.layers * (self.attention_s(tokens) + self.mlp_s(tokens))


class OnlyBackend:
    """Of what a switch saves and restores (``ForwardState``), the part that is there without SGLang."""

    def __init__(self, attn_backend: Any) -> None:
        self._attn_backend = attn_backend

    @classmethod
    def capture(cls, model_runner: Any) -> OnlyBackend:
        return cls(model_runner.attn_backend)

    def with_backend(self, attn_backend: Any) -> OnlyBackend:
        return OnlyBackend(attn_backend)

    def install(self, model_runner: Any) -> None:
        model_runner.attn_backend = self._attn_backend


class Suspensions(Journal):
    """Keeps, of each suspension, when a request could have been read that then took another's place, and its id."""

    def __init__(self, seen: list[tuple[float, str]]) -> None:
        super().__init__(None)
        self._seen = seen

    def suspended(self, task: Any, winner: Any, stopped_s: float, now_s: float, news_readable_s: float) -> None:
        self._seen.append((max(winner.readable_s, news_readable_s), winner.rids[0]))


class SimulatedScheduler(FlowPrefillScheduler):
    """The hub on the simulated device."""

    def __init__(
        self, device: SimulatedDevice, model: Model, requests: Sequence[SimulatedRequest], max_suspended: int = 16
    ) -> None:
        self.device_under_test = device
        self.model = model
        self.requests = sorted(requests, key=lambda request: request.arrival_s)
        self.backends_made = 1
        self.suspensions: list[tuple[float, str]] = []
        """When a request could have been read that then took another's place, and its id."""
        self._arriving = deque(self.requests)
        self._model_runner = SimpleNamespace(
            attn_backend=SimpleNamespace(owner=None),
            _get_attention_backend=self._make_backend,
            kv_index_translator=SimpleNamespace(bind_and_verify_backends=lambda backends: None),
        )
        self._live = []
        self._finishing = deque()
        self._device = device
        self._events = SimpleNamespace(
            pending=lambda: bool(self._arriving) and self._arriving[0].arrival_s <= device.now_s
        )
        self._agreement = None
        self._ends_waiting = self._has_news
        self._executor = Executor(self._model_runner, self._has_news, device)
        self._slots = AttentionSlots(self._model_runner, None)
        self._memory = TaskMemory(Activations(1, 1, 1, None), math.inf)
        self._progress = Progress([True, False] * model.layers)
        self._operators = None
        self._waiting = WaitingRequests()
        self._running = None
        self._tasks_started = 0
        self._kv_is_short = False
        self._engine_paused = False
        self._ttft = SimpleNamespace(
            predict_s=lambda shapes: model.forward_s(sum(shape.new_tokens for shape in shapes)),
            observe=self._observe,
            pace=lambda shapes: AS_PREDICTED,
            follow=lambda: False,
        )
        self.observed: list[tuple[int, float]] = []
        self._policy = make_policy("s-edf", Limits(max_suspended, max_batch_tokens=1), 60.0)
        self._journal = Suspensions(self.suspensions)

    def run_all(self) -> None:
        device = self.device_under_test
        while True:
            if self._step():
                continue
            if not self._arriving:
                return
            device.now_s = max(device.now_s, self._arriving[0].arrival_s)

    # ---- what the hub asks of SGLang ------------------------------------------------------------------------------

    def _take_events(self) -> None:
        device = self.device_under_test
        device.now_s += device.costs.decision_s
        self._waiting.forget_news()
        while self._arriving and self._arriving[0].arrival_s <= device.now_s:
            request = self._arriving.popleft()
            job = self._waiting.add(request, request.arrival_s, request.ttft_slo_s, self._predict_s)
            self._policy.add(job)

    def _make_batch(self, reqs: Sequence[Any]) -> Any:
        self.device_under_test.now_s += self.device_under_test.costs.admission_s
        tokens = sum(req.tokens for req in reqs)
        return SimpleNamespace(
            reqs=list(reqs),
            extend_num_tokens=tokens,
            extend_lens=[req.tokens for req in reqs],
            prefix_lens=[0] * len(reqs),
        )

    def run_batch(self, batch: Any) -> Any:
        device, costs = self.device_under_test, self.device_under_test.costs
        if costs.plan_waits:
            device.synchronize()
        device.now_s += costs.plan_s
        backend = self._model_runner.attn_backend
        assert backend.owner is None, "a live task's attention state was given to another"
        backend.owner = batch
        for layer in range(self.model.layers):
            for kind, duration_s in (("attention", self.model.attention_s), ("mlp", self.model.mlp_s)):
                assert self._model_runner.attn_backend.owner is batch
                device.launch((batch, kind, layer), duration_s(batch.extend_num_tokens))
                self._executor.checkpoint()
        device.launch((batch, "sample", 0), 20e-6)
        return SimpleNamespace(copy_done=None, backend=backend)

    def process_batch_result(self, batch: Any, result: Any) -> None:
        device = self.device_under_test
        device.now_s = max(device.now_s, result.copy_done.at_s)  # copy_done.synchronize()
        result.backend.owner = None
        device.now_s += device.costs.finish_s / 2
        if device.costs.send_waits:
            device.synchronize()
        device.now_s += device.costs.finish_s / 2
        for request in batch.reqs:
            assert request.answered_s == math.inf, "a request was answered twice"
            request.answered_s = device.now_s
            request.ran_s = result.copy_done.at_s

    # ---- what is watched ------------------------------------------------------------------------------------------

    def _observe(self, shapes: Any, executed_s: float) -> Any:
        self.observed.append((sum(shape.new_tokens for shape in shapes), executed_s))
        return SimpleNamespace(expected_s=0.0, raw_s=0.0)

    def _make_backend(self, init_new_workspace: bool) -> Any:
        self.backends_made += 1
        return SimpleNamespace(owner=None)


def simulate(
    monkeypatch: pytest.MonkeyPatch,
    model: Model,
    requests: Sequence[SimulatedRequest],
    lookahead: int,
    costs: HostCosts | None = None,
    max_suspended: int = 16,
) -> SimulatedScheduler:
    """Run ``requests`` to their answers."""
    device = SimulatedDevice(lookahead, costs or HostCosts())
    monkeypatch.setattr(task_module, "ForwardState", OnlyBackend)
    monkeypatch.setattr(scheduler_module, "time", SimpleNamespace(monotonic=lambda: device.now_s))
    scheduler = SimulatedScheduler(device, model, requests, max_suspended)
    scheduler.run_all()
    for operator in device.operators:
        if operator.label is not None:
            batch, kind, layer = operator.label
            for request in batch.reqs:
                request.trace.append((kind, layer))
    return scheduler
