"""An asynchronous device in virtual time, and FlowPrefill's own hub, executor and policy on top of it.

The host pays for every launch and for every decision; the device runs operators one after the other in the order in
which they were launched, and an operator's result exists only once it has run. Real are ``Hub`` (its turns, its picks,
its deferred finishes), ``Executor`` with its greenlets, ``AttentionSlots``, the policy, and ``QueueDevice``, of which
the simulated device is a subclass as the CUDA device is. Replaced is the engine that they drive: admission, the model's
forward pass, and the processing of a result.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

from sgl_flowprefill.hub.ahead import StepAhead
from sgl_flowprefill.hub.device import POLL_S, QueueDevice
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.hub.parts import OneRank, Recorder
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival, Decoder, NoStreams
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import AS_PREDICTED, Pace
from sgl_flowprefill.policy import ColocatedPolicy, Limits, Policy, make_policy
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.ttft import Prediction, PrefillShape


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
    step_s: float = 600e-6
    """SGLang's preparation of a decode step and the launch of its graph."""


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


@dataclass(frozen=True)
class SimulatedStamp:
    """Like a ``torch.cuda.Event`` with a time."""

    device: SimulatedDevice
    at_s: float

    def query(self) -> bool:
        return self.device.now_s >= self.at_s

    def seconds_until(self, later: SimulatedStamp) -> float:
        return later.at_s - self.at_s


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

    def stamp(self) -> SimulatedStamp:
        return SimulatedStamp(self, max(self.now_s, self.busy_until_s))

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
    logprob_rows: int = 0
    trace: list[tuple[str, int]] = field(default_factory=list)
    """(kind, layer) of each operator that ran for it, in the device's order."""
    ran_s: float = math.inf
    """When the device had its token."""
    answered_s: float = math.inf

    @property
    def prompt(self) -> range:
        return range(id(self), id(self) + self.tokens)  # unlike any other's


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
    """The part of what a switch saves and restores (``ForwardState``) that is there without SGLang."""

    def __init__(self, attn_backend: Any) -> None:
        self._attn_backend = attn_backend

    @classmethod
    def capture(cls, model_runner: Any) -> OnlyBackend:
        return cls(model_runner.attn_backend)

    def with_backend(self, attn_backend: Any) -> OnlyBackend:
        return OnlyBackend(attn_backend)

    def install(self, model_runner: Any) -> None:
        model_runner.attn_backend = self._attn_backend


class Turns(Recorder):
    """Keeps what happens to tasks, and of each suspension since when it could have been known of."""

    def __init__(self) -> None:
        self.suspensions: list[tuple[float, str]] = []
        """When a request could have been read that then took another's place, and its id."""
        self.turns: list[tuple[str, tuple[str, ...]]] = []
        """What became of which requests, in its order."""

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        self.suspensions.append((max(winner.readable_s, news_readable_s), winner.rids[0]))
        self.turns.append(("suspend", tuple(task.rids)))

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        self.turns.append(("resume" if task.has_run else "start", tuple(task.rids)))

    def completed(self, task: PrefillTask, prediction: Prediction) -> None:
        self.turns.append(("complete", tuple(task.rids)))


class ModelTimes:
    """The TTFT model that knows all. Keeps what it is told."""

    correction = yardstick_s = 1.0

    def __init__(self, model: Model) -> None:
        self._model = model
        self.observed: list[tuple[int, float]] = []
        """Tokens and device time of the tasks that completed."""

    def predict(self, batch: Sequence[PrefillShape]) -> Prediction:
        return Prediction(0.0, 0.0, 0.0)

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return self._model.forward_s(sum(shape.new_tokens for shape in batch))

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        return AS_PREDICTED

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        self.observed.append((sum(shape.new_tokens for shape in batch), measured_s))
        return Prediction(0.0, 0.0, 0.0)

    def follow(self) -> bool:
        return False

    def state(self) -> dict[str, float]:
        return {}


