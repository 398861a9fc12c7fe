"""Each request that arrives at a real prefill scheduler has one end in the event log, whatever becomes of it, and each
answer is transformers'.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.managers.io_struct import AbortReq

from sgl_flowprefill.bench.metrics.event_log import summarise_log
from sgl_flowprefill.events import AnyEvent, Arrival, Fail, Leave, Ready, read_events
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.outcomes import Outcomes
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from tests.engine import PrefillEngine, generate_request
from tests.faults import MARKER, raise_in_marked_prompts
from tests.prompts import prompt
from tests.reference import Comparison


class LoggedEngine:
    """An engine, its event log, and ways to bring requests into each state."""

    def __init__(self, engine: PrefillEngine, path: Path, comparison: Comparison) -> None:
        self.engine = engine
        self.scheduler = engine.scheduler
        self.path = path
        self.comparison = comparison
        self._prompts: dict[str, Sequence[int]] = {}

    def submit(self, rid: str, tokens: Sequence[int], ttft_slo_s: float | None = None) -> None:
        """Hand a request to the scheduler, and remember its prompt."""
        self._prompts[rid] = tokens
        self.engine.submit(rid, tokens, ttft_slo_s=ttft_slo_s, logprobs=True)

    def queued(self, rid: str, state: KVPoll = KVPoll.Bootstrapping, ttft_slo_s: float | None = None) -> Any:
        """A request in the bootstrap queue, whose handshake is in ``state``."""
        self.submit(rid, self._prompt(), ttft_slo_s)
        req = next(req for req in self.scheduler.disagg_prefill_bootstrap_queue.queue if req.rid == rid)
        req.disagg_kv_sender.conclude_state = state
        return req

    def waiting(self, rid: str) -> Any:
        """A request that could be started now."""
        self.submit(rid, self._prompt(), ttft_slo_s=100.0)
        self.scheduler.hub.look()
        return next(req for req in self.scheduler.waiting_queue if req.rid == rid)

    def _prompt(self) -> list[int]:
        """One that no other request has."""
        return prompt(900 + len(self._prompts), 50)

    def check_for_stalls(self) -> None:
        """What the scheduler does once a second."""
        hub = self.scheduler.hub
        usual_s, hub.stall_check_s = hub.stall_check_s, 0.0
        hub.look()
        hub.stall_check_s = usual_s

    def events(self) -> list[AnyEvent]:
        self.scheduler.hub.recorder.flush()
        return list(read_events(self.path))

    def ends(self) -> dict[str, str]:
        """Kind of end by request; each has one, after its arrival, and nothing else has."""
        events = self.events()
        arrivals = [event.rid for event in events if event.kind == "arrival"]
        ends = [(rid, event) for event in events if event.kind in ("complete", "abort", "fail") for rid in event.rids]
        assert Counter(rid for rid, _ in ends) == Counter(arrivals)
        assert set(Counter(arrivals).values()) <= {1}
        leaves = Counter(event.rid for event in events if isinstance(event, Leave))
        assert leaves <= Counter(rid for rid, event in ends if event.kind == "complete")
        return {rid: event.kind for rid, event in ends}

    def compare(self) -> None:
        """Compare all answers with transformers', as many as the log has."""
        events = self.events()
        gone = {event.rid for event in events if isinstance(event, Leave) and event.aborted}
        completed = [rid for event in events if event.kind == "complete" for rid in event.rids if rid not in gone]
        answers = {rid: answer for rid, answer in self.engine.answers.items() if not answer.aborted}
        assert sorted(answers) == sorted(completed)
        for rid, answer in answers.items():
            assert answer.token is not None
            assert answer.logprob is not None
            self.comparison.answer(rid, self._prompts[rid], [answer.token], [answer.logprob])
        self.comparison.assert_nothing_differs()  # where all requests fail, there is nothing to compare

    def failure(self, rid: str) -> Fail:
        [event] = [event for event in self.events() if event.kind == "fail" and event.rids == [rid]]
        return event


@pytest.fixture
def logged(shared_engine: PrefillEngine, tmp_path: Path, comparison: Comparison) -> Iterator[LoggedEngine]:
    scheduler = shared_engine.scheduler
    recorder, limits = scheduler.hub.recorder, scheduler.hub.work.policy.limits
    shared_engine.answers.clear()
    shared_engine.record(EventRecorder(tmp_path / "events.jsonl"))
    logged = LoggedEngine(shared_engine, tmp_path / "events.jsonl", comparison)
    yield logged
    try:
        logged.compare()
    finally:
        shared_engine.record(recorder)
        scheduler.hub.work.policy.limits = limits
        scheduler.hub.executor.interrupted = scheduler.hub.events.pending
    shared_engine.run()
    shared_engine.assert_clean()


