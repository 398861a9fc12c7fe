"""Parts of the hub by themselves: what SGLang's watchdogs see of it, and requests whose grammars are being compiled."""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.constrained.grammar_manager import GrammarManager
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.invariant_checker import create_scheduler_watchdog

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.task import Executor
from sgl_flowprefill.runtime.waiting import WaitingRequests
from sgl_flowprefill.runtime.wakeup import Wakeup
from sgl_flowprefill.ttft import AdaptiveTTFT, PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedScheduler


def hub(**attributes: Any) -> Any:
    """A scheduler of which only ``attributes`` are there."""
    scheduler: Any = FlowPrefillScheduler.__new__(FlowPrefillScheduler)
    scheduler.__dict__.update(attributes)
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
    executor._running = SimpleNamespace(checkpoint=0, points=0)  # type: ignore[assignment]
    scheduler = hub(forward_ct=1, cur_batch_for_debug=object(), is_initializing=False, _executor=executor)
    for name in ("watchdog", "soft_watchdog"):
        scheduler.__dict__[name] = create_scheduler_watchdog(scheduler, watchdog_timeout=0.4, soft=True)
        scheduler.__dict__[name].dump_info = None
    scheduler._feed_watchdogs()
    try:
        for _ in range(60):  # one forward pass for three times as long as a watchdog waits
            point(executor)
            time.sleep(0.02)
        assert not dumps
        assert wait_until(lambda: len(dumps) >= 2)
    finally:
        scheduler.cur_batch_for_debug = None


def test_without_a_soft_watchdog_there_is_one() -> None:
    watchdog = SimpleNamespace()
    hub(watchdog=watchdog, forward_ct=3, _executor=SimpleNamespace(points=4))._feed_watchdogs()
    assert watchdog.get_counter() == 7


def test_a_winner_starts_without_those_that_do_not_fit_beside_it() -> None:
    """Where activations of all that would join it exceed what is left beside a live task."""
    requests = [SimulatedRequest(f"r{i}", 0.0, tokens, 100.0) for i, tokens in enumerate([64, 100, 1900, 70])]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    scheduler = SimulatedScheduler(SimulatedDevice(0, HostCosts()), model, requests)
    scheduler._policy.limits = Limits(max_suspended=16, max_batch_tokens=10_000)
    scheduler._take_events()
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None)
    scheduler._live = [SimpleNamespace(new_tokens=30_000, logprob_rows=0)]  # type: ignore[list-item]

    def chosen(room_tokens: int) -> list[int]:
        """Prompts that start together, beside a live task and ``room_tokens`` more."""
        budget_bytes = activations.running_bytes(30_000) + activations.suspended_bytes(room_tokens)
        scheduler._memory = TaskMemory(activations, budget_bytes)
        choice = scheduler._choose(None)
        return [job.item.req.tokens for job in choice] if isinstance(choice, list) else []

    everything = chosen(10_000)
    assert sorted(everything) == [64, 70, 100, 1900]
    for kept in range(1, 5):
        assert chosen(sum(everything[:kept])) == everything[:kept]
    assert chosen(everything[0] - 1) == []


def test_log_probabilities_of_a_long_prompt_keep_it_from_starting_where_they_would_not_fit() -> None:
    requests = [SimulatedRequest("r", 0.0, 64, 100.0, return_logprob=True)]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    scheduler = SimulatedScheduler(SimulatedDevice(0, HostCosts()), model, requests)
    scheduler._take_events()
    scheduler._live = [SimpleNamespace(new_tokens=1000, logprob_rows=0)]  # type: ignore[list-item]
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None, logits=1000)
    scheduler._memory = TaskMemory(activations, activations.running_bytes(1000) + 64 * 4)
    requests[0].logprob_start_len = -1
    assert isinstance(scheduler._choose(None), list)
    requests[0].logprob_start_len = 0
    assert scheduler._choose(None) is None


def test_a_task_takes_over_the_number_of_the_request_it_is_started_for() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 1.0) for i in range(2)]
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    scheduler = SimulatedScheduler(SimulatedDevice(0, HostCosts()), model, requests)
    scheduler._take_events()
    winner = scheduler._policy.first_waiting(0.0, 2)[1]
    task = scheduler._start([winner])
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
    scheduler = hub(waiting_queue=list(numbers))
    for _ in range(4):
        scheduler.resolve_waiting_queue_bootstrap()
    assert max(looks) <= 512
    assert sorted(scheduler.waiting_queue) == [number for number in numbers if number >= 0]


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
    """Whose input is put into the queue of grammars."""

    def process(scheduler: Any, recv_reqs: list[Any]) -> None:
        scheduler.grammar_manager.grammar_queue += recv_reqs

    monkeypatch.setattr(Scheduler, "process_input_requests", process)
    return hub(_is_on=True, _wakeup=Wakeup(), _agreement=None, grammar_manager=Grammars())


