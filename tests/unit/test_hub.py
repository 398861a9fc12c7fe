"""Parts of the hub by themselves: what SGLang's watchdogs see of it, and requests whose grammars are being compiled."""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.invariant_checker import create_scheduler_watchdog

from sgl_flowprefill import plugin
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import CpuDevice, HostStamp
from sgl_flowprefill.hub.parts import Learning, OneRank
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.shedding import Shedding
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Act, ColocatedPolicy, DecodeLimits, Job, Limits, Stream, make_policy
from sgl_flowprefill.profiling.steps import LinearSteps
from sgl_flowprefill.runtime.decode_scheduler import DecodeScheduler
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.hub_scheduler import feed_watchdogs
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.scheduler_role import input_logprobs
from sgl_flowprefill.runtime.unified_role import UnifiedRole
from sgl_flowprefill.runtime.unified_scheduler import UnifiedScheduler
from sgl_flowprefill.runtime.wakeup import Wakeup
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import YARDSTICK, AdaptiveTTFT, PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


def with_role(**attributes: Any) -> Any:
    """A scheduler of which only its role and ``attributes`` are there."""
    scheduler: Any = FlowPrefillScheduler.__new__(FlowPrefillScheduler)
    scheduler.__dict__.update({"enable_hierarchical_cache": False} | attributes)
    slo_s = FlowPrefillConfig().default_ttft_slo
    agreement = OneRank(lambda: False)
    scheduler.role = PrefillRole(scheduler, slo_s, Tasks(), Wakeup(), CpuDevice(), agreement, EventRecorder(None))
    return scheduler


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline_s = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    return condition()


