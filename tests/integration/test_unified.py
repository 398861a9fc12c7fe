"""A server that prefills and decodes gives the answers of SGLang's own scheduler, whatever runs between what, and its
event log has one end of every request, in every test here.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.bench.metrics.event_log import summarise_log
from sgl_flowprefill.events import AnyEvent, Shed, Start, read_events
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.timeline import History
from tests.engine import FIRST_START_S
from tests.exploring import serve_and_explore
from tests.faults import FAULTS, STEP_PLACES
from tests.prompts import prompt
from tests.remote import Remote
from tests.unified_asks import Ask, asks, outgrowing, without_penalties
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine, flush_log, log_to, reports_of
from tests.unified_rounds import MANY, Rounds, play_and_flush
from tests.unified_scenarios import aborts, changes, common, failures, kv_cache, serving

ASKS = asks(60, seed=3)
"""More than most tests need: SGLang computes each of them alone."""
FEW_ASKS = ASKS[:26]
"""Of all kinds."""
CONTEXT_TOKENS = 8192
"""SGLang's checks of the KV pool look at a whole row of each request and at all that is free, in every turn."""
AMPLE_TOKENS = 12_000
SMALL_POOL_TOKENS = 4000
SMALL_ASKS = asks(40, seed=4, longest_tokens=1500, longest_answer_tokens=60, always_ignore_eos=True)
FEW_SMALL_ASKS = asks(16, seed=4, longest_tokens=1500, longest_answer_tokens=40, always_ignore_eos=True)
PLAIN_ASKS = [Ask(tuple(prompt(600 + i, 90 + 80 * i)), 24, (("ignore_eos", True),)) for i in range(6)]
"""What tests of stops learn from where answers can be stopped."""


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    remote = Remote(StockEngine, str(embedded_model_path()), context_length=CONTEXT_TOKENS)
    yield Stock(remote)
    remote.close()


def started(max_total_tokens: int, environment: Mapping[str, str] | None = None, **server_args: Any) -> closing[Remote]:
    return closing(
        Remote(
            UnifiedEngine,
            str(embedded_model_path()),
            environment,
            is_warm=environment is None,
            first_start_s=FIRST_START_S,
            max_total_tokens=max_total_tokens,
            context_length=CONTEXT_TOKENS,
            **server_args,
        )
    )


@pytest.fixture(scope="module")
def unified_engine() -> Iterator[Remote]:
    with started(AMPLE_TOKENS) as remote:
        yield remote


@pytest.fixture(scope="module")
def small_engine() -> Iterator[Remote]:
    with started(SMALL_POOL_TOKENS) as remote:
        yield remote


@pytest.fixture(scope="module")
def tight_engine() -> Iterator[Remote]:
    with started(kv_cache.TIGHT_TOKENS, schedule_conservativeness=0.0) as remote:
        yield remote