class SimulatedEngine:
    """The engine that the hub drives on the simulated device: admission, forward passes, results."""

    is_exiting = False
    is_paused = False

    def __init__(self, device: SimulatedDevice, model: Model, requests: Sequence[SimulatedRequest]) -> None:
        self.device = device
        self.model = model
        self.requests_to_come = deque(sorted(requests, key=lambda request: request.arrival_s))
        self.backends_made = 1
        self.model_runner = SimpleNamespace(
            attn_backend=SimpleNamespace(owner=None),
            _get_attention_backend=self._make_backend,
            kv_index_translator=SimpleNamespace(bind_and_verify_backends=lambda backends: None),
        )
        self.checkpoint: Callable[[], None] = lambda: None
        """Called after each operator."""
        self._waiting: list[SimulatedRequest] = []

    def has_arrivals(self) -> bool:
        return bool(self.requests_to_come) and self.requests_to_come[0].arrival_s <= self.device.now_s

    # ---- what the hub asks of its role ------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        self.device.now_s += self.device.costs.decision_s
        return False

    def arrived(self) -> Iterator[Arrival]:
        while self.has_arrivals():
            request = self.requests_to_come.popleft()
            self._waiting.append(request)
            deadline_s = request.arrival_s + request.ttft_slo_s
            yield Arrival(
                request,
                request.prompt,
                PrefillShape(request.tokens),
                request.arrival_s,
                deadline_s,
                request.arrival_s,
                request.logprob_rows,
            )

    def waiting(self) -> Sequence[SimulatedRequest]:
        return self._waiting

    def abandoned(self, live: Sequence[PrefillTask]) -> Sequence[PrefillTask]:
        return ()

    def match(self, req: SimulatedRequest) -> PrefillShape:
        return PrefillShape(req.tokens)

    def make_batch(self, reqs: Sequence[SimulatedRequest]) -> list[SimulatedRequest]:
        self.device.now_s += self.device.costs.admission_s
        for req in reqs:
            self._waiting.remove(req)
        return list(reqs)

    def requests(self, batch: list[SimulatedRequest]) -> Sequence[SimulatedRequest]:
        return batch

    def shapes(self, batch: list[SimulatedRequest]) -> Sequence[PrefillShape]:
        return [PrefillShape(req.tokens) for req in batch]

    def switch_to(self, task: PrefillTask) -> None:
        pass

    def forward(self, batch: list[SimulatedRequest]) -> Any:
        device, costs = self.device, self.device.costs
        if costs.plan_waits:
            device.synchronize()
        device.now_s += costs.plan_s
        backend = self.model_runner.attn_backend
        assert backend.owner is None, "a live task's attention state was given to another"
        backend.owner = batch
        tokens = sum(req.tokens for req in batch)
        for layer in range(self.model.layers):
            for kind, duration_s in (("attention", self.model.attention_s), ("mlp", self.model.mlp_s)):
                assert self.model_runner.attn_backend.owner is batch
                device.launch((batch, kind, layer), duration_s(tokens))
                self.checkpoint()
        device.launch((batch, "sample", 0), 20e-6)
        return SimpleNamespace(copy_done=None, backend=backend)

    def finish(self, task: PrefillTask) -> None:
        device, result = self.device, task.result
        device.now_s = max(device.now_s, result.copy_done.at_s)  # copy_done.synchronize()
        result.backend.owner = None
        device.now_s += device.costs.finish_s / 2
        if device.costs.send_waits:
            device.synchronize()
        device.now_s += device.costs.finish_s / 2
        for request in task.batch:
            assert request.answered_s == math.inf, "a request was answered twice"
            request.answered_s = device.now_s
            request.ran_s = result.copy_done.at_s

    def drop(self, task: PrefillTask) -> None:
        raise NotImplementedError("nobody leaves")

    def rest(self) -> bool:
        return True

    def _make_backend(self, init_new_workspace: bool) -> Any:
        self.backends_made += 1
        return SimpleNamespace(owner=None)


