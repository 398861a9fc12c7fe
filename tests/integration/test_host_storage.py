"""Prefixes that come back from the storage behind SGLang's hierarchical cache, under suspensions at random places."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.chaos import Rounds, calm
from tests.prompts import prompt
from tests.reference import Comparison, Reference
from tests.remote import Remote
from tests.stored import POLICIES, StoredPrefill, StoredUnified, gate, play, policy
from tests.unified_asks import asks
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine
from tests.unified_rounds import Rounds as UnifiedRounds

POOL_TOKENS = 5000
PREFIXES = [prompt(40 + i, 200 + 60 * i) for i in range(9)]
PROMPTS = [prompt(i, len(prefix) + 20 + 37 * (i % 7), prefix) for prefix in PREFIXES for i in range(100, 104)]
"""Four for each prefix; the device has room for the prompts of some."""


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with closing(Remote(StoredPrefill, str(tmp_path_factory.mktemp("storage")), POOL_TOKENS)) as remote:
        yield remote


def store(engine: StoredPrefill, *prompts: list[int]) -> None:
    """Leave ``prompts`` in storage alone, as the policy decides."""
    calm(engine)
    engine.store(*prompts)


def ask_again(engine: StoredPrefill, seed: int = 1000) -> tuple[Comparison, int, int, str]:
    """A prompt that was computed, and flushed from device and host, is asked for, with another end."""
    first = prompt(seed, 600)
    again = prompt(seed + 1, 700, first)
    store(engine, first)
    comparison = Comparison(Reference(embedded_model_path()))
    rounds = Rounds(engine, comparison, [])
    engine.submit("again", again, logprobs=True)
    engine.run()
    rounds.compare("again", again)
    rounds.close()
    tokens = engine.from_storage("again")
    cached_tokens = engine.answers["again"].req.cached_tokens
    engine.assert_clean()
    return comparison, tokens, cached_tokens, str(engine.watched)


def test_a_flushed_prefix_comes_back_from_storage(remote: Remote) -> None:
    comparison, stored_tokens, cached_tokens, watched = remote.call(ask_again)
    print(watched)
    comparison.assert_same()
    assert comparison.counts["answers"] == comparison.counts["KV caches"] == 1
    assert stored_tokens == cached_tokens == 600


def ask_behind_a_gate(engine: StoredPrefill, policy_name: str, seed: int) -> dict[str, Any]:
    """What becomes of a request whose prefix cannot be read yet, beside one that has none in storage."""
    first, other = prompt(seed, 600), prompt(seed + 1, 300)
    store(engine, first)
    seen: dict[str, Any] = {}
    with policy(engine, policy_name, timeout_s=2.0), gate(engine) as is_open:
        since_s = time.monotonic()
        engine.submit("waits", prompt(seed + 2, 700, first), logprobs=True)
        engine.submit("other", other)
        while "other" not in engine.answers or (policy_name != "wait_complete" and "waits" not in engine.answers):
            if not engine.turn():
                assert engine.hub.events.sleep(30.0), "nobody woke the hub"
        seen["is answered behind the gate"] = "waits" in engine.answers
        seen["after_s"] = time.monotonic() - since_s
        is_open.set()
        engine.run()
    seen["tokens from storage"] = engine.from_storage("waits")
    engine.assert_clean()
    return seen


def test_a_request_waits_for_all_that_storage_has_while_others_run(remote: Remote) -> None:
    seen = remote.call(ask_behind_a_gate, "wait_complete", 2000)
    assert not seen["is answered behind the gate"]
    assert seen["tokens from storage"] == 600


def test_a_request_that_waits_for_storage_is_woken_when_its_time_is_over(remote: Remote) -> None:
    seen = remote.call(ask_behind_a_gate, "timeout", 2010)
    assert seen["is answered behind the gate"]
    assert seen["after_s"] >= 2.0
    assert seen["tokens from storage"] == 0


def test_a_request_that_need_not_wait_for_storage_does_not(remote: Remote) -> None:
    seen = remote.call(ask_behind_a_gate, "best_effort", 2020)
    assert seen["is answered behind the gate"]
    assert seen["tokens from storage"] == 0


def leave_behind_a_gate(engine: StoredPrefill) -> tuple[int, bool]:
    """Requests leave while their prefixes are read: how many waited, and whether any was answered."""
    first = prompt(91, 600)
    store(engine, first)
    with gate(engine):
        for i in range(4):
            engine.submit(f"leaves{i}", prompt(92 + i, 700, first))
        while len(engine.hub.role.reads.awaited) < 4:
            engine.turn()
        waited = len(engine.hub.role.reads.awaited)
        for i in range(4):
            engine.abort(f"leaves{i}")
        engine.turn()
        assert not engine.hub.role.reads.awaited
    engine.run()
    answered = any(answer.token is not None for answer in engine.answers.values())
    engine.assert_clean()
    return waited, answered


def test_who_leaves_while_storage_is_read_leaves_nothing_behind(remote: Remote) -> None:
    waited, answered = remote.call(leave_behind_a_gate)
    assert waited == 4
    assert not answered


def lose_what_was_matched(engine: StoredPrefill, seed: int = 3000) -> tuple[Comparison, int, int]:
    """A request waits, whose prefix is on the device and loses its place there and in host memory before it starts."""
    first = prompt(seed, 600)
    asked = prompt(seed + 1, 700, first)
    store(engine, first)
    engine.submit("there", first)
    engine.run()
    comparison = Comparison(Reference(embedded_model_path()))
    rounds = Rounds(engine, comparison, [])
    engine.hub.work.policy.pick = lambda now_s, running, admit=True: None
    engine.submit("loses", asked, logprobs=True)
    while not len(engine.hub.work.waiting):  # storage is asked for the rest of the prompt
        engine.turn()
    engine.evict()
    del engine.hub.work.policy.pick
    shape = engine.hub.role.match(engine.scheduler.waiting_queue[0])
    usual_s, engine.hub.stall_check_s = engine.hub.stall_check_s, 1e9  # which would find it startable a second later
    engine.run()
    engine.hub.stall_check_s = usual_s
    rounds.compare("loses", asked)
    rounds.close()
    tokens = engine.from_storage("loses")
    engine.assert_clean()
    return comparison, shape.cached_tokens, tokens


def test_a_prefix_that_is_lost_before_the_start_is_read_from_storage(remote: Remote) -> None:
    comparison, left_tokens, stored_tokens = remote.call(lose_what_was_matched)
    comparison.assert_same()
    assert comparison.counts["answers"] == 1
    assert left_tokens == 0
    assert stored_tokens == 600


def replace_storage(engine: StoredPrefill) -> tuple[bool, bool, int]:
    """The storage is taken from a running server, and given back."""
    from sglang.srt.managers.io_struct import AttachHiCacheStorageReqInput, DetachHiCacheStorageReqInput

    store(engine, prompt(51, 300))
    ask = engine.scheduler._request_dispatcher
    detached = ask(DetachHiCacheStorageReqInput())
    given = AttachHiCacheStorageReqInput(
        hicache_storage_backend="file",
        hicache_storage_backend_extra_config_json='{"prefetch_threshold": 64}',
        hicache_storage_prefetch_policy="wait_complete",
    )
    attached = ask(given)
    engine.submit("again", prompt(51, 300))
    engine.run()
    tokens = engine.from_storage("again")
    engine.assert_clean()
    return detached.success, attached.success, tokens


def test_a_storage_that_comes_to_a_running_server_wakes_it(remote: Remote) -> None:
    detached, attached, tokens = remote.call(replace_storage)
    assert detached
    assert attached
    assert tokens == 299


def play_rounds(engine: StoredPrefill, rounds: int, first: int, failures: float) -> tuple[str, Counter[str]]:
    comparison = Comparison(Reference(embedded_model_path()))
    chance = Rounds(engine, comparison, PROMPTS)
    seen = play(engine, chance, range(first, first + rounds), failures, comparison.assert_same)
    return f"{chance}; {dict(seen)}", seen + comparison.counts


@pytest.mark.stress
@pytest.mark.parametrize("failures", [0.0, 0.05])
def test_rounds_of_reads_change_no_answer_and_no_kv(remote: Remote, failures: float) -> None:
    text, counts = remote.call(play_rounds, 36, 1000, failures)
    print(text)
    assert counts["answers"] == counts["log probabilities"] == counts["KV caches"] >= 120
    assert counts["aborts"] >= 10
    assert counts["suspensions"] >= 1000
    assert counts["answers from storage"] >= 40
    assert min(counts[f"tokens from storage, {name}"] for name in POLICIES) >= 1000
    assert counts["turns of those beside tasks"] >= 100


@pytest.fixture
def comparison() -> Iterator[StockComparison]:
    with closing(Remote(StockEngine, str(embedded_model_path()))) as stock:
        yield StockComparison(Stock(stock))


def clean(engine: StoredUnified) -> Counter[str]:
    """Flush what is on device and host."""
    engine.assert_clean()
    return engine.watched


@pytest.mark.stress
def test_streams_that_join_behind_reads_change_no_answer(comparison: StockComparison, tmp_path: Any) -> None:
    asked = asks(30, seed=6, longest_tokens=1500, longest_answer_tokens=40, always_ignore_eos=True)
    with closing(Remote(StoredUnified, str(tmp_path), POOL_TOKENS)) as unified:
        rounds = UnifiedRounds(unified, comparison, asked, flushes=True)
        rounds.run(40)
        watched = unified.call(clean)
    print(f"{rounds}; {watched}")
    assert comparison.counts["answers"] >= 150
    assert rounds.seen["steps inside prefills"] >= 200
    assert watched["turns with requests that wait for storage"] >= 40