def test_a_compiled_grammar_is_an_event_and_the_others_are_not_waited_for(scheduler: Any) -> None:
    grammars = scheduler.grammar_manager
    first, second = grammars.request(), grammars.request()
    scheduler.process_input_requests([first])
    scheduler.process_input_requests([second])
    assert not scheduler._wakeup.pending
    assert not scheduler._has_compiled_grammars()
    compiled = SimpleNamespace(copy=lambda: None)
    threading.Thread(target=second.grammar.set_result, args=(compiled,)).start()
    assert wait_until(lambda: scheduler._wakeup.pending)
    assert scheduler._has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [second]
    assert second.grammar is compiled
    assert not scheduler._has_compiled_grammars()
    first.grammar = None  # aborted
    assert scheduler._has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [first]
    assert not scheduler._has_compiled_grammars()


def test_a_grammar_that_takes_too_long_is_given_up_when_sglang_would(
    scheduler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars, now_s = scheduler.grammar_manager, time.monotonic()
    late, in_time = grammars.request(), grammars.request()
    for request, began_s in ((late, now_s - 51.0), (in_time, now_s - 40.0)):
        with monkeypatch.context() as earlier:
            earlier.setattr("sgl_flowprefill.runtime.scheduler.time.monotonic", lambda began_s=began_s: began_s)
            scheduler.process_input_requests([request])
    assert scheduler._has_compiled_grammars()
    assert grammars.get_ready_grammar_requests() == [late]
    assert "timed out" in late.failures[0]
    assert not scheduler._has_compiled_grammars()


def test_a_grammar_is_as_old_as_this_process_has_compiled_it(scheduler: Any) -> None:
    """The HTTP server may run on another machine, whose clock shows other numbers."""
    grammars = scheduler.grammar_manager
    for received_s in (time.monotonic() - 1e6, 0.0, time.monotonic() + 1e6):
        scheduler.process_input_requests([grammars.request(received_s)])
    assert not scheduler._has_compiled_grammars()
    assert all(req.grammar_wait_ct == 0 for req in grammars.grammar_queue)


def test_rank_0_decides_when_ranks_look_at_their_grammars(scheduler: Any) -> None:
    said: list[list[bool]] = []
    scheduler._agreement = SimpleNamespace(agree=lambda values: said.append(values) or [1])
    assert not scheduler._has_compiled_grammars()
    assert not said
    scheduler.process_input_requests([scheduler.grammar_manager.request()])
    assert scheduler._has_compiled_grammars()
    assert said == [[False]]


def test_requests_that_begin_alike_are_matched_again_when_one_of_them_has_been_computed() -> None:
    def request(prompt: list[int], cached_tokens: int = 0) -> Any:
        stats = SimpleNamespace(flowprefill_sent_s=0.0)
        req: Any = type("Req", (), {})()
        req.origin_input_ids, req.prefix_len = array("q", prompt), cached_tokens
        req.time_stats, req.bootstrap_room = stats, 0
        return req

    def predict_s(waiting: Any) -> float:
        return float(sum(one.shape.new_tokens for one in waiting))

    waiting, pace = WaitingRequests(), Pace(2.0)
    shared = list(range(1000, 1300))
    reqs = [request([*shared, *range(start, start + 100)], cached) for start, cached in ((0, 0), (200, 0), (400, 256))]
    other = request(list(range(5000, 5400)))
    jobs = [waiting.add(req, 0.0, 1.0, predict_s, lambda _: pace) for req in (*reqs, other)]
    assert [job.remaining_s for job in jobs] == [400.0, 400.0, 144.0, 400.0]
    waiting.take([reqs[0]])
    waiting.cached([reqs[0].origin_input_ids])
    assert list(waiting.outdated()) == [jobs[1]], "the third has all whole blocks that it shares with the first"
    reqs[1].prefix_len = 300
    waiting.matched(jobs[1], predict_s, lambda _: pace)
    assert jobs[1].remaining_s == 100.0
    assert not list(waiting.outdated())
    waiting.cached([reqs[0].origin_input_ids])
    assert not list(waiting.outdated()), "no more of it is cached than before"
    waiting.cached([reqs[1].origin_input_ids, other.origin_input_ids])
    assert list(waiting.outdated()) == [jobs[1], jobs[3]]
    waiting.take([reqs[1], reqs[2], other])
    assert not list(waiting.outdated())
    assert not waiting._watched


def test_a_task_that_took_twice_as_long_is_seen_by_what_waits_and_by_what_is_suspended() -> None:
    model = SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch))
    ttft = AdaptiveTTFT(model, 0.5)
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
