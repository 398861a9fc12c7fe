"""A prefill instance under FlowPrefill: the runtime's own hub in simulated time, with the same policy."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final, Generic, TypeVar, cast

from sgl_flowprefill.bench.simulator.checkpoints import Checkpoints, Preemption
from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.instance import STEADY, Instance, KvCache, Machine, Slowdown
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.hub.device import CpuDevice, HostStamp
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.hub.parts import TTFT, OneRank, Recorder, blocked_since_s
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival, Decoder, NoStreams
from sgl_flowprefill.hub.task import PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Act, ColocatedPolicy, Policy
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import Prediction, PrefillShape


class SimShape(PrefillShape):
    """What a request costs, and what the policy believes that it takes alone."""

    predicted_s: float
    alone_s: float
    """What it takes alone."""

    @classmethod
    def of(cls, request: SimRequest, cost: CostModel) -> SimShape:
        shape = cls(*request.shape)
        shape.predicted_s = request.predicted_s
        shape.alone_s = cost.predict_s((shape,))
        return shape


class SimBatch:
    """Requests that are computed together in one forward pass, whose result is on the host at its end."""

    copy_done = None
    __slots__ = ("checkpoints", "duration_s", "executed_s", "lost_s", "requests", "shapes")

    def __init__(
        self, requests: Sequence[SimRequest], shapes: Sequence[SimShape], duration_s: float, checkpoints: Checkpoints
    ) -> None:
        self.requests = requests
        self.shapes = shapes
        self.duration_s = duration_s
        self.checkpoints = checkpoints
        self.executed_s = 0.0
        """What has been computed of ``duration_s``, by the machine as fast as at first."""
        self.lost_s = 0.0
        """What that took more than ``executed_s``, because the machine has become slower."""


class SimTTFT:
    """The cost model of the machine as it is now, off by as much as the predictions of the requests: an oracle, unless
    they are off. It learns nothing from tasks.
    """

    yardstick_s = 1.0
    """By which tiles would be planned: operators run whole here."""

    def __init__(self, engine: SimEngine, cost: CostModel, slowdown: Slowdown) -> None:
        self._engine = engine
        self._cost = cost
        self._slowdown = slowdown
        self._pace = Pace()

    @property
    def correction(self) -> float:
        return self._pace.factor

    def predict(self, batch: Sequence[PrefillShape]) -> Prediction:
        return UNOBSERVED

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return self._pace.factor * self._at_first_s(cast(Sequence[SimShape], batch))

    def _at_first_s(self, shapes: Sequence[SimShape]) -> float:
        if len(shapes) == 1:
            return shapes[0].predicted_s
        predicted_s = alone_s = 0.0
        for shape in shapes:
            predicted_s += shape.predicted_s
            alone_s += shape.alone_s
        return predicted_s / alone_s * self._cost.predict_s(shapes)

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        return self._pace

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        return UNOBSERVED

    def follow(self) -> bool:
        before, self._pace.factor = self._pace.factor, self._slowdown.factor_at(self._engine.now_s)
        return self._pace.factor != before

    def state(self) -> dict[str, float]:
        return {}


UNOBSERVED: Final = Prediction(0.0, 0.0, 0.0)


def objective_of(request: SimRequest) -> Objective:
    """What ``request`` is promised."""
    return Objective(request.deadline_s - request.arrival_s, request.tbt_slo_s)


class SimEngine:
    """The engine that the hub of an instance drives: KV cache, and forward passes that take their time."""

    is_exiting = False
    is_paused = False

    def __init__(
        self,
        machine: Machine,
        preemption: Preemption,
        kv: KvCache | None = None,
        forward_error: float = 0.0,
    ) -> None:
        """``forward_error``: standard deviation of the logarithm of the times of forwards around the cost model's."""
        self.now_s = 0.0
        self.kv = kv or KvCache(machine)
        self.completed: list[SimRequest] = []
        self._cost = machine.cost
        self._preemption = preemption
        self._forward_error = forward_error
        self._come: list[Arrival] = []
        """Requests that the hub has not been told of."""
        self._waiting: dict[SimRequest, SimShape] = {}

    def come(self, request: SimRequest, readable_s: float, number: int | None = None) -> None:
        """``request`` can be started from ``readable_s`` on, which is news; ``number``: the one that it had before."""
        shape = SimShape.of(request, self._cost)
        arrival = Arrival(request, (), shape, request.arrival_s, request.deadline_s, readable_s, number=number)
        self._come.append(arrival._replace(objective=objective_of(request)))

    def take_news(self, stalls_due: bool) -> bool:
        return self.kv.release(self.now_s)

    def arrived(self) -> Sequence[Arrival]:
        come, self._come = self._come, []
        for arrival in come:
            self._waiting[arrival.req] = cast(SimShape, arrival.shape)
        return come

    def waiting(self) -> Collection[SimRequest]:
        return self._waiting

    def abandoned(self, live: Sequence[PrefillTask]) -> Sequence[PrefillTask]:
        return ()

    def match(self, req: SimRequest) -> PrefillShape:
        return self._waiting[req]

    @property
    def checkpoints(self) -> int:
        """Preemption checkpoints of a forward pass."""
        return Checkpoints(1.0, self._cost.layers, 0.5, self._preemption).total

    def make_batch(self, reqs: Sequence[SimRequest]) -> SimBatch | None:
        reqs = reqs[: self.kv.fitting(reqs)]
        if not reqs:
            return None
        self.kv.take(reqs)
        for req in reqs:
            self.kv.send(req, req.shape.cached_tokens, self.now_s)
        shapes = [self._waiting.pop(req) for req in reqs]
        duration_s, attention_share = self._cost.forward(shapes)
        if self._forward_error:  # by the request, so that all policies meet the same
            duration_s *= random.Random(reqs[0].index).lognormvariate(0.0, self._forward_error)
        checkpoints = Checkpoints(duration_s, self._cost.layers, attention_share, self._preemption)
        return SimBatch(reqs, shapes, duration_s, checkpoints)

    def requests(self, batch: SimBatch) -> Sequence[SimRequest]:
        return batch.requests

    def shapes(self, batch: SimBatch) -> Sequence[PrefillShape]:
        return batch.shapes

    def switch_to(self, task: PrefillTask) -> None:
        pass

    def forward(self, batch: SimBatch) -> Any:
        raise NotImplementedError("the instance lets time pass instead")

    def finish(self, task: PrefillTask) -> None:
        self.kv.transfer(task.batch.requests, self.now_s)
        self.completed.extend(task.batch.requests)

    def drop(self, task: PrefillTask) -> None:
        raise NotImplementedError("nobody leaves")

    def rest(self) -> bool:
        return True