@pytest.mark.parametrize("point", [Executor.checkpoint, Executor.between_tiles])
def test_a_watchdog_is_fed_by_interruption_points_and_notices_when_none_is_passed(
    point: Callable[[Executor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[float] = []
    monkeypatch.setattr("sglang.srt.utils.watchdog.pyspy_dump_schedulers", lambda: dumps.append(time.monotonic()))
    executor = Executor(SimpleNamespace(), lambda: False)
    executor.running = SimpleNamespace(operators_passed=0, points_passed=0)  # type: ignore[assignment]
    scheduler: Any = SimpleNamespace(
        forward_ct=1, cur_batch_for_debug=object(), is_initializing=False, hub=SimpleNamespace(executor=executor)
    )
    for name in ("watchdog", "soft_watchdog"):
        scheduler.__dict__[name] = create_scheduler_watchdog(scheduler, watchdog_timeout=0.4, soft=True)
        scheduler.__dict__[name].dump_info = None
    feed_watchdogs(scheduler)
    try:
        for _ in range(60):  # one forward pass for three times as long as a watchdog waits
            point(executor)
            time.sleep(0.02)
        assert not dumps
        assert wait_until(lambda: len(dumps) >= 2)
    finally:
        scheduler.cur_batch_for_debug = None


@pytest.mark.parametrize(
    ("mode", "expected"), [("prefill", FlowPrefillScheduler), ("null", UnifiedScheduler), ("decode", DecodeScheduler)]
)
def test_servers_that_prefill_get_another_scheduler_than_sglangs(
    mode: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the function that SGLang calls before it makes its scheduler."""
    from sglang.srt.managers import scheduler as sglang_scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: dict[str, Any] = {}
    monkeypatch.setattr(plugin, "expect", lambda *parts: None)  # of what is not SGLang's own here
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.setdefault(target, hook))
    monkeypatch.setattr(sglang_scheduler, "Scheduler", Scheduler)
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "1")
    plugin.take_scheduler_seams(FlowPrefillConfig())
    hooks[plugin.BEFORE_IT_IS_MADE](SimpleNamespace(disaggregation_mode=mode), gpu_id=0)
    assert sglang_scheduler.Scheduler is expected


def test_without_a_soft_watchdog_there_is_one() -> None:
    watchdog = SimpleNamespace()
    hub = SimpleNamespace(executor=SimpleNamespace(points_passed=4))
    feed_watchdogs(SimpleNamespace(watchdog=watchdog, forward_ct=3, hub=hub))
    assert watchdog.get_counter() == 7


def test_a_recorder_hears_of_decisions_by_when_it_wants_to_while_a_prefill_runs_without_an_event() -> None:
    request = SimulatedRequest("long", 0.0, 1000, 100.0)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), Model(40, lambda _: 0.05, lambda _: 0.05), [request])
    told_s: list[float] = []

    def decided(cost_s: float, now_s: float) -> float:
        told_s.append(now_s)
        return now_s + 0.5

    server.recorder.decided = decided  # type: ignore[method-assign]
    server.run_all()
    assert 4.0 < server.device.now_s < 4.5
    assert len(told_s) >= 8
    assert all(0.5 <= after - before < 0.65 for before, after in pairwise(told_s))


def test_a_winner_starts_without_those_that_do_not_fit_beside_it() -> None:
    """Where activations of all that would join it exceed what is left beside a live task."""
    requests = [SimulatedRequest(f"r{i}", 0.0, tokens, 100.0) for i, tokens in enumerate([64, 100, 1900, 70])]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=10_000)
    hub.look()
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None)
    hub.work.tasks.live = [SimpleNamespace(new_tokens=30_000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]

    def chosen(room_tokens: int) -> list[int]:
        """Prompts that start together, beside a live task and ``room_tokens`` more."""
        budget_bytes = activations.running_bytes(30_000) + activations.suspended_bytes(room_tokens)
        hub.work.memory = TaskMemory(activations, budget_bytes)
        choice = hub.choose()
        return [job.item.req.tokens for job in choice] if isinstance(choice, list) else []

    everything = chosen(10_000)
    assert sorted(everything) == [64, 70, 100, 1900]
    for kept in range(1, 5):
        assert chosen(sum(everything[:kept])) == everything[:kept]
    assert chosen(everything[0] - 1) == []


def test_log_probabilities_of_a_long_prompt_keep_it_from_starting_where_they_would_not_fit() -> None:
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None, logits=1000)
    for logprob_rows in (0, 64):
        requests = [SimulatedRequest("r", 0.0, 64, 100.0, logprob_rows=logprob_rows)]
        hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
        hub.look()
        hub.work.tasks.live = [SimpleNamespace(new_tokens=1000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]
        hub.work.memory = TaskMemory(activations, activations.running_bytes(1000) + 64 * 4)
        assert isinstance(hub.choose(), list) == (logprob_rows == 0)


def test_log_probabilities_are_asked_for_from_a_token_of_the_prompt_on() -> None:
    req = SimpleNamespace(origin_input_ids=range(64), return_logprob=True, logprob_start_len=-1)
    assert input_logprobs(req) == 0
    req.logprob_start_len = 10
    assert input_logprobs(req) == 54
    req.return_logprob = False
    assert input_logprobs(req) == 0


class Steps:
    """The decode steps of a hub on the simulated device: 10 ms each."""

    def __init__(self, hub: Any, late: bool) -> None:
        """``late``: their results come when the device has run them; otherwise the host waits."""
        self._hub = hub
        self._late = late
        self.begun_s: list[float] = []

    def step(self) -> DecodeStep:
        device = self._hub.device
        self.begun_s.append(device.now_s)
        self._hub.work.colocated.began(device.now_s)
        device.launch("step", 0.01)
        result = SimpleNamespace(copy_done=None)
        if self._late:
            device.fetch(None, result)
        else:
            device.synchronize()
        return DecodeStep(result)

    def finish_step(self, step: DecodeStep) -> None:
        assert self._hub.device.now_s >= self.begun_s[-1] + 0.01
        self._hub.work.colocated.stepped(self._hub.device.now_s)

    def missing_tokens(self) -> int:
        return 0

    def give_back(self, task: Any) -> None:
        raise AssertionError("nothing is missing")


@pytest.mark.parametrize("late", [False, True])
def test_streams_get_their_steps_while_started_tasks_run_to_their_ends(late: bool) -> None:
    model = Model(100, lambda tokens: 0.01, lambda tokens: 0.01)
    requests = [SimulatedRequest("r", 0.0, 100, 60.0)]
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits(margin_s=0.02))
    hub.decoder = steps = Steps(hub, late)
    hub.executor.interrupted = hub.executor.ends_waiting = hub.has_news  # type: ignore[attr-defined]
    hub.work.colocated.joined([Stream(0.1, 100, 0.0)])
    assert hub.turn()
    [task] = hub.work.tasks.live
    assert 0.06 <= hub.now_s() <= 0.09, "it came back for the step, and ran until then"
    hub.finish_started()
    assert task.done
    assert not hub.work.tasks
    gaps_s = [later - earlier for earlier, later in pairwise(steps.begun_s)]
    assert len(gaps_s) >= 20
    assert max(gaps_s) <= 0.1
    asked = 2 * len(steps.begun_s) if late else len(steps.begun_s)
    assert len(task.spans) <= asked + 2, "it comes back for a step or its result, not at each preemption checkpoint"


def test_kv_cache_that_a_step_frees_is_used_at_once() -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    request = SimulatedRequest("r", 0.0, 100, 60.0)
    server = SimulatedServer(SimulatedDevice(2, HostCosts()), model, [request])
    hub, engine, stream = server.hub, server.engine, Stream(0.1, 100, 0.0)
    colocated = hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits())
    make_batch = engine.make_batch
    freed: list[bool] = []

    class LastStep(Steps):
        def finish_step(self, step: DecodeStep) -> None:
            colocated.stepped(hub.now_s(), [stream])
            freed.append(True)

    engine.make_batch = lambda reqs: None if colocated.streams.requests else make_batch(reqs)  # type: ignore[method-assign, assignment, return-value]
    engine.take_news = lambda stalls_due: bool(freed and freed.pop())  # type: ignore[method-assign]
    hub.decoder = LastStep(hub, late=True)
    colocated.joined([stream])
    for _ in range(20):
        if request.answered_s < math.inf:
            return
        assert hub.turn(), "it sleeps, although there is KV cache for what waits"
    raise AssertionError("the request is not answered")


def test_a_retracted_stream_that_does_not_fit_lets_others_start_in_the_end_and_starts_when_it_fits() -> None:
    requests = [SimulatedRequest("back", 0.0, 100, 2.0), SimulatedRequest("urgent", 0.5, 100, 60.0)]
    device = SimulatedDevice(0, HostCosts(0.0, 0.0, 0.0, 0.0, 0.0))
    server = SimulatedServer(device, Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), requests)
    hub, engine = server.hub, server.engine
    hub.work.policy.limits, hub.stall_check_s = Limits(16, 1), math.inf
    arrived, make_batch = engine.arrived, engine.make_batch
    asked: list[str] = []
    has_room = False

    def admit(reqs: Any) -> Any:
        asked.append(reqs[0].rid)
        return make_batch(reqs) if has_room or reqs[0].rid == "urgent" else None

    engine.arrived = lambda: (one._replace(retracted=one.req.rid == "back") for one in arrived())  # type: ignore[method-assign]
    engine.make_batch = admit  # type: ignore[method-assign]
    for now_s in (1.0, 1.5, 1.9):
        device.now_s = now_s
        assert hub.next_task() is None
    assert asked == ["back"], "nobody takes what may be freed for it"
    device.now_s, has_room = 2.0, True
    assert hub.next_task().rids == ["urgent"]  # type: ignore[union-attr]
    server.run_all()
    assert asked == ["back", "urgent", "back"]
    assert all(request.answered_s < math.inf for request in requests)


@pytest.mark.parametrize(("tokens", "starts"), [(10, True), (1000, False)])
def test_who_comes_while_kv_cache_is_short_for_another_starts_if_it_needs_less(tokens: int, starts: bool) -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 60.0), SimulatedRequest("comes", 1.0, tokens, 5.0)]
    device = SimulatedDevice(0, HostCosts())
    server = SimulatedServer(device, Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), requests)
    hub, make_batch = server.hub, server.engine.make_batch
    asked: list[str] = []

    def admit(reqs: Any) -> Any:
        asked.append(reqs[0].rid)
        return None if reqs[0].tokens >= 1000 else make_batch(reqs)

    server.engine.make_batch = admit  # type: ignore[method-assign]
    hub.stall_check_s = math.inf
    assert hub.next_task() is None
    device.now_s = 1.0
    assert (hub.next_task() is not None) == starts
    assert asked == (["long", "comes"] if starts else ["long"])


def test_others_start_once_the_turn_of_a_retracted_stream_is_over_although_a_prefill_runs_without_an_event() -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 100.0), SimulatedRequest("back", 1.0, 100, 2.0)]
    requests.append(SimulatedRequest("urgent", 1.5, 10, 10.0))
    model = Model(100, lambda tokens: tokens * 5e-5, lambda tokens: tokens * 5e-5)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests)
    engine = server.engine
    arrived, make_batch = engine.arrived, engine.make_batch
    engine.arrived = lambda: (one._replace(retracted=one.req.rid == "back") for one in arrived())  # type: ignore[method-assign]

    def admit(reqs: Any) -> Any:
        long_runs = any(task.rids == ["long"] for task in server.hub.work.tasks.live)
        return None if reqs[0].rid == "back" and long_runs else make_batch(reqs)

    engine.make_batch = admit  # type: ignore[method-assign]
    server.hub.stall_check_s = math.inf
    server.run_all()
    assert 3.0 < requests[2].answered_s < 3.5 < requests[0].answered_s < requests[1].answered_s < math.inf


@pytest.mark.parametrize("streams", [1, 2])
def test_a_step_that_lacks_kv_cache_waits_for_the_result_of_a_prefill_where_no_stream_can_give_up_its_own(
    streams: int,
) -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    request = SimulatedRequest("r", 0.0, 100, 60.0)
    hub = SimulatedServer(SimulatedDevice(2, HostCosts()), model, [request]).hub
    colocated = hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits())

    class Short(Steps):
        def missing_tokens(self) -> int:
            return len(hub.work.tasks.finishing)

    hub.decoder = steps = Short(hub, late=True)
    colocated.joined([Stream(0.1, 100, 0.0) for _ in range(streams)])
    colocated.began(0.0)
    colocated.stepped(0.0)
    while not hub.work.tasks.finishing:
        assert hub.turn()
    assert request.answered_s == math.inf
    hub.step()
    assert (request.answered_s <= steps.begun_s[0]) == (streams == 1)


def test_a_task_takes_over_the_number_of_the_request_it_is_started_for() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 1.0) for i in range(2)]
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.look()
    winner = hub.work.policy.first_waiting(0.0, 2)[1]
    task = hub.start([winner])
    assert task is not None
    assert task.job.number == winner.number


def test_many_waiting_requests_are_looked_at_in_turns_for_those_whose_decode_server_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[int] = []

    def drop_negative(scheduler: Any) -> None:
        looks.append(len(scheduler.waiting_queue))
        scheduler.waiting_queue = [number for number in scheduler.waiting_queue if number >= 0]

    monkeypatch.setattr(Scheduler, "resolve_waiting_queue_bootstrap", drop_negative)
    numbers = [number if number % 3 else -number - 1 for number in range(2000)]
    scheduler = with_role(waiting_queue=list(numbers))
    for _ in range(4):
        scheduler.role.drop_stalled()
    assert max(looks) <= 512
    assert sorted(scheduler.waiting_queue) == [number for number in numbers if number >= 0]


@dataclass(eq=False)
class Bootstrapping:
    """A request that has not bootstrapped."""

    bootstrap_room: int
    is_ready: bool = False

    @property
    def rid(self) -> str:
        return f"r{self.bootstrap_room}"


@dataclass
class BootstrapQueue:
    """SGLang's queue of them. Counts what it is asked to look at."""

    queue: list[Bootstrapping]
    looked_at: int = 0

    def pop_bootstrapped(self) -> list[Bootstrapping]:
        self.looked_at += len(self.queue)
        ready = [req for req in self.queue if req.is_ready]
        self.queue = [req for req in self.queue if not req.is_ready]
        return ready


def test_of_many_requests_without_a_place_at_a_decode_server_those_are_looked_at_of_which_something_was_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Scheduler, "process_disagg_prefill_inflight_queue", lambda scheduler: [])
    monkeypatch.setattr(Scheduler, "resolve_waiting_queue_bootstrap", lambda scheduler: None)
    reqs = [Bootstrapping(room) for room in range(5000)]
    queue, buffers = BootstrapQueue(list(reqs)), SimpleNamespace(available_size=lambda: 9)
    role = with_role(
        waiting_queue=[],
        disagg_prefill_bootstrap_queue=queue,
        disagg_prefill_inflight_queue=[],
        req_to_metadata_buffer_idx_allocator=buffers,
        grammar_manager=Grammars(),
    ).role
    monkeypatch.setattr(role, "take_messages", lambda: False)
    bootstrapped: list[Bootstrapping] = []

    def may_start(queued: list[Bootstrapping]) -> list[Bootstrapping]:
        bootstrapped.extend(queued)
        return []

    monkeypatch.setattr(role, "may_start", may_start)

    def look(stalls_due: bool = False) -> tuple[int, list[int]]:
        """How many requests are looked at, and the rooms of those that have bootstrapped."""
        queue.looked_at = 0
        bootstrapped.clear()
        role.take_news(stalls_due)
        assert not list(role.arrived())
        return queue.looked_at, [req.bootstrap_room for req in bootstrapped]

    assert look() == (5000, []), "all are new"
    assert look() == (0, [])
    reqs[7].is_ready = True
    role.note_transfer_status(7, KVPoll.WaitingForInput)
    assert look() == (1, [7])
    reqs[8].is_ready = True
    assert look() == (0, []), "nobody has told of it"
    assert look(stalls_due=True) == (4999, [8])
    role.note_transfer_status(9, KVPoll.WaitingForInput)
    assert look() == look() == (1, []), "another rank, or a buffer, is waited for"
    reqs[9].is_ready = True
    assert look() == (1, [9])
    role.note_transfer_status(9, KVPoll.Success)
    queue.queue += [Bootstrapping(5000), Bootstrapping(5001, is_ready=True)]
    assert look() == (2, [5001])
    role.note_abort("r4999", abort_all=False)
    reqs[4999].is_ready = True  # SGLang takes it out in the same way
    assert look() == (1, [4999])
    role.note_transfer_status(6000, KVPoll.WaitingForInput)
    assert look() == (0, []), "it has not come"
    queue.queue += [Bootstrapping(6000)]
    assert look() == look() == (1, []), "it bootstrapped here before it came, and not at another rank"
    queue.queue[-1].is_ready = True
    assert look() == (1, [6000])
    buffers.available_size = lambda: 0
    queue.queue += [Bootstrapping(5002)]
    assert look() == look() == (1, []), "it may be for want of a buffer that it has not bootstrapped"
    assert len(queue.queue) == len(set(queue.queue)) == 4998
    gone = queue.queue.pop(0)
    role.note_transfer_status(gone.bootstrap_room, KVPoll.Failed)
    assert look() == (1, [])
    assert gone not in queue.queue
    queue.queue.clear()
    assert look() == (0, [])
    queue.queue.append(reqs[0])
    assert look() == (1, [])


def test_a_bootstrap_whose_request_never_comes_is_forgotten() -> None:
    queue = [SimpleNamespace(bootstrap_room=7)]
    role = with_role(disagg_prefill_bootstrap_queue=SimpleNamespace(queue=queue)).role
    for room in (7, 8):
        role.note_transfer_status(room, KVPoll.WaitingForInput)
    role.forget_rooms()
    assert list(role.bootstrapped_s) == [7]


def test_a_bootstrap_that_begins_is_no_event() -> None:
    role = with_role().role
    role.note_transfer_status(7, KVPoll.Bootstrapping)
    assert not role.wakeup.pending
    role.note_transfer_status(7, KVPoll.WaitingForInput)
    assert role.wakeup.pending


def test_all_health_checks_are_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each HTTP worker of a server sends its own, and nothing else may happen for the rest of a long prefill."""
    sent: list[Any] = []
    channels = SimpleNamespace(send_to_tokenizer=SimpleNamespace(send_output=sent.append))
    scheduler = with_role(
        return_health_check_ipcs=deque(["one", "another"]),
        ipc_channels=channels,
        rust_server=None,
        grammar_manager=Grammars(),
    )
    monkeypatch.setattr(Scheduler, "ingest_requests", lambda scheduler: None)
    scheduler.role.take_messages()
    assert [output.http_worker_ipc for output in sent] == ["one", "another"]


class LongQueue(list[Any]):
    """Counts what is looked at of it."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for req in super().__iter__():
            self.looked_at += 1
            yield req

    def __reversed__(self) -> Iterator[Any]:
        for req in super().__reversed__():
            self.looked_at += 1
            yield req


def test_the_hub_is_told_of_requests_without_a_look_at_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler: Any = SimpleNamespace(
        enable_hierarchical_cache=False, waiting_queue=LongQueue(object() for _ in range(10_000))
    )
    parts = (FlowPrefillConfig().default_ttft_slo, Tasks(), Wakeup(), CpuDevice(), OneRank(lambda: False))
    role: Any = UnifiedRole(scheduler, *parts, EventRecorder(None))  # type: ignore[arg-type]
    monkeypatch.setattr(role, "as_arrival", lambda req: req)
    monkeypatch.setattr(role, "take_messages", lambda: False)
    queue, known = scheduler.waiting_queue, scheduler.waiting_queue[:]

    def come(*reqs: object) -> None:
        for req in reqs:
            queue.append(req)
            role.note_queued(req)

    role.streams["a stream"] = Stream(0.1, 10, 0.0)  # which may free KV cache for what was given back
    come("first", "second")
    role.held_back.append("given back")
    queue.insert(10_000, "given back")
    role.take_news(stalls_due=False)
    assert len(role.waiting()) == 10_000
    assert list(role.arrived()) == ["first", "second"]
    assert len(role.waiting()) == 10_002
    assert queue.looked_at < 20
    assert list(role.waiting()) == [*known, "first", "second"]
    come("aborted", "third")
    for req in ("given back", "aborted"):
        queue.remove(req)
    role.take_news(stalls_due=False)
    assert len(role.waiting()) == 10_002
    assert (list(role.arrived()), role.held_back) == (["third"], [])
    assert list(role.waiting()) == [*known, "first", "second", "third"]


class Grammars(GrammarManager):
    """SGLang's queue of requests whose grammars are compiled, without a backend."""

    def __init__(self) -> None:
        self.grammar_queue = []
        self.grammar_backend = SimpleNamespace(set_cache=lambda key, grammar: None)
        self.pp_rank, self.pp_size, self.grammar_sync_size = 0, 1, 1
        self.SGLANG_GRAMMAR_POLL_INTERVAL = 0.005
        self.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS = 10_000

    def request(self, received_s: float | None = None) -> Any:
        stats = SimpleNamespace(flowprefill_received_s=time.monotonic() if received_s is None else received_s)
        req = SimpleNamespace(grammar=Future(), grammar_key=("regex", ""), grammar_wait_ct=0, time_stats=stats)
        req.finished, req.failures = lambda: False, []
        req.set_finish_with_abort = req.failures.append
        return req


@pytest.fixture
def scheduler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A scheduler whose input is put into the queue of grammars."""

    def process(scheduler: Any, recv_reqs: list[Any]) -> None:
        scheduler.grammar_manager.grammar_queue += recv_reqs

    monkeypatch.setattr(Scheduler, "process_input_requests", process)
    return with_role(grammar_manager=Grammars())


def test_a_compiled_grammar_is_an_event_and_the_others_are_not_waited_for(scheduler: Any) -> None:
    grammars = scheduler.grammar_manager
    first, second = grammars.request(), grammars.request()
    scheduler.process_input_requests([first])
    scheduler.process_input_requests([second])
    assert not scheduler.role.wakeup.pending
    assert not scheduler.role.has_compiled_grammars()
    compiled = SimpleNamespace(copy=lambda: None)
    threading.Thread(target=second.grammar.set_result, args=(compiled,)).start()
    assert wait_until(lambda: scheduler.role.wakeup.pending)
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [second]
    assert second.grammar is compiled
    assert not scheduler.role.has_compiled_grammars()
    first.grammar = None  # aborted
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [first]
    assert not scheduler.role.has_compiled_grammars()


def test_a_grammar_that_takes_too_long_is_given_up_when_sglang_would(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, now_s = scheduler.grammar_manager, time.monotonic()
    late, in_time = grammars.request(), grammars.request()
    for request, began_s in ((late, now_s - 51.0), (in_time, now_s - 40.0)):
        with monkeypatch.context() as earlier:
            earlier.setattr("sgl_flowprefill.runtime.scheduler_role.time.monotonic", lambda began_s=began_s: began_s)
            scheduler.process_input_requests([request])
    assert scheduler.role.has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [late]
    assert "timed out" in late.failures[0]
    assert not scheduler.role.has_compiled_grammars()


def test_a_grammar_is_as_old_as_this_process_has_compiled_it(scheduler: Any) -> None:
    """The HTTP server may run on another machine, whose clock shows other numbers."""
    grammars = scheduler.grammar_manager
    for received_s in (time.monotonic() - 1e6, 0.0, time.monotonic() + 1e6):
        scheduler.process_input_requests([grammars.request(received_s)])
    assert not scheduler.role.has_compiled_grammars()
    assert all(req.grammar_wait_ct == 0 for req in grammars.grammar_queue)


def test_rank_0_decides_when_ranks_look_at_their_grammars(scheduler: Any) -> None:
    said: list[list[bool]] = []
    scheduler.role.agreement = SimpleNamespace(agree=lambda values: said.append(values) or [1])
    assert not scheduler.role.has_compiled_grammars()
    assert not said
    scheduler.process_input_requests([scheduler.grammar_manager.request()])
    assert scheduler.role.has_compiled_grammars()
    assert said == [[False]]


def test_requests_that_wait_no_longer_are_withdrawn_from_the_policy_and_those_that_start_are_not() -> None:
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: 1.0, pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("feasible", Limits(16, 1), 60.0)
    withdrawn: list[str] = []
    policy.withdrawn = lambda job: withdrawn.append(job.item.req)  # type: ignore[method-assign]
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    for number, rid in enumerate(("leaves", "starts", "stays")):
        work.add(Arrival(rid, array("q", range(100)), PrefillShape(100, 0), number, 1000.0, 0.0))
    winner = policy.first_waiting(0.0, 3)[1]
    work.start(0.0, winner, SimpleNamespace(reqs=["starts"]), ["starts"], [PrefillShape(100, 0)], 0)
    work.forget_all_but(["stays"])
    assert withdrawn == ["leaves"]
    assert [job.item.req for job in policy.waiting] == ["stays"]


@pytest.mark.parametrize(
    ("now_s", "due_s"),
    [(0.0, 5.0), (3.0, 6.0), (5.0, 9.0), (8.0, 6.0)],
    ids=["first of all", "of those in time", "of the only one in time", "of the winner, as none is in time"],
)
def test_a_task_is_due_when_the_first_of_its_requests_is_that_can_be_met(now_s: float, due_s: float) -> None:
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: float(len(shapes)), pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("fcfs", Limits(16, 1000), 60.0)
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    shape, deadlines_s = PrefillShape(100, 0), {"winner": 6.0, "first": 5.0, "last": 9.0}
    for number, (rid, deadline_s) in enumerate(deadlines_s.items()):
        work.add(Arrival(rid, array("q", range(100)), shape, number, deadline_s, 0.0))
    winner = policy.first_waiting(0.0, 1)[0]
    assert winner.item.req == "winner"
    task = work.start(now_s, winner, SimpleNamespace(reqs=list(deadlines_s)), list(deadlines_s), [shape] * 3, 0)
    assert (task.job.deadline_s, task.number) == (due_s, winner.number)


@pytest.mark.parametrize(
    ("policy_name", "waited_s", "passed_over"),
    [("feasible", 0.0, True), ("s-edf", 0.0, True), ("feasible", 70.0, False), ("fcfs", 0.0, False)],
)
def test_small_requests_do_not_wait_for_streams_to_end_with_one_that_may_not_join_them_unless_it_has_starved(
    policy_name: str, waited_s: float, passed_over: bool
) -> None:
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: 1e-3 * sum(shape.new_tokens for shape in shapes), pace=lambda shapes: Pace(1.0)
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(0.030, 3e-4, 4e-7), DecodeLimits())
    work = Work(colocated, ttft, unlimited, Progress([]), Tasks())
    streams = [Stream(0.1, 1000, 0.0) for _ in range(60)]
    colocated.joined(streams)  # 72 ms a step of the 90 that it may take
    work.add(Arrival("large", array("q", range(200)), PrefillShape(200, 100_000), 0, 5.0, 0.0))
    work.add(Arrival("small", array("q", range(300)), PrefillShape(300, 0), 1, 100.0, 0.0))
    work.add(Arrival("least", array("q", range(100)), PrefillShape(100, 0), 2, 101.0, 0.0))
    colocated.began(waited_s)  # so that the steps' own turn is not the question

    def chosen() -> list[str]:
        choice = work.choose(waited_s, admit=True, last=False)
        return [job.item.req for job in choice] if isinstance(choice, list) else []

    for _ in range(3):
        assert chosen() == (["small"] if passed_over else [])
        assert policy.first_waiting(waited_s, 1)[0].item.req == "large"
    colocated.left(streams[15:])
    assert chosen() == ["large"]


@pytest.mark.parametrize(
    ("policy_name", "waited_s", "retracted", "waits"),
    [
        ("feasible", 0.0, False, True),
        ("feasible", 0.0, True, False),
        ("feasible", 70.0, False, False),
        ("fcfs", 0.0, False, False),
    ],
    ids=["", "was a stream", "has starved", "is in line"],
)
def test_a_request_waits_for_a_load_of_streams_at_which_its_own_objective_holds_unless_others_would_wait_for_it(
    policy_name: str, waited_s: float, retracted: bool, waits: bool
) -> None:
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: 1e-3 * sum(shape.new_tokens for shape in shapes), pace=lambda shapes: Pace(1.0)
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(0.030, 3e-4, 0.0), DecodeLimits())
    work = Work(colocated, ttft, unlimited, Progress([]), Tasks())
    streams = [Stream(1.0, 1000, 0.0) for _ in range(60)]
    colocated.joined(streams)  # with one more, 48.3 ms a step
    tight = Arrival("tight", array("q", range(200)), PrefillShape(200, 0), 0.0, 5.0, 0.0)
    work.add(tight._replace(retracted=retracted, objective=Objective(5.0, 0.05)))
    lax = Arrival("lax", array("q", range(300)), PrefillShape(300, 0), 0.0, 100.0, 0.0)
    work.add(lax._replace(objective=Objective(100.0, 1.0)))
    colocated.began(waited_s)  # so that the steps' own turn is not the question

    def chosen() -> list[str]:
        choice = work.choose(waited_s, admit=True, last=False)
        return [job.item.req for job in choice] if isinstance(choice, list) else []

    assert chosen() == (["lax"] if waits else ["tight"])
    colocated.left(streams[45:])  # 43.8 ms a step, of 45
    assert chosen() == ["tight"]


def test_a_prefill_whose_result_is_on_its_way_counts_among_the_streams_to_come() -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    requests = [SimulatedRequest(f"r{number}", 0.0, 100, 60.0) for number in range(2)]
    hub = SimulatedServer(SimulatedDevice(2, HostCosts()), model, requests).hub
    hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.012, 0.0), DecodeLimits(margin_s=0.0))
    hub.work.colocated.joined([Stream(0.1, 100, 0.0) for _ in range(5)])  # 82 ms a step with one more, of 90
    assert hub.turn()
    assert [task.rids for task in hub.work.tasks.prefills] == [["r0"]]
    assert not hub.work.tasks.live
    assert hub.work.choose(hub.now_s(), admit=True, last=True) is Act.STEP


def test_requests_that_begin_alike_are_matched_again_when_one_of_them_has_been_computed() -> None:
    pace = Pace(2.0)
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: float(sum(shape.new_tokens for shape in shapes)), pace=lambda shapes: pace
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("fcfs", Limits(16, 1), 60.0)
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    waiting = work.waiting
    cached = {"0": 0, "1": 0, "2": 256, "other": 0}
    shared = list(range(1000, 1300))
    prompts = {
        rid: array("q", [*shared, *range(start, start + 100)]) for rid, start in zip("012", (0, 200, 400), strict=True)
    }
    prompts["other"] = array("q", range(5000, 5400))

    def match(rid: str) -> PrefillShape:
        return PrefillShape(len(prompts[rid]) - cached[rid], cached[rid])

    for number, (rid, prompt) in enumerate(prompts.items()):
        work.add(Arrival(rid, prompt, match(rid), number, 1.0, 0.0))
    jobs = dict(zip(prompts, policy.first_waiting(0.0, 4), strict=True))
    assert [job.remaining_s for job in jobs.values()] == [400.0, 400.0, 144.0, 400.0]
    waiting.take(["0"])
    waiting.cached([prompts["0"]])
    assert waiting.outdated() == [jobs["1"]], "the third has all whole blocks that it shares with the first"
    cached["1"] = 300
    assert work.match_again(list(jobs.values()), match)
    assert jobs["1"].remaining_s == 100.0
    assert not waiting.outdated()
    waiting.cached([prompts["0"]])
    assert not waiting.outdated(), "no more of it is cached than before"
    waiting.cached([prompts["1"], prompts["other"]])
    assert waiting.outdated() == [jobs["1"], jobs["other"]]
    waiting.take(["1", "2", "other"])
    assert not waiting.outdated()
    assert not waiting.watches


def test_only_who_would_start_is_matched_again_because_something_was_evicted_and_once() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 100.0) for i in range(4)]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=10_000)
    hub.look()
    shape, waiting, matched = PrefillShape(60, 40), hub.work.waiting, list[str]()
    for job in hub.work.policy.first_waiting(0.0, 9):
        waiting.matched(job, shape)

    def match(req: SimulatedRequest) -> PrefillShape:
        matched.append(req.rid)
        return shape

    hub.role.match = match  # type: ignore[method-assign]
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None)
    hub.work.tasks.live = [SimpleNamespace(new_tokens=30_000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]

    def chosen(room_tokens: int) -> list[str]:
        """The requests that would start beside a live task and ``room_tokens`` more."""
        budget_bytes = activations.running_bytes(30_000) + activations.suspended_bytes(room_tokens)
        hub.work.memory = TaskMemory(activations, budget_bytes)
        choice = hub.choose()
        return [job.item.req.rid for job in choice] if isinstance(choice, list) else []

    assert len(chosen(120)) == 2
    assert not matched, "nothing was evicted"
    for _ in range(10):
        waiting.evicted()
        assert not chosen(59)
    assert not matched, "none fits"
    starting = chosen(120)
    assert matched == starting
    assert chosen(120) == starting
    assert matched == starting, "nothing was evicted since"
    shape = PrefillShape(100, 0)
    waiting.evicted()
    assert chosen(120) == starting[:1]
    assert matched == [*starting, *starting]


def test_ranks_that_match_their_own_requests_match_those_again_that_are_next_one_at_an_event() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 100.0 + i) for i in range(12)]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    matched: list[str] = []

    def match(req: SimulatedRequest) -> PrefillShape:
        matched.append(req.rid)
        return PrefillShape(100)

    hub.role.match = match  # type: ignore[method-assign]
    hub.look()
    for job in hub.work.policy.first_waiting(0.0, 99):
        hub.work.waiting.matched(job, PrefillShape(60, 40))
    hub.work.waiting.evicted()
    hub.look()
    assert not matched, "where all ranks have the same requests, they are matched when they would start"
    hub.match_rounds = 1
    for _ in range(12):
        hub.look()
    assert matched == [f"r{i}" for i in range(8)], "the first ones, and as long as they wait none behind them"


def test_what_a_task_would_give_back_is_what_it_computes_and_not_the_prefix_that_others_have_cached() -> None:
    work = giving_back("fcfs", max_starvation_s=60.0)
    tasks = []
    for number, shape in enumerate((PrefillShape(200, 8000), PrefillShape(6000, 0))):
        job = work.add(Arrival(number, range(100), shape, 0.0, 100.0, 0.0))
        task = work.start(0.0, job, None, [number], [shape], None)
        task.spans = [(HostStamp(0.0), HostStamp(0.1))]
        tasks.append(task)
    assert work.to_give_back(0.0, 1000) == [tasks[1]]
    assert work.to_give_back(0.0, 6001) == [tasks[1], tasks[0]]


def giving_back(policy_name: str, max_starvation_s: float) -> Work:
    """Work of which each request takes a second, beside streams."""
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: 1.0, pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), max_starvation_s)
    return Work(ColocatedPolicy(policy, LinearSteps(0.01, 0.0, 0.0)), ttft, unlimited, Progress([]), Tasks())


def test_a_request_whose_prefill_is_given_back_keeps_its_turn_and_counts_once_among_what_arrives() -> None:
    work, shape = giving_back("feasible", max_starvation_s=10.0), PrefillShape(100)

    def come(rid: str, deadline_s: float, number: int | None = None) -> Job[WaitingRequest]:
        return work.add(Arrival(rid, range(100), shape, 0.0, deadline_s, 0.0, number=number))

    first, _, urgent = come("first", 5.0), come("second", 5.0), come("urgent", 1e6)
    assert work.policy.pick(60.0, None) is first
    task = work.start(60.0, first, None, ["first"], [shape], None)
    work.end(task)
    again = come("first", 5.0, task.members[0].number)
    assert again.item.number == again.number == first.number
    assert first.counted is not None
    assert again.counted is None
    assert work.policy.pick(60.5, None) is again
    work.forget_all_but(["second", "urgent"])
    assert work.policy.pick(61.0, None) is urgent, "the turn is over, and the next one comes later"


def test_a_prefill_gives_its_kv_cache_back_once_unless_streams_could_not_be_retracted_in_its_place() -> None:
    work, shape = giving_back("fcfs", max_starvation_s=60.0), PrefillShape(100)
    streams = [Stream(1.0, 100, 0.0) for _ in range(2)]
    work.colocated.joined(streams)
    arrival = Arrival("a", range(100), shape, 0.0, 9.0, 0.0)
    waiting = [work.add(arrival), work.add(arrival._replace(req="b", number=7))]
    fresh, again = (work.start(0.0, job, None, [job.item.req], [shape], None) for job in waiting)
    assert work.to_give_back(0.0, 1000) == [fresh, again], "the streams have nothing that nobody shares"
    work.colocated.began(0.0)
    work.colocated.stepped(0.01)
    assert work.to_give_back(0.0, 1000) == [fresh]
    work.end(fresh)
    assert work.to_give_back(0.0, 1000) == []
    assert work.to_unwind(0.0) == [], "it has not run"
    again.has_run = True
    assert work.to_unwind(0.0) == [again], "no stream could give device memory back"
    work.colocated.left(streams[1:])
    assert work.to_give_back(0.0, 1000) == [again], "the last stream would end with an error"


def test_tasks_with_log_probabilities_of_prompts_say_nothing_of_how_long_prefills_take() -> None:
    ttft = AdaptiveTTFT(0.5, SimpleNamespace(predict_s=lambda batch: 0.1))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    work = Work(ColocatedPolicy(make_policy("fcfs", Limits(16, 1), 60.0)), ttft, unlimited, Progress([]), Tasks())

    def run(logprob_rows: int) -> None:
        shape = PrefillShape(100)
        request = WaitingRequest("r", 0, range(100), shape, 0.0, logprob_rows)
        task = PrefillTask(0, None, [request], [shape], 0.0, 1.0, 0.1, spans=[(HostStamp(0.0), HostStamp(0.5))])
        assert work.observe(task).raw_s == 0.1

    for _ in range(20):
        run(logprob_rows=100)
    assert ttft.correction == 1.0
    for _ in range(20):
        run(logprob_rows=0)
    assert ttft.correction == pytest.approx(5.0)


def test_a_task_that_took_twice_as_long_is_seen_by_what_waits_and_by_what_is_suspended() -> None:
    model = SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch))
    ttft = AdaptiveTTFT(0.5, model)
    small, large = [PrefillShape(100)], [PrefillShape(2000)]
    waiting, suspended = ttft.pace(small), ttft.pace(large)
    assert not ttft.follow()
    for _ in range(40):
        ttft.observe(small, 0.2)
    assert ttft.follow()
    assert waiting.factor == pytest.approx(2.0)
    assert suspended.factor == pytest.approx(2.0)
    for _ in range(40):
        ttft.observe(small, 0.202)
    assert not ttft.follow(), "one percent is not worth to look at all again"
    assert waiting.factor == pytest.approx(2.0)


def test_all_that_waits_or_is_suspended_is_predicted_by_the_model_that_is_adopted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sgl_flowprefill.hub.work.PREDICTED_AT_ONCE", 15)
    wrong = SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch))
    right = SimpleNamespace(predict_s=lambda batch: sum(2e-4 * new + 4e-7 * new**2 for new, _ in batch))
    ttft = AdaptiveTTFT(0.5, wrong)
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    colocated = ColocatedPolicy(make_policy("feasible", Limits(16, 1), 60.0))
    shedding = Shedding()
    work = Work(colocated, ttft, unlimited, Progress([True, False] * 4), Tasks(), shedding=shedding)
    shapes = [PrefillShape(100 + 400 * number) for number in range(21)]
    jobs = [work.add(Arrival(number, range(10), shape, 0.0, 100.0, 0.0)) for number, shape in enumerate(shapes)]
    suspended = work.start(0.0, jobs.pop(), None, [20], shapes[20:], None)
    suspended.has_run, suspended.operators_passed = True, 2
    work.update(suspended)
    for _ in range(40):
        ttft.observe([PrefillShape(600)], right.predict_s([PrefillShape(600)]))
    work.follow()
    assert jobs[0].remaining_s > 1.5 * right.predict_s(shapes[:1]), "so far, short prompts seem long"
    assert jobs[19].remaining_s < right.predict_s(shapes[19:20]) / 2, "and long ones short"

    ttft.replace(right)
    work.adopted()
    expected_s = [right.predict_s([shape]) for shape in shapes]
    former_s = [job.remaining_s for job in jobs]
    work.predict_some()
    assert [job.remaining_s for job in jobs] == pytest.approx([*expected_s[:15], *former_s[15:]]), (
        "an event does a part"
    )
    work.predict_some()
    work.predict_some()
    assert [job.remaining_s for job in jobs] == pytest.approx(expected_s[:20])
    assert suspended.predicted_s == pytest.approx(expected_s[20])
    assert suspended.job.remaining_s == pytest.approx(0.75 * expected_s[20]), "two of eight operators have run"
    assert shedding.backlog.work_s == pytest.approx(sum(expected_s[:20]) + 0.75 * expected_s[20])
    assert sorted(job.number for job in work.policy.waiting) == list(range(20))
    assert list(work.policy.started) == [suspended.job]


class ToldTiles:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.yardsticks_s: list[float] = []

    def follow(self, yardstick_s: float) -> None:
        self.yardsticks_s.append(yardstick_s)


class OneOffer(Learning):
    """Has a better model to offer, once it is told so."""

    def __init__(self) -> None:
        self.has_offer = False

    def look_for_offer(self) -> bool:
        return self.has_offer

    def adopt(self) -> None:
        self.has_offer = False


@pytest.mark.parametrize("wrong", [0.25, 8.0])
def test_tiles_are_told_how_fast_prefills_are_and_not_what_the_profile_says(wrong: float) -> None:
    model = Model(1, lambda tokens: 40e-6 * tokens, lambda tokens: 60e-6 * tokens)
    requests = [SimulatedRequest(f"r{i}", 10.0 * i, 100 + 700 * (i % 5), 100.0) for i in range(100)]
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests)
    profiled = SimpleNamespace(predict_s=lambda batch: wrong * model.forward_s(sum(new for new, _ in batch)))
    server.hub.work.ttft = AdaptiveTTFT(0.75, profiled)
    server.hub.tiles = tiles = ToldTiles()
    server.run_all()
    right_s = model.forward_s(YARDSTICK.new_tokens)
    assert tiles.yardsticks_s[0] == pytest.approx(wrong * right_s)
    assert tiles.yardsticks_s[-1] == pytest.approx(right_s, rel=0.02)


def test_batches_are_as_large_as_the_model_in_use_says() -> None:
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), [])
    hub, offer = server.hub, OneOffer()
    hub.learning, hub.work.batch_tokens = offer, lambda: 4096
    before = hub.work.policy.limits
    hub.turn()
    assert hub.work.policy.limits == before
    offer.has_offer = True
    hub.turn()
    assert hub.work.policy.limits == replace(before, max_batch_tokens=4096)
