"""What became of each request, by the events of its server as they come."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pytest

from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Fail,
    GiveBack,
    Leave,
    Log,
    Ready,
    Resume,
    Start,
    Step,
    Suspend,
)
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.outcomes import Outcome, Outcomes
from sgl_flowprefill.timeline import History
from tests.told import arrival, complete, start, suspend


def ready(t_s: float, rid: str, predicted_s: float, readable_s: float | None = None) -> Ready:
    return Ready(t_s, rid, t_s if readable_s is None else readable_s, 1000, 0, predicted_s)


def told(outcomes: Outcomes, events: Sequence[AnyEvent]) -> dict[str, Outcome]:
    return {outcome.rid: outcome for event in events for outcome in outcomes.read(event)}


PREEMPTED: list[AnyEvent] = [
    arrival(10.0, "long", 11.5),
    ready(10.02, "long", 1.0),
    start(10.1, 0, "long"),
    arrival(10.5, "short", 11.0),
    ready(10.52, "short", 0.1),
    suspend(10.53, 0, "long", "short", readable_s=10.51),
    start(10.53, 1, "short", predicted_s=0.1),
    complete(10.63, 1, "short", forward_s=0.1),
    Resume(10.63, 0, ["long"], 7),
    complete(11.6, 0, "long", forward_s=1.395),
]


def test_an_outcome_says_what_delayed_a_request() -> None:
    outcomes = Outcomes(decodes=True)
    by_rid = told(outcomes, PREEMPTED)
    long, short = by_rid["long"], by_rid["short"]
    assert (short.met, short.cause, short.suspensions) == (True, None, 0)
    assert (short.ttft_s, short.blocked_s) == (pytest.approx(0.14), pytest.approx(0.02))
    assert (short.predicted_s, short.slack_at_admission_s) == (0.1, pytest.approx(0.38))
    assert short.waited_s == pytest.approx(0.01)
    assert (long.met, long.cause, long.blocked_s) == (False, Cause.MISPREDICTION, 0.0)
    assert (long.suspensions, long.suspended_s) == (1, pytest.approx(0.105))
    assert (long.ttft_s, long.waited_s) == (pytest.approx(1.61), pytest.approx(0.08))
    assert len(outcomes) == 0


def test_on_a_prefill_server_the_outcome_waits_for_the_transfer() -> None:
    outcomes = Outcomes(decodes=False)
    assert told(outcomes, PREEMPTED) == {}
    assert len(outcomes) == 2
    [short] = outcomes.read(Leave(10.95, "short"))
    [long] = outcomes.read(Leave(11.8, "long", "Decode transfer failed"))
    assert (short.met, short.ttft_s) == (True, pytest.approx(0.46))
    assert (long.met, long.ttft_s, long.reason) == (False, None, "Decode transfer failed")
    assert len(outcomes) == 0


@pytest.mark.parametrize(("left_s", "expected"), [(10.95, (None, Cause.ABORTED)), (11.2, (False, Cause.TRANSFER))])
def test_a_client_that_goes_while_its_kv_cache_is_sent_misses_nothing_before_the_deadline(
    left_s: float, expected: tuple[bool | None, Cause]
) -> None:
    outcomes = Outcomes(decodes=False)
    told(outcomes, PREEMPTED)
    leave = Leave(left_s, "short", "Prefill transfer failed", aborted=True)
    [short] = outcomes.read(leave)
    assert (short.verdict, short.ttft_s, short.reason) == (expected, None, None)
    in_order = sorted([*PREEMPTED, leave], key=lambda event: event.t_s)
    later = next(request for request in History.of(in_order).requests if request.rid == "short")
    assert later.verdict == expected


def test_an_answer_that_ends_much_later_changes_no_outcome() -> None:
    outcomes = Outcomes(decodes=True)
    told(outcomes, PREEMPTED)
    assert outcomes.read(Leave(99.0, "short")) == ()


def test_requests_that_end_without_a_first_token() -> None:
    events = [
        arrival(10.0, "gone", 20.0),
        arrival(10.0, "refused", 20.0),
        Abort(10.1, ["gone"]),
        Fail(10.2, ["refused"], 400, "too long"),
    ]
    by_rid = told(Outcomes(decodes=True), events)
    assert (by_rid["gone"].met, by_rid["gone"].cause) == (None, Cause.ABORTED)
    assert (by_rid["refused"].met, by_rid["refused"].cause) == (None, Cause.INVALID)
    assert (by_rid["refused"].reason, by_rid["refused"].slack_at_admission_s) == ("too long", None)


@pytest.mark.parametrize("ended_s", [10.2, 30.0], ids=["before it was due", "after it was due"])
@pytest.mark.parametrize(
    ("http_status", "invalid"),
    [(400, True), (404, True), (422, True), (429, False), (500, False), (503, False), (None, False)],
)
def test_what_is_refused_for_its_clients_mistake_is_neither_met_nor_missed(
    http_status: int | None, invalid: bool, ended_s: float
) -> None:
    events = [arrival(10.0, "refused", 20.0), Fail(ended_s, ["refused"], http_status, "why")]
    outcome = told(Outcomes(decodes=True), events)["refused"]
    assert (outcome.met is None) == (outcome.cause is Cause.INVALID) == invalid
    assert (outcome.met is False) == (not invalid)


def test_a_suspension_ends_with_its_task_and_counts_after_a_restart_of_the_prefill() -> None:
    events = [
        arrival(10.0, "a", 30.0),
        ready(10.0, "a", 1.0),
        start(10.0, 0, "a"),
        suspend(11.005, 0, "a", "b", readable_s=None),
        GiveBack(12.0, 0, ["a"], 7),
        ready(12.0, "a", 5.0),
        start(13.0, 1, "a"),
        complete(14.0, 1, "a"),
    ]
    a = told(Outcomes(decodes=True), events)["a"]
    assert (a.suspensions, a.suspended_s) == (1, pytest.approx(1.0))
    assert a.predicted_s == 1.0, "as it was admitted"
    assert a.course.took_s is None, "it ran twice"


def test_suspensions_of_a_stream_that_is_computed_again_are_none_of_its_answers() -> None:
    """The answer says what delayed the first token, and a log that is read as a whole says the same."""
    events = [
        arrival(10.0, "a", 30.0),
        ready(10.0, "a", 1.0),
        start(10.0, 0, "a"),
        suspend(10.505, 0, "a", "b", readable_s=None),
        Resume(11.0, 0, ["a"], 7),
        complete(12.0, 0, "a"),
        start(13.0, 1, "a"),  # it was retracted
        suspend(13.505, 1, "a", "b", readable_s=None),
        Resume(15.0, 1, ["a"], 7),
        complete(16.0, 1),
        Leave(17.0, "a"),
    ]
    outcome = told(Outcomes(decodes=True), events)["a"]
    [request] = History.of([Log(9.0, "0.1.0", decodes=True), *events]).requests
    assert outcome.suspensions == request.suspensions == 1
    assert outcome.suspended_s == pytest.approx(0.5)
    assert [task.suspensions for task in request.tasks] == [1, 1]


def test_only_a_prefill_that_ran_by_itself_tells_how_long_a_request_takes() -> None:
    events = [arrival(10.0, "a", 30.0), arrival(10.0, "b", 30.0), start(10.1, 0, "a", "b"), complete(11.1, 0, "a", "b")]
    by_rid = told(Outcomes(decodes=True), events)
    assert by_rid["a"].course.took_s is by_rid["b"].course.took_s is None
    alone = told(Outcomes(decodes=True), [events[0], start(10.1, 0, "a"), complete(11.1, 0, "a")])
    assert alone["a"].course.took_s == 1.0


def test_prefills_that_ended_before_the_scheduler_read_of_a_request_count_if_it_could_have_run() -> None:
    """A prefill ends 0.9 s late between the time when the request could be run and its reading."""

    def cause(readable_s: float) -> Cause | None:
        events = [
            arrival(9.0, "other", 30.0),
            ready(9.0, "other", 0.1),
            start(9.0, 0, "other", predicted_s=0.1),
            arrival(9.1, "a", 11.0),
            complete(10.0, 0, "other"),
            ready(10.1, "a", 0.5, readable_s=readable_s),
            start(10.8, 1, "a", predicted_s=0.5),
            complete(11.3, 1, "a", forward_s=0.5),
        ]
        return told(Outcomes(decodes=True), events)["a"].cause

    assert cause(readable_s=9.9) is Cause.MISPREDICTION
    assert cause(readable_s=10.05) is Cause.OVERLOAD


def test_what_is_kept_is_of_requests_under_way() -> None:
    outcomes = Outcomes(decodes=False)
    for number in range(1000):
        rid = str(number)
        for event in (arrival(number, rid, number + 9.0), ready(number, rid, 1.0), start(number, number, rid)):
            assert not outcomes.read(event)
        assert not outcomes.read(complete(number + 1.0, number, rid, forward_s=2.0))
        assert len(outcomes.read(Leave(number + 1.0, rid))) == 1
        assert len(outcomes) == 0


@pytest.mark.parametrize("decodes", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_log_read_later_tells_the_same(decodes: bool, seed: int) -> None:
    """History reads the log as a whole: its verdicts, suspensions and times are those of the server as it went."""
    events = list(made_up(random.Random(seed), decodes))
    outcomes = told(Outcomes(decodes), events)
    requests = [request for request in History.of(events).requests if request.rid in outcomes]
    assert len(requests) == len(outcomes) > 100
    assert {cause for outcome in outcomes.values() for cause in [outcome.cause]} > {None, Cause.OVERLOAD, Cause.ABORTED}
    for request in requests:
        outcome = outcomes[request.rid]
        assert (request.verdict, request.course) == (outcome.verdict, outcome.course)
        assert outcome.suspensions == request.suspensions
        suspended_s = sum(part.end_s - part.begin_s for part in request.parts if part.what == "suspended")
        assert outcome.suspended_s == pytest.approx(suspended_s)


def made_up(chance: random.Random, decodes: bool) -> Iterator[AnyEvent]:
    """Events as a server writes them: one task runs, others are suspended, and requests end in every way."""
    now_s, task, running, rids = 100.0, 0, None, {}
    suspended: list[int] = []
    waiting: list[str] = []
    leaving: list[str] = []
    for number in range(1500):
        now_s = round(now_s + chance.expovariate(10.0), 6)
        what = chance.random()
        if what < 0.25:
            rid = str(number)
            yield Arrival(now_s, rid, 100, 1.0, round(now_s + chance.uniform(0.1, 3.0), 6), now_s - 0.001)
            waiting.append(rid)
            yield Ready(now_s + 0.001, rid, now_s - chance.choice([0.0, 0.2]), 100, 0, chance.uniform(0.01, 1.0))
        elif what < 0.5 and waiting:
            winners = [waiting.pop() for _ in range(min(len(waiting), chance.choice([1, 1, 2])))]
            if running is not None:
                yield Suspend(now_s, running, rids[running], 3, winners, now_s - 0.02, now_s - 0.01, 0.02)
                suspended.append(running)
            running, rids[task] = task, winners
            yield Start(now_s, task, winners, 100, 0, chance.uniform(0.01, 1.0))
            task += 1
        elif what < 0.55 and waiting:
            yield Abort(now_s, [waiting.pop()])
        elif running is None and suspended:
            running = suspended.pop()
            yield Resume(now_s, running, rids[running], 3)
        elif what < 0.6 and running is not None:
            yield Abort(now_s, rids[running], running, 3)
            running = None
        elif what < 0.65 and running is not None:
            yield GiveBack(now_s, running, rids[running], 3)
            waiting += rids[running]
            running = None
        elif what < 0.7 and running is not None:
            yield Fail(now_s, rids[running], 500, "raised", running, 3)
            running = None
        elif what < 0.95 and running is not None:
            yield Complete(now_s, running, rids[running], 9, chance.uniform(0.01, 1.5), 1.0, 1.0, 1.0)
            leaving += rids[running]
            running = None
        elif what < 0.97 and decodes and leaving:
            waiting.append(leaving.pop())  # a stream that was retracted is computed again
        elif leaving:
            yield Leave(now_s, leaving.pop(), *(["lost"] if chance.random() < 0.1 else []))
        if decodes:
            yield Step(now_s + 0.0005, 3, now_s, None)