class Unlimited:
    """Parts of a hub that an instance has none of: executor, attention state, activations, tiles, sockets."""

    points_passed = 0

    def __init__(self) -> None:
        self.interrupted: Callable[[], bool] = self.pending

    def run(self, task: PrefillTask, forward: Callable[[Any], Any]) -> None:
        raise NotImplementedError("the instance lets time pass instead")

    def cancel(self, task: PrefillTask) -> None:
        pass

    def take(self) -> None:
        return None

    def give_back(self, backend: None) -> None:
        pass

    def admits(self, live_tokens: Sequence[int], new_tokens: int, logprob_rows: int = 0) -> bool:
        return True

    def follow(self, yardstick_s: float) -> None:
        pass

    def pending(self) -> bool:
        return False

    def clear(self) -> None:
        pass

    def sleep(self, timeout_s: float) -> bool:
        return False


class Blocking(Recorder):
    """Keeps how long the winner of each preemption was blocked, as the event log has it."""

    def __init__(self) -> None:
        self.blocking_s: list[float] = []
        self.switches_without_news = 0
        """Beside the preemptions."""

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        since_s = blocked_since_s(winner, now_s, news_readable_s)
        if since_s is None:
            self.switches_without_news += 1
        else:
            self.blocking_s.append(now_s - since_s)


EngineT = TypeVar("EngineT", bound=SimEngine)


