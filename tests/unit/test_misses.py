"""What a missed objective is put down to."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from sgl_flowprefill.misses import Cause, Course, judge

IN_TIME = Course(
    received_s=10.0,
    deadline_s=11.0,
    arrived_s=10.01,
    ready_s=10.02,
    alone_s=0.3,
    took_s=0.3,
    computed_s=10.6,
    first_token_s=10.7,
)
END_S = 100.0


def cause(**differences: float | bool | None) -> Cause | None:
    verdict = judge(replace(IN_TIME, **differences), END_S)  # type: ignore[arg-type]
    assert verdict.met is False
    return verdict.cause


def test_a_first_token_at_the_deadline_is_in_time() -> None:
    assert judge(IN_TIME, END_S) == (True, None)
    assert judge(replace(IN_TIME, first_token_s=11.0), END_S) == (True, None)
    assert judge(replace(IN_TIME, first_token_s=11.0001), END_S).met is False


def test_a_request_that_waited_for_others_missed_by_overload() -> None:
    assert cause(computed_s=12.0, first_token_s=12.1) is Cause.OVERLOAD
    assert cause(computed_s=None, first_token_s=None, took_s=None) is Cause.OVERLOAD, "its turn has not come yet"


def test_an_objective_that_no_server_could_meet_is_named_before_all_that_came_on_top() -> None:
    late = {"computed_s": 30.0, "first_token_s": 30.1, "ready_s": 20.0, "arrived_s": 15.0}
    assert cause(alone_s=1.1, took_s=1.05, **late) is Cause.OBJECTIVE
    assert cause(alone_s=1.1, took_s=None, **late) is Cause.OBJECTIVE, "by what was predicted: it ran with others"


def test_a_request_that_took_less_than_predicted_did_not_have_too_short_an_objective() -> None:
    late = {"computed_s": 12.0, "first_token_s": 12.1}
    assert cause(alone_s=1.1, took_s=0.8, **late) is Cause.MISPREDICTION, "the scheduler gave it up too soon"


def test_a_request_that_took_longer_than_predicted_did_not_have_too_short_an_objective() -> None:
    late = {"computed_s": 11.5, "first_token_s": 11.6}
    assert cause(alone_s=0.3, took_s=1.2, overrun_s=0.9, **late) is Cause.MISPREDICTION


def test_prefills_that_ran_before_it_and_longer_than_predicted_count_only_where_they_made_the_difference() -> None:
    late = {"computed_s": 11.5, "first_token_s": 11.6}
    assert cause(overrun_s=0.5, **late) is Cause.MISPREDICTION
    assert cause(overrun_s=0.4, **late) is Cause.OVERLOAD


def test_time_that_passed_before_the_scheduler_heard_of_it_is_told_from_what_it_had_to_wait_for_then() -> None:
    late = {"computed_s": 12.0, "first_token_s": 12.1}
    assert cause(arrived_s=10.75, ready_s=10.75, **late) is Cause.LATE_ON_ARRIVAL
    assert cause(arrived_s=10.65, ready_s=10.75, **late) is Cause.NOT_READY
    assert cause(arrived_s=10.65, ready_s=10.65, **late) is Cause.OVERLOAD


def test_a_request_that_could_never_be_run_missed_for_that() -> None:
    never = {"ready_s": None, "alone_s": None, "took_s": None, "computed_s": None, "first_token_s": None}
    assert cause(**never) is Cause.NOT_READY
    assert cause(ended_s=50.0, **never) is Cause.NOT_READY, "its client gave up long after"


def test_kv_cache_that_comes_too_late_of_a_prefill_that_was_in_time_is_the_transfer() -> None:
    assert cause(first_token_s=11.3) is Cause.TRANSFER
    assert cause(first_token_s=None) is Cause.TRANSFER, "it has not come yet"
    assert cause(first_token_s=None, ended_s=40.0, failed=True) is Cause.TRANSFER


@pytest.mark.parametrize("computed_s", [None, 10.6], ids=["waiting", "being sent"])
def test_what_ends_before_it_is_due_is_aborted_or_failed(computed_s: float | None) -> None:
    ended = replace(IN_TIME, computed_s=computed_s, first_token_s=None, ended_s=10.9)
    assert judge(ended, END_S) == (None, Cause.ABORTED)
    assert judge(replace(ended, failed=True), END_S) == (False, Cause.FAILED)
    assert judge(replace(ended, failed=True, invalid=True), END_S) == (None, Cause.INVALID)


def test_nothing_is_said_of_a_request_that_is_under_way_and_not_due() -> None:
    under_way = replace(IN_TIME, computed_s=None, first_token_s=None)
    assert judge(under_way, 10.99) == (None, None)
    assert judge(under_way, 11.01) == (False, Cause.OVERLOAD)