class SimulatedSteps(Decoder):
    """Decode steps of streams that have no end. Nothing that they sample depends on what the host has read."""

    def __init__(
        self, device: SimulatedDevice, policy: ColocatedPolicy[WaitingRequest, PrefillTask], step_s: float
    ) -> None:
        self.device = device
        self.policy = policy
        self.step_s = step_s
        self.ended_s: list[float] = []

    def step(self) -> DecodeStep:
        begin = self.device.stamp()
        self.policy.began(self.device.now_s)
        self.device.now_s += self.device.costs.step_s
        self.device.launch((self, "step", 0), self.step_s)
        result = SimpleNamespace(copy_done=None)
        self.device.fetch(None, result)
        return DecodeStep(result, spans=[(begin, self.device.stamp())])

    def can_step_ahead(self) -> bool:
        return True

    def finish_step(self, step: DecodeStep) -> None:
        device = self.device
        device.now_s = max(device.now_s, step.result.copy_done.at_s) + device.costs.finish_s
        self.ended_s.append(device.now_s)
        self.policy.stepped(device.now_s, took_s=self.step_s)

    def missing_tokens(self) -> int:
        return 0

    def give_back(self, task: PrefillTask) -> None:
        raise AssertionError("nothing is missing")


class NoTiles:
    """Operators run whole."""

    def follow(self, yardstick_s: float) -> None:
        pass


class SimulatedEvents:
    """Arrivals, at their times; a sleep lasts until the next."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.pending = engine.has_arrivals

    def clear(self) -> None:
        pass

    def sleep(self, timeout_s: float) -> bool:
        raise NotImplementedError("run_all lets time pass")


class SimulatedServer:
    """The hub on the simulated device."""

    def __init__(
        self,
        device: SimulatedDevice,
        model: Model,
        requests: Sequence[SimulatedRequest],
        max_suspended: int = 16,
        policy: Policy[WaitingRequest, PrefillTask] | None = None,
        engine: SimulatedEngine | None = None,
        colocated: ColocatedPolicy[WaitingRequest, PrefillTask] | None = None,
        decoder: Decoder | None = None,
        ahead: StepAhead | None = None,
    ) -> None:
        """``engine``: one for ``requests``, unless there is another. ``colocated``: ``policy`` alone, unless there are
        steps beside it, which ``decoder`` runs, one behind the other where there is ``ahead``.
        """
        self.device = device
        self.engine = engine or SimulatedEngine(device, model, requests)
        self.times = ModelTimes(model)
        self.recorder = Turns()
        events = SimulatedEvents(self.engine)

        def has_news() -> bool:
            return self.hub.has_news()

        model_runner = self.engine.model_runner
        executor = Executor(model_runner, has_news, device, capture=OnlyBackend.capture)
        self.engine.checkpoint = executor.checkpoint
        if policy is None:
            policy = make_policy("s-edf", Limits(max_suspended, max_batch_tokens=1), 60.0)
        memory = TaskMemory(Activations(1, 1, 1, None), math.inf)
        self.hub = Hub(
            role=self.engine,
            work=Work(
                colocated or ColocatedPolicy(policy),
                self.times,
                memory,
                Progress([True, False] * model.layers),
                Tasks(),
            ),
            executor=executor,
            slots=AttentionSlots(model_runner, None),
            device=device,
            agreement=OneRank(has_news),
            events=events,
            recorder=self.recorder,
            tiles=NoTiles(),
            now_s=lambda: device.now_s,
            decoder=decoder or NoStreams(),
            ahead=ahead,
        )

    def run_all(self) -> None:
        while True:
            if self.hub.turn():
                continue
            if not self.engine.requests_to_come:
                return
            self.device.now_s = max(self.device.now_s, self.engine.requests_to_come[0].arrival_s)


def simulate(
    model: Model,
    requests: Sequence[SimulatedRequest],
    lookahead: int,
    costs: HostCosts | None = None,
    max_suspended: int = 16,
) -> SimulatedServer:
    """Run ``requests`` to their answers."""
    server = SimulatedServer(SimulatedDevice(lookahead, costs or HostCosts()), model, requests, max_suspended)
    server.run_all()
    for operator in server.device.operators:
        if operator.label is not None:
            batch, kind, layer = operator.label
            for request in batch:
                request.trace.append((kind, layer))
    return server