class HubInstance(Instance, Generic[EngineT]):
    """Lets time pass between the turns of a hub: the task that it picks runs to its end, or to the first preemption
    checkpoint after something has happened.
    """

    def __init__(
        self,
        engine: EngineT,
        policy: ColocatedPolicy[WaitingRequest, PrefillTask],
        machine: Machine,
        ttft: TTFT | None,
        hub_s: float,
        recorder: Blocking | None,
        decoder: Decoder | None = None,
    ) -> None:
        """``ttft``: what predicts; without one, an oracle. ``decoder``: the engine, where it has streams."""
        self.engine = engine
        self.policy = policy
        self._recorder = recorder or Blocking()
        parts = Unlimited()
        self.hub = Hub(
            role=engine,
            work=Work(
                policy,
                ttft or SimTTFT(engine, machine.cost, machine.slowdown),
                parts,
                Progress([False] * engine.checkpoints),
                Tasks(),
            ),
            executor=parts,
            slots=parts,
            device=CpuDevice(),
            agreement=OneRank(parts.pending),
            events=parts,
            recorder=self._recorder,
            tiles=parts,
            now_s=lambda: engine.now_s,
            decoder=decoder or NoStreams(),
        )
        self._hub_s = hub_s
        self._slowdown = machine.slowdown
        self._follows = ttft is None and machine.slowdown != STEADY
        """An oracle knows at once that the machine has changed; what learns is followed where a task ends."""
        self._running: PrefillTask | None = None
        self._resumed_s = 0.0
        """When ``_running`` was resumed."""
        self._stop_elapsed_s = 0.0
        self._stop_s = math.inf
        """When ``_running`` comes back to the hub next, after running for ``_stop_elapsed_s`` in all."""
        self.next_s = math.inf

    @property
    def now_s(self) -> float:
        return self.engine.now_s

    @now_s.setter
    def now_s(self, now_s: float) -> None:
        self.engine.now_s = now_s

    @property
    def completed(self) -> list[SimRequest]:  # type: ignore[override]
        return self.engine.completed

    @property
    def blocking(self) -> Blocking:
        """How long the winners of preemptions were blocked."""
        return self._recorder

    def submit(self, request: SimRequest, now_s: float) -> None:
        if not self.engine.kv.can_hold(request):
            self.engine.completed.append(request)
            return
        self.now_s = now_s
        self.engine.come(request, request.ready_s)
        self._look_soon()

    def step(self) -> None:
        self.now_s = self.next_s
        if self._running is not None and self.now_s < self._stop_s:
            self._look_soon()
            return
        if self._running is not None:
            self._stop(self._running)
        self._turn()

    def _look_soon(self) -> None:
        """Something has happened: the hub takes its next turn now, or when the task that runs has stopped."""
        if self._running is None:
            self._turn()
        else:
            self._stop_soon(self._running)

    def _turn(self) -> None:
        """Run what the hub picks."""
        if self._follows:
            self.hub.work.follow()
        task = self.hub.next_task()
        if task is Act.STEP:
            self._begin_step()
        else:
            self._run(task)

    def _begin_step(self) -> None:
        raise NotImplementedError("a prefill instance has no streams")

    def _run(self, task: PrefillTask | None) -> None:
        """``task`` runs, or nothing does."""
        self._running = task
        self.next_s = self.engine.kv.next_release_s if self.hub.kv_is_short else math.inf
        if task is not None:
            self._resumed_s = self.now_s + self._hub_s
            self._stop_at(task, task.batch.duration_s)
            self.next_s = min(self.next_s, self._stop_s, max(self.hub.ask_again_s, self.now_s))
        else:
            self.engine.rest()
            if self.hub.kv_is_short:  # as long as a server sleeps that waits for others
                self.next_s = min(self.next_s, self.now_s + self.hub.stall_check_s)

    def _stop(self, task: PrefillTask) -> None:
        """``task`` comes back to the hub."""
        task.has_run = True
        batch: SimBatch = task.batch
        if self._stop_s > self._slowdown.from_s:
            batch.lost_s += self._stop_s - self._resumed_s - (self._stop_elapsed_s - batch.executed_s)
        batch.executed_s = self._stop_elapsed_s
        task.spans = [(HostStamp(0.0), HostStamp(batch.executed_s + batch.lost_s))]
        task.done = batch.executed_s >= batch.duration_s
        task.operators_passed = batch.checkpoints.total if task.done else batch.checkpoints.passed(batch.executed_s)
        task.result = batch
        self.hub.stopped(task)

    def _stop_soon(self, task: PrefillTask) -> None:
        """``task``, which runs, comes back at its next preemption checkpoint."""
        batch: SimBatch = task.batch
        work_s = self._slowdown.work_s
        elapsed_s = batch.executed_s + max(0.0, work_s(self.now_s) - work_s(self._resumed_s))
        self._stop_at(task, min(self._stop_elapsed_s, batch.checkpoints.next_stop_s(elapsed_s)))
        self.next_s = self._stop_s

    def _stop_at(self, task: PrefillTask, elapsed_s: float) -> None:
        self._stop_elapsed_s = elapsed_s
        self._stop_s = self._slowdown.end_s(self._resumed_s, elapsed_s - task.batch.executed_s)


class FlowPrefillInstance(HubInstance[SimEngine]):
    """A prefill instance."""

    def __init__(
        self,
        machine: Machine,
        policy: Policy[WaitingRequest, PrefillTask],
        preemption: Preemption,
        hub_s: float = 0.0,
        recorder: Blocking | None = None,
        ttft: TTFT | None = None,
        forward_error: float = 0.0,
    ) -> None:
        """``ttft``: as ``HubInstance``."""
        engine = SimEngine(machine, preemption, forward_error=forward_error)
        super().__init__(engine, ColocatedPolicy(policy), machine, ttft, hub_s, recorder)