def test_requests_that_are_refused_at_the_door_fail_with_the_reason(
    logged: LoggedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged.submit("longer than the context", prompt(1, 70_000))
    for limit in ("max_input_len", "max_total_num_tokens"):  # of SGLang 0.5.23, of 0.5.22
        monkeypatch.setattr(logged.scheduler.disagg_prefill_bootstrap_queue, limit, 99, raising=False)
    logged.submit("longer than the KV cache", prompt(1, 100))
    monkeypatch.setattr(logged.scheduler, "abort_on_priority_when_disabled", True)
    with_priority = generate_request("with a priority", prompt(1, 20), 1)
    with_priority.priority = 1
    monkeypatch.setattr(logged.scheduler, "send_control_output", lambda *_: None, raising=False)
    logged.engine.receive(with_priority)
    assert set(logged.ends().values()) == {"fail"}
    assert logged.failure("longer than the context").http_status == 400
    assert "exceeds the maximum number of tokens: 100 > 99" in logged.failure("longer than the KV cache").reason
    assert "Using priority is disabled" in logged.failure("with a priority").reason
    arrived = {event.rid: event.prompt_tokens for event in logged.events() if event.kind == "arrival"}
    assert arrived["longer than the context"] == 70_000, "and not what SGLang puts in its place"
    logged.engine.answers.pop("with a priority", None)


def test_a_bootstrap_that_fails_and_one_that_is_aborted_end_differently(logged: LoggedEngine) -> None:
    logged.queued("fails", KVPoll.Failed)
    logged.queued("is aborted")
    logged.engine.turn()
    logged.engine.abort("is aborted")
    logged.engine.run()
    assert logged.ends() == {"fails": "fail", "is aborted": "abort"}
    assert logged.failure("fails").http_status == 500
    assert "Prefill bootstrap failed" in logged.failure("fails").reason


def test_waiting_requests_that_are_aborted_or_lose_their_decode_server_end(logged: LoggedEngine) -> None:
    logged.waiting("is aborted")
    logged.waiting("loses its decode server").disagg_kv_sender.conclude_state = KVPoll.Failed
    logged.engine.abort("is aborted")
    logged.check_for_stalls()
    assert logged.ends() == {"is aborted": "abort", "loses its decode server": "fail"}


def test_grammars_that_do_not_compile_or_are_aborted_end_their_requests(logged: LoggedEngine) -> None:
    for rid in ("does not compile", "is aborted"):
        request = generate_request(rid, prompt(2, 20), 1)
        request.sampling_params.regex = "[a-z" if rid == "does not compile" else "[b-y]{9}"
        logged.engine.receive(request)
    logged.engine.abort("is aborted")
    logged.engine.run()
    assert logged.ends() == {"does not compile": "fail", "is aborted": "abort"}
    assert logged.failure("does not compile").http_status == 400


def test_a_task_that_is_dropped_and_a_member_that_leaves_a_batch_end_as_aborted(logged: LoggedEngine) -> None:
    scheduler = logged.scheduler
    scheduler.hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=500)
    scheduler.hub.executor.interrupted = lambda: True
    logged.submit("is dropped", prompt(1, 600), ttft_slo_s=100.0)
    logged.engine.turn()
    for rid in ("stays", "leaves"):
        logged.submit(rid, prompt(2, 100), ttft_slo_s=20.0)
    logged.engine.turn()
    assert [task.rids for task in scheduler.hub.work.tasks.live] == [["is dropped"], ["stays", "leaves"]]
    logged.engine.abort("leaves")
    logged.engine.abort("is dropped")
    logged.engine.run()
    assert logged.ends() == {"is dropped": "abort", "stays": "complete", "leaves": "abort"}


def test_a_suspended_batch_goes_no_further_when_the_last_of_its_clients_has_left(logged: LoggedEngine) -> None:
    scheduler = logged.scheduler
    scheduler.hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=500)
    scheduler.hub.executor.interrupted = lambda: True
    for number, rid in enumerate(("first leaves", "second leaves")):
        logged.submit(rid, prompt(2 + number, 100), ttft_slo_s=100.0)
    logged.engine.turn()
    [batch] = scheduler.hub.work.tasks.live
    assert batch.rids == ["first leaves", "second leaves"]
    logged.submit("urgent", prompt(1, 600), ttft_slo_s=20.0)
    logged.engine.turn()
    passed = batch.points_passed
    logged.engine.abort("first leaves")
    logged.engine.turn()
    assert batch in scheduler.hub.work.tasks.live, "somebody waits for the other one"
    logged.engine.abort("second leaves")
    logged.engine.turn()
    assert [task.rids for task in scheduler.hub.work.tasks.live] == [["urgent"]]
    assert batch.points_passed == passed
    logged.engine.run()
    assert logged.ends() == {"first leaves": "abort", "second leaves": "abort", "urgent": "complete"}


def test_a_request_that_fails_while_its_prefill_runs_ends_once(logged: LoggedEngine) -> None:
    scheduler = logged.scheduler
    scheduler.hub.executor.interrupted = lambda: True
    logged.submit("fails", prompt(1, 600))
    logged.engine.turn()
    [task] = scheduler.hub.work.tasks.live
    scheduler.handle_bootstrap_failure(task.batch.reqs[0])
    logged.engine.run()
    assert logged.ends() == {"fails": "fail"}


