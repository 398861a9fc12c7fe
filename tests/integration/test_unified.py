"""A server that prefills and decodes gives the answers of SGLang's own scheduler, whatever runs between what."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests import unified_scenarios as scenarios
from tests.prompts import prompt
from tests.remote import Remote
from tests.unified_asks import Ask, asks, without_penalties
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_rounds import Rounds, play_and_flush

ASKS = asks(60, seed=3)
SMALL_POOL_TOKENS = 4000
SMALL_ASKS = asks(40, seed=4, longest_tokens=1500, longest_answer_tokens=60, always_ignore_eos=True)


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    remote = Remote(StockEngine, str(embedded_model_path()))
    yield Stock(remote)
    remote.close()


@pytest.fixture(scope="module")
def unified() -> Iterator[Remote]:
    remote = Remote(UnifiedEngine, str(embedded_model_path()))
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def small() -> Iterator[Remote]:
    """Barely enough KV cache."""
    remote = Remote(UnifiedEngine, str(embedded_model_path()), max_total_tokens=SMALL_POOL_TOKENS)
    yield remote
    remote.close()


@pytest.fixture(scope="module")
def tight() -> Iterator[Remote]:
    """Not enough KV cache, if it is not given to the right ones."""
    remote = Remote(UnifiedEngine, str(embedded_model_path()), max_total_tokens=scenarios.TIGHT_TOKENS)
    yield remote
    remote.close()


@pytest.fixture
def comparison(stock: Stock) -> Iterator[StockComparison]:
    comparison = StockComparison(stock)
    yield comparison
    print(f"\n{comparison}")


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_the_policy_serves_requests_of_all_kinds(unified: Remote, comparison: StockComparison) -> None:
    asked = {f"p{i}": ask for i, ask in enumerate(ASKS[:30])}
    played = unified.call(scenarios.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == len(asked)
    kinds = {name for ask in asked.values() for name, _ in ask.sampling}
    assert {"frequency_penalty", "repetition_penalty", "regex", "min_new_tokens"} <= kinds
    assert {0, 1} <= {ask.max_new_tokens for ask in asked.values()}


def test_stop_strings_and_stop_tokens_end_answers_where_they_do_on_sglang(
    unified: Remote, comparison: StockComparison, stock: Stock
) -> None:
    """Each request is asked to stop at what it says itself."""
    plain = [Ask(tuple(prompt(600 + i, 100 + 90 * i)), 20, (("ignore_eos", True),)) for i in range(6)]
    asked = {}
    for i, ask in enumerate(plain):
        tokens = stock.answers([ask])[ask].tokens
        asked[f"t{i}"] = Ask(ask.prompt, 20, (("stop_token_ids", (tokens[7],)),))
    played = unified.call(scenarios.serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert all(answer.reason == "stop" for answer in played.answers.values())


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.stress) for seed in (1, 2))])
def test_steps_and_suspensions_at_random_points_change_no_answer(
    unified: Remote, comparison: StockComparison, seed: int
) -> None:
    rng = random.Random(seed)
    asked = {f"c{i}": rng.choice(ASKS) for i in range(12)}
    played = unified.call(play_and_flush, asked, set(), seed, rng.choice([0.1, 0.4, 0.9]))
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    print(dict(played.seen))
    assert played.seen["steps inside prefills"] >= 10
    assert played.seen["suspensions"] >= 5
    assert played.seen["checks of the KV pool"] >= 100


def test_rounds_of_steps_suspensions_and_aborts_change_no_answer(unified: Remote, comparison: StockComparison) -> None:
    rounds = Rounds(unified, comparison, ASKS)
    rounds.run(6)
    print(rounds)
    assert rounds.seen["steps inside prefills"] >= 100
    assert comparison.counts["aborts"] >= 3
    assert comparison.counts["log probabilities of prompts"] >= 300


def test_rounds_with_barely_enough_kv_cache_give_prefills_back_and_change_no_answer(
    small: Remote, comparison: StockComparison
) -> None:
    rounds = Rounds(small, comparison, SMALL_ASKS)
    rounds.run(6, first=100)
    print(rounds)
    assert comparison.counts["answers"] >= 20


@pytest.mark.stress
def test_streams_that_are_retracted_all_the_time_get_the_same_answers(comparison: StockComparison) -> None:
    remote = Remote(
        UnifiedEngine, str(embedded_model_path()), {"SGLANG_TEST_RETRACT": "1"}, max_total_tokens=2 * SMALL_POOL_TOKENS
    )
    with closing(remote):
        rounds = Rounds(remote, comparison, without_penalties(SMALL_ASKS))
        rounds.run(4, first=200)
    print(rounds)
    assert rounds.seen["retractions"] >= 10


# ---- decode steps beside prefills ------------------------------------------------------------------------------------


def test_a_stream_gets_its_tokens_while_a_long_prompt_is_prefilled(
    unified: Remote, comparison: StockComparison
) -> None:
    gaps = unified.call(scenarios.stream_beside_a_long_prompt, 0.1)
    comparison.compare(gaps.asked, gaps.play.answers)
    comparison.assert_same()
    print(gaps.longest_gap_s, gaps.prefill_s, gaps.steps_inside)
    assert gaps.prefill_s > 3 * gaps.longest_gap_s
    assert gaps.steps_inside >= 5
    assert gaps.longest_gap_s < 0.4


# ---- KV cache --------------------------------------------------------------------------------------------------------


def test_a_prefill_gives_its_kv_cache_to_streams_and_no_stream_is_retracted(
    tight: Remote, comparison: StockComparison
) -> None:
    played = tight.call(scenarios.streams_without_room)
    comparison.compare(scenarios.GROWING | scenarios.LATE, played.answers)
    comparison.assert_same()
    assert played.seen["given back"] == 1
    assert played.seen["retractions"] == 0


def test_admission_reserves_what_started_prefills_will_answer(tight: Remote, comparison: StockComparison) -> None:
    played = tight.call(scenarios.starts_of_all_that_is_admitted)
    comparison.compare(scenarios.RESERVED, played.answers)
    comparison.assert_same()
    assert played.seen["given back"] == played.seen["retractions"] == 0


# ---- aborts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", scenarios.STATES)
def test_an_abort_ends_a_request_in_any_state_and_harms_nobody(
    unified: Remote, comparison: StockComparison, state: str
) -> None:
    played = unified.call(scenarios.abort_in, state)
    assert played.seen[state] == 1, dict(played.seen)
    assert played.answers["goes"].reason == "abort"
    asked = {"stays": scenarios.STREAM} | ({"urgent": scenarios.URGENT} if state == "suspended" else {})
    comparison.compare(asked, played.answers)
    comparison.assert_same()


def test_an_abort_of_all_ends_what_is_waiting_suspended_joining_and_decoding(unified: Remote) -> None:
    played = unified.call(scenarios.abort_all_with_everything_in_flight)
    print(dict(played.seen))
    assert {answer.reason for answer in played.answers.values()} == {"abort"}
    assert len(played.answers) == 4


# ---- what SGLang asks of a scheduler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_nothing_runs_in_a_pause_and_all_go_on_after_it(
    unified: Remote, comparison: StockComparison, mode: str
) -> None:
    paused = unified.call(scenarios.pause, mode)
    comparison.compare(paused.asked, paused.play.answers)
    comparison.assert_same()
    assert paused.live == paused.answered == 0
    assert paused.unanswered >= 2
    assert paused.retracted == (paused.unanswered if mode == "retract" else 0)


def test_a_flush_is_refused_while_a_prefill_is_suspended_or_joins(unified: Remote, comparison: StockComparison) -> None:
    played, asked, flushed = unified.call(scenarios.flush_while_busy)
    assert not flushed
    comparison.compare(asked, played.answers)
    comparison.assert_same()


def test_other_weights_meet_no_prefill_that_has_started(unified: Remote, comparison: StockComparison) -> None:
    played, asked, live = unified.call(scenarios.change_weights)
    assert live == 0
    comparison.compare(asked, played.answers)
    comparison.assert_same()


def test_a_suspended_prefill_times_out(unified: Remote) -> None:
    answer = unified.call(scenarios.time_out).answers["goes"]
    assert (answer.reason, answer.status) == ("abort", 503)


def test_started_prefills_and_joining_requests_are_load(unified: Remote) -> None:
    assert unified.call(scenarios.loads) == {"running": 3, "waiting": 0, "in flight": 3}