@pytest.fixture
def event_log(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@contextmanager
def logged(remote: Remote, event_log: Path) -> Iterator[Remote]:
    """``remote``, whose event log has an end of each request that has arrived and tells what answers have told, when
    a test is done with it.
    """
    remote.call(log_to, event_log)
    yield remote
    events = events_of(remote, event_log)
    ends_of(events)
    assert summarise_log(events).without_end == 0
    reports, still_to_say = remote.call(reports_of)
    assert still_to_say == 0
    assert_told(events, reports)


def assert_told(events: list[AnyEvent], reports: Mapping[str, list[dict[str, Any] | None]]) -> None:
    """Answers have said of their requests what the event log says, read as a whole. Requests that are refused past the
    output streamer have no answer that could say so.
    """
    logged = defaultdict(list)
    for request in History.of(events).requests:
        logged[request.rid].append(request)
    assert reports.keys() == logged.keys()
    for rid, requests in logged.items():
        for request, told in zip(requests, reports[rid], strict=True):
            if told is None:
                continue
            arrival, course = request.arrival, request.course
            suspended = [part for part in request.parts if part.what == "suspended"]  # until its first token
            assert (told["ttft_slo_s"], told["slo_class"]) == (arrival.ttft_slo_s, arrival.slo_class)
            assert (told["met"], told["cause"]) == (request.verdict.met, request.verdict.cause)
            assert told["predicted_s"] == course.alone_s
            assert told["suspensions"] == request.suspensions
            assert told["suspended_s"] == pytest.approx(sum(part.end_s - part.begin_s for part in suspended), abs=2e-6)
            if request.first_token_s is None:
                assert told["ttft_s"] is None
            else:
                assert told["ttft_s"] == pytest.approx(request.first_token_s - arrival.received_s, abs=2e-6)


@pytest.fixture
def unified(unified_engine: Remote, event_log: Path) -> Iterator[Remote]:
    with logged(unified_engine, event_log) as remote:
        yield remote


@pytest.fixture
def small(small_engine: Remote, event_log: Path) -> Iterator[Remote]:
    """Barely enough KV cache."""
    with logged(small_engine, event_log) as remote:
        yield remote


@pytest.fixture
def tight(tight_engine: Remote, event_log: Path) -> Iterator[Remote]:
    """Not enough KV cache, if it is not given to the right ones. None is reserved for answers that may end early."""
    with logged(tight_engine, event_log) as remote:
        yield remote


def events_of(remote: Remote, event_log: Path) -> list[AnyEvent]:
    """All that has happened in a test so far."""
    remote.call(flush_log)
    return list(read_events(event_log))


def ends_of(events: list[AnyEvent]) -> dict[str, str]:
    """Kind of the last end of each request. Each arrival has one end, which comes after it, and nothing else has."""
    under_way: set[str] = set()
    ends: dict[str, str] = {}
    for event in events:
        if event.kind == "arrival":
            assert event.rid not in under_way, f"{event.rid} arrives twice"
            under_way.add(event.rid)
        elif event.kind in ("complete", "abort", "fail"):
            for rid in event.rids:
                assert rid in under_way, f"{rid} ends with {event.kind}, and has ended or not arrived"
                under_way.remove(rid)
                ends[rid] = event.kind
    assert not under_way, f"no end of {under_way} in the log"
    return ends


@pytest.fixture
def comparison(stock: Stock) -> Iterator[StockComparison]:
    comparison = StockComparison(stock)
    yield comparison
    print(f"\n{comparison}")


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requests", [len(FEW_ASKS), pytest.param(len(ASKS), marks=pytest.mark.stress)])
def test_the_policy_serves_requests_of_all_kinds(unified: Remote, comparison: StockComparison, requests: int) -> None:
    asked = {f"p{i}": ask for i, ask in enumerate(ASKS[:requests])}
    played = unified.call(serving.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == len(asked)
    kinds = {name for ask in asked.values() for name, _ in ask.sampling}
    assert {"frequency_penalty", "repetition_penalty", "regex", "min_new_tokens"} <= kinds
    assert {0, 1} <= {ask.max_new_tokens for ask in asked.values()}


def test_stop_tokens_end_answers_where_they_do_on_sglang(
    unified: Remote, comparison: StockComparison, stock: Stock
) -> None:
    """Each request is asked to stop at what it says itself."""
    answers = stock.answers(PLAIN_ASKS)
    asked = {}
    for i, ask in enumerate(PLAIN_ASKS):
        tokens = answers[ask].tokens
        asked[f"t{i}"] = Ask(ask.prompt, 20, (("stop_token_ids", (tokens[7],)),))
    played = unified.call(serving.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert all(answer.reason == "stop" for answer in played.answers.values())


def test_stop_strings_end_answers_where_they_do_on_sglang(
    unified: Remote, comparison: StockComparison, stock: Stock
) -> None:
    """Each request is asked to stop at some characters of what it says itself, whatever tokens they are in."""
    answers = stock.answers(PLAIN_ASKS)
    texts = stock.call(serving.texts, [answers[ask].tokens for ask in PLAIN_ASKS])
    asked = {}
    for i, (ask, text) in enumerate(zip(PLAIN_ASKS, texts, strict=True)):
        begin = len(text) // 3 + i
        asked[f"w{i}"] = Ask(ask.prompt, 24, (("ignore_eos", True), ("stop", text[begin : begin + 5])))
    played = unified.call(serving.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    for rid, ask in asked.items():
        answer = played.answers[rid]
        assert (answer.reason, answer.detail) == ("stop", dict(ask.sampling)["stop"])
        assert len(answer.tokens) < 24


def test_requests_that_sglang_refuses_get_its_words_and_its_status(
    unified: Remote, comparison: StockComparison
) -> None:
    asked = {
        "too long": Ask(tuple(prompt(630, 70_000))),
        "log probabilities of no token": Ask(tuple(prompt(631, 50)), inputs_from=60),
        "fine": Ask(tuple(prompt(633, 50))),
    }
    played = unified.call(serving.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert comparison.counts["refusals"] == 2
    ends = {rid: (answer.reason, answer.status, answer.tokens) for rid, answer in played.answers.items()}
    assert ends.pop("fine")[0] != "abort"
    assert set(ends.values()) == {("abort", 400, ())}, played.answers


def test_the_second_turn_of_a_chat_finds_the_decoded_tokens_of_the_first_in_the_cache(
    unified: Remote, comparison: StockComparison, stock: Stock
) -> None:
    played, asked = unified.call(serving.chat)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert played.seen["beside: suspended"] == 1, dict(played.seen)
    cached_tokens = played.answers["second"].cached_tokens
    assert cached_tokens == stock.call(serving.chat_alone).cached_tokens
    # Nothing was computed of the last token, behind which no other one was asked for.
    assert cached_tokens == len(serving.FIRST_TURN.prompt) + serving.FIRST_TURN.max_new_tokens - 1


@pytest.mark.stress  # the rounds of the next test have aborts, too
@pytest.mark.parametrize("seed", range(3))
def test_steps_and_suspensions_at_random_points_change_no_answer(
    unified: Remote, comparison: StockComparison, seed: int
) -> None:
    seen: Counter[str] = Counter()
    for number in range(seed, 30, 3):
        rng = random.Random(number)
        asked = {f"c{i}": rng.choice(FEW_ASKS) for i in range(8)}
        played = unified.call(play_and_flush, asked, set(), number, rng.choice([0.1, 0.4, 0.9]))
        comparison.compare(asked, played.answers)
        comparison.assert_same()
        seen += played.seen
        # How many fit in depends on the machine's speed.
        if seen["steps inside prefills"] >= 10 and seen["suspensions"] >= 5 and seen["checks of the KV pool"] >= 100:
            break
    print(dict(seen))
    assert seen["steps inside prefills"] >= 10
    assert seen["suspensions"] >= 5
    assert seen["checks of the KV pool"] >= 100


@pytest.mark.parametrize(
    ("pool", "least_rounds", "inside"),
    [
        pytest.param(FEW_ASKS, 3, 60, id="few"),
        pytest.param(ASKS, 6, 100, id="many", marks=pytest.mark.stress),
    ],
)
def test_rounds_of_steps_suspensions_and_aborts_change_no_answer(
    unified: Remote, comparison: StockComparison, pool: list[Ask], least_rounds: int, inside: int
) -> None:
    rounds = Rounds(unified, comparison, pool)
    rounds.run(least_rounds)
    for number in range(least_rounds, 30):
        has_steps = rounds.seen["steps inside prefills"] >= inside  # how many fit in depends on the machine's speed
        counts = comparison.counts
        if has_steps and counts["log probabilities of prompts"] >= 300 and counts["aborts"] >= 3:
            break
        rounds.run(1, first=number)
    print(rounds)
    assert rounds.seen["steps inside prefills"] >= inside
    assert rounds.seen["suspensions"] >= 5
    assert rounds.seen["checks of the KV pool"] >= 100
    assert comparison.counts["aborts"] >= 3
    assert comparison.counts["log probabilities of prompts"] >= 300


@pytest.mark.stress
def test_rounds_of_steps_whose_tokens_come_late_change_no_answer(unified: Remote, comparison: StockComparison) -> None:
    """While a step is in flight, prefills start, run and end, and requests are aborted."""
    rounds = Rounds(unified, comparison, ASKS, late=True)
    ended = "prefills that ended while a step was in flight"
    for number in range(300, 312):  # how many end so is a matter of times
        if number >= 304 and rounds.seen[ended] >= 3:
            break
        rounds.run(1, first=number)
    print(rounds)
    assert rounds.seen["steps behind which prefills ran"] >= 50
    assert rounds.seen[ended] >= 3
    assert comparison.counts["aborts"] >= 2
    assert comparison.counts["answers"] >= 15


def test_rounds_of_steps_that_are_queued_behind_those_in_flight_change_no_answer(
    unified: Remote, comparison: StockComparison
) -> None:
    """Streams of which none needs its last token on the host get steps ahead, until others join or one ends."""
    plain = [ask for ask in ASKS if {name for name, _ in ask.sampling} <= {"ignore_eos"}]
    rounds = Rounds(unified, comparison, [*4 * plain, *ASKS], ahead=True)
    for number in range(500, 520):
        if number >= 503 and rounds.seen["steps ahead"] >= 60 and rounds.seen["tokens of streams that have ended"] >= 5:
            break
        rounds.run(1, first=number)
    print(rounds)
    assert rounds.seen["steps ahead"] >= 60
    assert rounds.seen["tokens of streams that have ended"] >= 5
    assert comparison.counts["answers"] >= 15


@pytest.mark.parametrize(
    "pool",
    [pytest.param(FEW_SMALL_ASKS, id="few"), pytest.param(SMALL_ASKS, id="many", marks=pytest.mark.stress)],
)
def test_rounds_with_barely_enough_kv_cache_change_no_answer(
    small: Remote, comparison: StockComparison, pool: list[Ask]
) -> None:
    rounds = Rounds(small, comparison, pool)
    rounds.run(4, first=100)
    print(rounds)
    assert comparison.counts["answers"] >= 12


def test_rounds_in_which_prefills_are_given_back_change_no_answer(tight: Remote, comparison: StockComparison) -> None:
    rounds = Rounds(tight, comparison, outgrowing(24, seed=4), requests=MANY)
    for number in range(600, 620):  # in the first ones, prefills are suspended at most interruption points
        rounds.run(1, first=number)
        if rounds.seen["given back"] >= 2:
            break
    print(rounds)
    assert rounds.seen["given back"] >= 2


@pytest.mark.stress
def test_streams_that_are_retracted_all_the_time_get_the_same_answers(comparison: StockComparison) -> None:
    with started(2 * SMALL_POOL_TOKENS, {"SGLANG_TEST_RETRACT": "1"}) as remote:
        rounds = Rounds(remote, comparison, without_penalties(SMALL_ASKS))
        rounds.run(4, first=200)
    print(rounds)
    assert rounds.seen["retractions"] >= rounds.seen["retractions told"] >= 10


# ---- decode steps beside prefills ------------------------------------------------------------------------------------


def test_a_stream_gets_its_tokens_while_a_long_prompt_is_prefilled(
    unified: Remote, comparison: StockComparison
) -> None:
    tbt_slo_s = 0.1
    gaps = unified.call(serving.stream_beside_a_long_prompt, tbt_slo_s)
    comparison.compare(gaps.asked, gaps.play.answers)
    comparison.assert_same()
    print(gaps.longest_gap_s, gaps.prefill_s, gaps.steps_inside)
    assert gaps.prefill_s > 3 * gaps.longest_gap_s
    assert gaps.steps_inside >= gaps.prefill_s / tbt_slo_s - 1
    assert gaps.longest_gap_s < 0.4


# ---- KV cache --------------------------------------------------------------------------------------------------------


def test_a_prefill_gives_its_kv_cache_to_streams_and_no_stream_is_retracted(
    tight: Remote, comparison: StockComparison
) -> None:
    played = tight.call(kv_cache.streams_without_room)
    comparison.compare(kv_cache.GROWING | kv_cache.LATE, played.answers)
    comparison.assert_same()
    assert played.seen["given back"] == 1
    assert played.seen["retractions"] == played.seen["retractions told"] == 0


def test_a_prefill_that_was_given_back_is_not_again_where_a_stream_can_be_retracted(
    tight: Remote, comparison: StockComparison
) -> None:
    played = tight.call(kv_cache.streams_without_room_again)
    comparison.compare(kv_cache.GROWING | kv_cache.LATE | kv_cache.FREES, played.answers)
    comparison.assert_same()
    assert played.seen["given back"] == 1
    assert played.seen["retractions"] == played.seen["retractions told"] == 1


def test_the_last_stream_goes_on_when_a_prefill_whose_result_is_on_its_way_has_the_rest(
    unified: Remote, comparison: StockComparison
) -> None:
    played, asked = unified.call(kv_cache.last_stream_beside_a_result_on_its_way)
    assert played.seen["goes: ended"] == 1, dict(played.seen)
    comparison.compare(asked, played.answers)
    comparison.assert_same()


def test_admission_reserves_what_started_prefills_will_answer(tight: Remote, comparison: StockComparison) -> None:
    played = tight.call(kv_cache.starts_of_all_that_is_admitted)
    comparison.compare(kv_cache.RESERVED, played.answers)
    comparison.assert_same()
    assert played.seen["given back"] == played.seen["retractions"] == 0


def test_a_request_for_which_there_is_no_room_on_an_empty_server_is_refused_and_nobody_waits_behind_it(
    tight: Remote, comparison: StockComparison, event_log: Path
) -> None:
    played = tight.call(kv_cache.never_admitted)
    assert played.seen["stays: decoding"] == played.seen["no room: waiting"] == 1, dict(played.seen)
    refused = played.answers.pop("no room")
    assert (refused.reason, refused.status, refused.tokens) == ("abort", 400, ())
    room = f"prompt has {len(kv_cache.NO_ROOM.prompt)} tokens, .* {kv_cache.TIGHT_TOKENS} tokens in pages of 1,"
    assert re.search(room + ".* --mem-fraction-static", refused.detail)
    asked = {"stays": common.STREAM, "behind": kv_cache.BEHIND}
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    events = events_of(tight, event_log)
    assert ends_of(events) == dict.fromkeys(asked, "complete") | {"no room": "fail"}
    assert not any(isinstance(event, Start) and "no room" in event.rids for event in events)


def test_what_never_fits_by_the_size_of_the_pool_is_refused_when_it_arrives(comparison: StockComparison) -> None:
    with started(kv_cache.TIGHT_TOKENS, disable_radix_cache=True) as remote:
        played = remote.call(serving.serve, kv_cache.FIXED)
    refused = played.answers.pop("clipped")
    assert (refused.reason, refused.status, refused.tokens) == ("abort", 400, ())
    prompt_tokens, room_tokens = len(kv_cache.FIXED["clipped"].prompt), kv_cache.TIGHT_TOKENS
    assert f"prompt has {prompt_tokens} tokens, its answer may have 58, and there is room for {room_tokens} tokens" in (
        refused.detail
    )
    comparison.compare({rid: kv_cache.FIXED[rid] for rid in ("fits", "behind")}, played.answers)
    comparison.assert_same()


# ---- overload --------------------------------------------------------------------------------------------------------


def test_an_overloaded_server_refuses_what_may_be_refused_and_cannot_be_met_before_it_computes_any_of_it(
    unified: Remote, comparison: StockComparison, event_log: Path
) -> None:
    played = unified.call(serving.shed)
    refused = played.play.answers.pop("goes")
    served = {rid: ask for rid, ask in played.asked.items() if rid != "goes"}
    comparison.compare(served, played.play.answers)
    comparison.assert_same()
    events = events_of(unified, event_log)
    assert ends_of(events) == dict.fromkeys(served, "complete") | {"goes": "fail"}
    [shed] = [event for event in events if isinstance(event, Shed)]
    assert (refused.reason, refused.status, shed.rid) == ("abort", 429, "goes")
    assert f"Try again after {shed.retry_after_s} s" in refused.detail
    assert shed.retry_after_s >= shed.backlog_s > 0
    assert not any(isinstance(event, Start) and "goes" in event.rids for event in events)
    assert played.counted["shed"] == 1


# ---- aborts ----------------------------------------------------------------------------------------------------------


PREFILL_HAS_RUN = ("joining", "decoding", "step in flight", "retracted")


@pytest.mark.parametrize("state", aborts.STATES)
def test_an_abort_ends_a_request_in_any_state_and_harms_nobody(
    unified: Remote, comparison: StockComparison, event_log: Path, state: str
) -> None:
    played = unified.call(aborts.abort_in, state)
    assert played.seen[state] == 1, dict(played.seen)
    assert played.answers["goes"].reason == "abort"
    asked = {"stays": common.STREAM} | ({"urgent": common.URGENT} if state == "suspended" else {})
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    events = events_of(unified, event_log)
    end = "complete" if state in PREFILL_HAS_RUN else "abort"
    assert ends_of(events) == dict.fromkeys(asked, "complete") | {"goes": end}
    assert ("give_back" in {event.kind for event in events}) == (state == "given back")


def test_an_abort_of_all_ends_what_is_waiting_suspended_joining_and_decoding(unified: Remote) -> None:
    played = unified.call(aborts.abort_all_with_everything_in_flight)
    print(dict(played.seen))
    assert {answer.reason for answer in played.answers.values()} == {"abort"}
    assert len(played.answers) == 4


# ---- prefills that fail ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error", "memory"])
def test_a_prefill_that_fails_ends_its_own_request_and_leaves_nothing_behind(
    unified: Remote, comparison: StockComparison, event_log: Path, fault: str
) -> None:
    failed = unified.call(failures.fail, fault)
    assert failed.play.seen["decoding"] == failed.play.seen["suspended"] == 1, dict(failed.play.seen)
    assert_logged(failed, "bad", type(FAULTS[fault]()).__name__)
    comparison.compare(failed.asked, failed.play.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == 3
    assert comparison.counts["tokens"] == sum(ask.max_new_tokens for ask in failed.asked.values())
    ends = ends_of(events_of(unified, event_log))
    assert ends == dict.fromkeys(failed.asked, "complete") | {"bad": "fail"}


def test_a_request_that_is_refused_fails_with_the_reason(unified: Remote, event_log: Path) -> None:
    answer = unified.call(serving.refuse, "too long").answers["too long"]
    assert (answer.reason, answer.status, answer.tokens) == ("abort", 400, ())
    events = events_of(unified, event_log)
    assert [event.kind for event in events] == ["arrival", "fail"], "and nothing is computed"
    assert answer.detail.startswith(events[1].reason)


def test_all_requests_of_a_batch_that_fails_are_answered_but_those_that_have_left(
    unified: Remote, comparison: StockComparison
) -> None:
    failed = unified.call(failures.fail_in_a_batch)
    assert failed.play.seen["requests of the batch"] == 3
    for rid in ("bad0", "bad2"):
        assert_logged(failed, rid, "ModelFault")
    left = failed.play.answers["bad1"]
    assert (left.reason, left.status) == ("abort", None)
    comparison.compare(failed.asked, failed.play.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == 3


@pytest.mark.parametrize(
    ("place", "times"),
    [
        *zip(STEP_PLACES, (2, 1, 2), strict=True),
        *(pytest.param(*case, marks=pytest.mark.stress) for case in zip(STEP_PLACES, (1, 2, 1), strict=True)),
    ],
)
def test_a_step_without_device_memory_takes_that_of_prefills_and_runs_again(
    unified: Remote, comparison: StockComparison, event_log: Path, place: str, times: int
) -> None:
    played = unified.call(failures.step_without_memory, place, times)
    assert (played.attempts.failed, played.play.seen["given back"]) == (times, times)
    assert played.attempts.still_held == 0, "what the failed pass held was not free for the next one"
    comparison.compare(played.asked, played.play.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == 5
    events = events_of(unified, event_log)
    assert ends_of(events) == dict.fromkeys(played.asked, "complete")
    assert sum(event.kind == "give_back" for event in events) == times


def test_a_step_without_device_memory_is_an_error_where_no_prefill_can_give_some_back(
    unified: Remote, comparison: StockComparison
) -> None:
    for place in STEP_PLACES:
        played = unified.call(failures.step_without_memory_and_prefills, place)
        assert "no prefill is suspended that could give its own back: lower --mem-fraction-static" in played.error
        assert played.error.endswith("OutOfMemoryError")
        comparison.compare(played.asked, played.play.answers)
    comparison.assert_same()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(1, 6))])
def test_steps_without_device_memory_by_chance_change_no_answer(
    unified: Remote, comparison: StockComparison, seed: int
) -> None:
    rng = random.Random(100 + seed)
    asked = {f"o{i}": rng.choice(FEW_ASKS) for i in range(12)}
    played = unified.call(failures.steps_without_memory_by_chance, asked, seed, 0.3)
    comparison.compare(asked, played.play.answers)
    comparison.assert_same()
    print(played.attempts, dict(played.play.seen))
    assert played.attempts.failed >= 3
    assert played.play.seen["given back"] >= played.attempts.failed


def assert_logged(failed: failures.Failed, rid: str, error: str) -> None:
    """The client of ``rid`` got a 500 with an id, under which the log has the traceback of ``error``."""
    answer = failed.play.answers[rid]
    assert (answer.reason, answer.status, answer.tokens) == ("abort", 500, ())
    found = re.search(r"error ([0-9a-f]{12})", answer.detail)
    assert found is not None, answer.detail
    [line] = [line for line in failed.errors if found[1] in line]
    assert rid in line
    assert "Traceback" in line
    assert error in line


# ---- what SGLang asks of a scheduler ---------------------------------------------------------------------------------


LATE = pytest.mark.parametrize("late", [False, True], ids=["", "step in flight"])


@LATE
@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_nothing_runs_in_a_pause_and_all_go_on_after_it(
    unified: Remote, comparison: StockComparison, event_log: Path, mode: str, late: bool
) -> None:
    paused = unified.call(changes.pause, mode, late)
    comparison.compare(paused.asked, paused.play.answers)
    comparison.assert_same()
    assert paused.live == paused.answered == 0
    assert paused.unanswered >= 2
    assert paused.retracted == (paused.unanswered if mode == "retract" else 0)
    assert ends_of(events_of(unified, event_log)) == dict.fromkeys(paused.asked, "complete")


def test_the_gap_in_which_a_stream_had_no_kv_cache_counts_as_one_late_token(
    unified_engine: Remote, comparison: StockComparison
) -> None:
    played, asked, counted = unified_engine.call(changes.tokens_of_retracted_streams)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert counted["retractions"] == len(asked)
    behind_the_first = sum(len(answer.tokens) - 1 for answer in played.answers.values())
    assert counted["tbt_slo_met"] + counted["tbt_slo_missed"] == behind_the_first > 30
    assert counted["tbt_slo_missed"] == len(asked)


def test_an_answer_counts_no_suspension_of_a_stream_that_is_computed_again(
    unified: Remote, comparison: StockComparison, event_log: Path
) -> None:
    played, asked = unified.call(changes.retracted_and_suspended)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    goes = next(one for one in History.of(events_of(unified, event_log)).requests if one.rid == "goes")
    assert (len(goes.tasks), goes.tasks[1].suspensions, goes.suspensions) == (2, 1, 0)


@LATE
def test_a_flush_is_refused_while_a_prefill_is_suspended_or_joins(
    unified: Remote, comparison: StockComparison, late: bool
) -> None:
    played, asked, flushed = unified.call(changes.flush_while_busy, late)
    assert not flushed
    comparison.compare(asked, played.answers)
    comparison.assert_same()


@LATE
def test_other_weights_meet_no_prefill_that_has_started(
    unified: Remote, comparison: StockComparison, late: bool
) -> None:
    played, asked, live = unified.call(changes.change_weights, late)
    assert live == 0
    comparison.compare(asked, played.answers)
    comparison.assert_same()


def test_a_suspended_prefill_times_out(unified: Remote) -> None:
    answer = unified.call(changes.time_out).answers["goes"]
    assert (answer.reason, answer.status) == ("abort", 503)


@LATE
def test_started_prefills_and_joining_requests_are_load(unified: Remote, late: bool) -> None:
    assert unified.call(changes.loads, late) == {"running": 3, "waiting": 0, "in flight": 3}


# ---- exploration -----------------------------------------------------------------------------------------------------


def test_shapes_that_are_explored_between_requests_change_no_answer(
    unified: Remote, comparison: StockComparison
) -> None:
    asked = {f"e{i}": ask for i, ask in enumerate(FEW_ASKS[-12:])}
    answers, state = unified.call(serve_and_explore, asked)
    comparison.compare(asked, answers)
    comparison.assert_same()
    print(state)
    assert comparison.counts["answers"] == len(asked)
    assert state["explored"] >= len(asked) / 2
    assert state["given_up"] >= 2