def test_a_forward_pass_that_raises_ends_its_requests_but_those_that_have_left(logged: LoggedEngine) -> None:
    scheduler, engine = logged.scheduler, logged.engine
    hooks = raise_in_marked_prompts(scheduler, "error", 3)
    try:
        scheduler.hub.executor.interrupted = lambda: True
        for rid in ("raises", "leaves"):
            logged.submit(rid, [*prompt(1, 60), MARKER], ttft_slo_s=100.0)
        engine.turn()
        [task] = scheduler.hub.work.tasks.live
        engine.abort("leaves")
        engine.run()
    finally:
        scheduler.hub.executor.interrupted = scheduler.hub.events.pending
        for hook in hooks:
            hook.remove()
    assert logged.ends() == {"raises": "fail", "leaves": "abort"}
    failure = logged.failure("raises")
    assert (failure.task, failure.http_status) == (task.id, 500)
    assert engine.answers["raises"].req.finished_reason.to_json()["message"].startswith(failure.reason)


def test_requests_can_be_run_before_they_start_and_leave_when_their_kv_cache_is_sent(logged: LoggedEngine) -> None:
    req = logged.queued("is sent")
    logged.engine.turn()
    assert {event.kind for event in logged.events()} == {"arrival"}, "its decode server has no place for it yet"
    req.disagg_kv_sender.conclude_state = None
    logged.scheduler.role.note_transfer_status(req.bootstrap_room, KVPoll.WaitingForInput)
    logged.submit("HEALTH_CHECK_1", prompt(1, 1))
    logged.engine.run()
    kinds: dict[str, list[str]] = {"is sent": [], "HEALTH_CHECK_1": []}
    for event in logged.events():
        for rid in [event.rid] if isinstance(event, Arrival | Ready | Leave) else event.rids:
            kinds[rid].append(event.kind)
    assert kinds == {
        "is sent": ["arrival", "ready", "start", "complete", "leave"],
        "HEALTH_CHECK_1": ["start", "complete"],
    }


def test_a_client_that_goes_while_the_kv_cache_is_sent_has_aborted_and_missed_nothing(logged: LoggedEngine) -> None:
    logged.queued("is aborted", KVPoll.WaitingForInput, ttft_slo_s=100.0)
    while not logged.scheduler.disagg_prefill_inflight_queue:
        assert logged.engine.turn()
    logged.engine.turn()
    assert len(logged.scheduler.disagg_prefill_inflight_queue) == 1, "it is being sent"
    logged.engine.abort("is aborted")
    logged.engine.run()
    assert logged.ends() == {"is aborted": "complete"}
    outcomes = Outcomes(decodes=False)
    [outcome] = [outcome for event in logged.events() for outcome in outcomes.read(event)]
    assert outcome.verdict == (None, Cause.ABORTED)


def test_health_checks_run_without_an_arrival(logged: LoggedEngine) -> None:
    logged.submit("HEALTH_CHECK_1", prompt(1, 1))
    logged.submit("request", prompt(1, 20))
    logged.engine.run()
    events = logged.events()
    assert [event.rid for event in events if event.kind == "arrival"] == ["request"]
    completed = [rid for event in events if event.kind == "complete" for rid in event.rids]
    assert sorted(completed) == ["HEALTH_CHECK_1", "request"]
    summary = summarise_log(events)
    assert (summary.requests, summary.answered, summary.without_end) == (1, 1, 0)


def test_a_request_that_leaves_on_a_way_nobody_thought_of_ends_within_a_second(logged: LoggedEngine) -> None:
    logged.queued("vanishes")
    logged.queued("stays")
    logged.check_for_stalls()
    del logged.scheduler.disagg_prefill_bootstrap_queue.queue[0]
    assert {event.kind for event in logged.events()} == {"arrival"}
    logged.check_for_stalls()
    assert logged.failure("vanishes").reason == "it is in none of the scheduler's queues"
    logged.scheduler.process_input_requests([AbortReq(abort_all=True)])
    logged.engine.run()
    assert logged.ends() == {"vanishes": "fail", "stays": "abort"}


def test_busy_time_of_a_mix_is_the_time_in_which_somebody_waited(logged: LoggedEngine) -> None:
    logged.submit("refused", prompt(1, 70_000))
    logged.queued("fails", KVPoll.Failed)
    for number in range(5):
        logged.submit(f"mix {number}", prompt(number, 300), ttft_slo_s=1.0 + number)
    logged.waiting("leaves")
    logged.engine.abort("leaves")
    logged.engine.run()
    assert Counter(logged.ends().values()) == {"complete": 5, "fail": 2, "abort": 1}
    summary = summarise_log(logged.events())
    assert (summary.requests, summary.answered, summary.failed, summary.aborted) == (8, 5, 2, 1)
    assert summary.without_end == 0
    assert summary.forward_s <= summary.busy_s <= summary.span_s
