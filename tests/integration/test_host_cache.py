"""Prefixes that come back from host memory (SGLang's hierarchical cache), under suspensions at random places.

Every copy is made as late as may be: a forward pass that does not wait for what it reads gives another answer.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.ttft import PrefillShape
from tests.chaos import Rounds, calm
from tests.engine import PrefillEngine
from tests.exploring import explore, explorer_of
from tests.host_cache import OPTIONS, POOL_TOKENS, PROMPTS, Loads
from tests.late_transfers import make_late
from tests.prompts import prompt
from tests.reference import Comparison, Reference
from tests.remote import Remote
from tests.unified_asks import Answer, Ask, asks
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_rounds import Rounds as UnifiedRounds

SUSPENSIONS = 30
"""For each load that is asked for."""
ASKS = asks(30, seed=6, longest_tokens=1500, longest_answer_tokens=40, always_ignore_eos=True)


class Late(PrefillEngine):
    """A prefill server whose copies between device and host memory are late."""

    def __init__(self) -> None:
        self.transfers = make_late(seed=1)
        super().__init__(str(embedded_model_path()), **OPTIONS)
        self.loads = Loads(self.scheduler)


class LateUnified(UnifiedEngine):
    """One that decodes, too."""

    def __init__(self) -> None:
        make_late(seed=1)
        super().__init__(str(embedded_model_path()), **OPTIONS)
        self.loads = Loads(self.scheduler)


@pytest.fixture(scope="module")
def remote() -> Iterator[Remote]:
    with closing(Remote(Late)) as remote:
        yield remote


@dataclass
class Played:
    """What became of some rounds."""

    text: str
    counts: Counter[str]
    seen: Counter[str]
    loads: int
    beside_others: int
    copies: int
    """That were made later than they were asked for."""


def play(engine: Late, rounds: int, loads: int, first: int = 0) -> Played:
    """Rounds of prompts that do not all fit on the device: what one evicts, another loads back. There are more of them
    where that takes more for SUSPENSIONS with each of ``loads``.
    """
    comparison = Comparison(Reference(embedded_model_path()))
    chance = Rounds(engine, comparison, PROMPTS)
    seen_loads = engine.loads = Loads(engine.scheduler)
    for number in range(3 * rounds):
        chance.play(random.Random(first + number))
        comparison.assert_same()
        engine.scheduler.on_idle()
        if number + 1 >= rounds and chance.seen["suspensions"] >= SUSPENSIONS * loads:
            break
    chance.close()
    engine.assert_clean()
    copies = engine.transfers.copies
    counts, seen = comparison.counts, chance.seen
    return Played(f"{chance}; {seen_loads}", counts, seen, len(seen_loads.tokens), seen_loads.beside_others, copies)


def assert_played(played: Played, loads: int) -> None:
    print(played.text)
    counts = played.counts
    assert counts["answers"] == counts["log probabilities"] == counts["KV caches"] >= loads
    assert played.loads >= loads
    assert played.copies > 0
    assert played.beside_others >= loads // 4
    assert played.seen["suspensions"] >= SUSPENSIONS * loads


@pytest.mark.stress
def test_suspended_prefills_wait_for_their_own_loads_and_for_those_whose_prefixes_they_share(remote: Remote) -> None:
    assert_played(remote.call(play, 12, 12), loads=12)


@pytest.mark.stress
def test_many_rounds_of_loads_change_no_answer_and_no_kv(remote: Remote) -> None:
    assert_played(remote.call(play, 150, 120, 1000), loads=120)


def start_beside_a_load(engine: Late) -> tuple[Comparison, int]:
    """A request comes while the load of its prefix is under way, for another one that was suspended at once."""
    comparison = Comparison(Reference(embedded_model_path()))
    chance = Rounds(engine, comparison, PROMPTS)
    engine.assert_clean()
    engine.submit("first", prompt(71, 600))
    engine.run()
    for i in range(8):
        engine.submit(f"evicts{i}", prompt(500 + i, 900))
        engine.run()
    engine.hub.executor.interrupted = lambda: True
    asked = {name: prompt(seed, 700, prompt(71, 600)) for name, seed in (("suspended", 72), ("urgent", 73))}
    engine.submit("suspended", asked["suspended"], ttft_slo_s=60.0, logprobs=True)
    while not engine.hub.work.tasks.live:
        engine.turn()
    loads = engine.scheduler.tree_cache.cache_controller.ack_load_queue
    under_way = sum(not load.finish_event.query() for load in loads)
    engine.submit("urgent", asked["urgent"], ttft_slo_s=1.0, logprobs=True)
    while "urgent" not in engine.answers:
        engine.turn()
    assert "suspended" not in engine.answers
    engine.run()
    for rid, tokens in asked.items():
        chance.compare(rid, tokens)
    chance.close()
    return comparison, under_way


def test_a_prefix_whose_load_is_under_way_is_waited_for(remote: Remote) -> None:
    comparison, under_way = remote.call(start_beside_a_load)
    assert under_way == 1
    comparison.assert_same()
    assert comparison.counts["answers"] == comparison.counts["KV caches"] == 2


@pytest.fixture(scope="module")
def unified() -> Iterator[Remote]:
    with closing(Remote(LateUnified)) as remote:
        yield remote


@pytest.fixture
def comparison() -> Iterator[StockComparison]:
    with closing(Remote(StockEngine, str(embedded_model_path()))) as stock:
        yield StockComparison(Stock(stock))


def loads_of(engine: LateUnified) -> str:
    engine.assert_clean()
    return str(engine.loads)


@pytest.mark.stress
def test_streams_that_join_behind_loads_change_no_answer(unified: Remote, comparison: StockComparison) -> None:
    rounds = UnifiedRounds(unified, comparison, ASKS, flushes=False)
    rounds.run(40)
    loads = unified.call(loads_of)
    print(f"{rounds}; {loads}")
    assert int(loads.split()[0]) >= 40
    assert comparison.counts["answers"] >= 150
    assert rounds.seen["steps inside prefills"] >= 200


SUSPENDED = Ask(tuple(prompt(72, 700, prompt(71, 600))))
STREAM = Ask(tuple(prompt(74, 50)), 60, (("ignore_eos", True),))


def step_beside_a_load(engine: LateUnified) -> tuple[dict[str, Answer], int]:
    """A decode step between two operators of a prefill whose load is under way. What is answered, and how many loads
    were under way.
    """
    engine.assert_clean()
    engine.forget()
    engine.submit("first", Ask(tuple(prompt(71, 600)), 1))
    engine.run()
    for i in range(8):
        engine.submit(f"evicts{i}", Ask(tuple(prompt(500 + i, 900)), 1))
        engine.run()
    engine.submit("stream", STREAM)
    while not engine.hub.role.streams:
        engine.turn()
    executor = engine.hub.executor
    usual, executor.interrupted = executor.interrupted, lambda: True
    engine.submit("suspended", SUSPENDED)
    while not any(task.has_run for task in engine.hub.work.tasks.live):
        engine.turn()
    loads = engine.scheduler.tree_cache.cache_controller.ack_load_queue
    under_way = sum(not load.finish_event.query() for load in loads)
    engine.hub.step()
    executor.interrupted = usual
    engine.run()
    return dict(engine.answers), under_way


@pytest.mark.stress
def test_a_prefill_waits_for_its_load_after_a_decode_step(unified: Remote, comparison: StockComparison) -> None:
    answers, under_way = unified.call(step_beside_a_load)
    assert under_way == 1
    asked = {"suspended": SUSPENDED, "stream": STREAM}
    comparison.compare(asked, {rid: answers[rid] for rid in asked})
    comparison.assert_same()
    assert comparison.counts["answers"] == 2


def step_of_a_stream_that_was_loaded(engine: LateUnified) -> tuple[dict[str, Answer], list[int]]:
    """A decode step of a stream whose own load took the counter that another one has taken since. How many loads were
    under way before it, and behind it.
    """
    engine.assert_clean()
    engine.forget()
    for rid in ("first", "other"):
        engine.submit(rid, Ask(tuple(PREFIX_OF[rid]), 1))
        engine.run()
    for i in range(8):
        engine.submit(f"evicts{i}", Ask(tuple(prompt(500 + i, 900)), 1))
        engine.run()
    engine.submit("stream", LOADED_STREAM)
    while not engine.hub.role.streams:
        engine.turn()
    controller, executor = engine.scheduler.tree_cache.cache_controller, engine.hub.executor
    controller.layer_done_counter.producer_index -= 1
    usual, executor.interrupted = executor.interrupted, lambda: True
    engine.submit("suspended", SUSPENDED)
    while not any(task.has_run for task in engine.hub.work.tasks.live):
        engine.turn()

    def loads_under_way() -> int:
        events = [load.finish_event for load in controller.ack_load_queue]
        return sum(event.stream.run < event.place for event in events)

    under_way = [loads_under_way()]
    engine.hub.step()
    under_way.append(loads_under_way())
    executor.interrupted = usual
    engine.run()
    return dict(engine.answers), under_way


PREFIX_OF = {"first": prompt(71, 600), "other": prompt(75, 600)}
LOADED_STREAM = Ask(tuple(prompt(76, 700, prompt(75, 600))), 60, (("ignore_eos", True),))


@pytest.mark.stress
def test_a_stream_waits_for_no_load(unified: Remote, comparison: StockComparison) -> None:
    answers, under_way = unified.call(step_of_a_stream_that_was_loaded)
    assert under_way == [1, 1]
    asked = {"suspended": SUSPENDED, "stream": LOADED_STREAM}
    comparison.compare(asked, {rid: answers[rid] for rid in asked})
    comparison.assert_same()


def explore_beside_a_prefix_in_host_memory(engine: Late) -> tuple[int, int]:
    """How many loads exploring took, and how many tokens of the last prompts it found on the device."""
    calm(engine)
    engine.assert_clean()
    prefix = prompt(77, 1200)
    for rid, tokens in (("first", prefix), *((f"evicts{i}", prompt(520 + i, 900)) for i in range(8))):
        engine.submit(rid, tokens)
        engine.run()
    engine.hub.role.recent_prompts.clear()
    engine.hub.role.recent_prompts.append(prefix)
    explorer = explorer_of(engine)
    before = len(engine.loads.tokens)
    found_tokens = explorer.engine.find_prefix(lambda: False)
    for _ in range(10):
        explore(engine, explorer)
    return len(engine.loads.tokens) - before, found_tokens


def test_exploration_loads_no_prefix_back(remote: Remote) -> None:
    loads, found_tokens = remote.call(explore_beside_a_prefix_in_host_memory)
    assert loads == 0
    assert found_tokens < 600


@contextmanager
def starts(engine: Late) -> Iterator[list[tuple[str, PrefillShape, PrefillShape]]]:
    """What starts meanwhile: the request, its shape as the policy judged it, and as it is computed."""
    started: list[tuple[str, PrefillShape, PrefillShape]] = []
    start = engine.hub.work.start

    def noted(now_s: float, winner: Any, batch: Any, reqs: Any, computed: Any, slot: Any) -> Any:
        started.append((winner.item.req.rid, winner.item.shape, computed[0]))
        return start(now_s, winner, batch, reqs, computed, slot)

    engine.hub.work.start = noted
    try:
        yield started
    finally:
        del engine.hub.work.start


def evict_and_match(engine: Late) -> tuple[PrefillShape, PrefillShape, int]:
    """The shape of a request, whose prefix was computed and evicted, as it arrives and as it starts; and what its
    client is told of cached tokens.
    """
    calm(engine)
    prefix = prompt(71, 600)
    engine.submit("first", prefix)
    engine.run()
    for i in range(12):
        engine.submit(f"evicts{i}", prompt(500 + i, 900))
        engine.run()
    with starts(engine) as started:
        engine.submit("again", [*prefix, *prompt(72, 100)])
        engine.run()
    [(_, predicted, computed)] = started
    return predicted, computed, engine.answers["again"].req.cached_tokens


def test_a_prefix_in_host_memory_counts_as_cached(remote: Remote) -> None:
    predicted, computed, cached_tokens = remote.call(evict_and_match)
    assert predicted == computed
    assert computed.cached_tokens == cached_tokens >= 590


def lose_a_prefix_in_host_memory(engine: Late) -> tuple[int, list[tuple[str, PrefillShape]], int]:
    """A request waits, whose prefix host memory alone has; the copy of another one takes its place there, for which the
    device need not evict anything. What was on the device before, as what the request is judged when it starts, and
    what the answer says of cached tokens.
    """
    calm(engine)
    engine.assert_clean()
    scheduler, hub, prefix = engine.scheduler, engine.hub, prompt(71, 600)
    allocator, tree = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
    engine.submit("first", prefix)
    engine.run()
    allocator.evict_to_free_tokens(tree, POOL_TOKENS)
    on_device_tokens = tree.evictable_size() + tree.protected_size()
    limits, hub.work.policy.limits = hub.work.policy.limits, Limits(max_suspended=100, max_batch_tokens=1)
    engine.submit("waits", [*prefix, *prompt(72, 100)], ttft_slo_s=60.0)
    hub.look()
    [job] = hub.work.policy.first_waiting(0.0, 9)
    assert job.item.shape.cached_tokens >= 590
    host = tree.cache_controller.mem_pool_host.anchor_entry.host_pool
    taken = host.alloc(host.available_size() - 128)
    engine.submit("other", prompt(73, 500), ttft_slo_s=20.0)
    with starts(engine) as started:
        engine.run()
    host.free(taken)
    hub.work.policy.limits = limits
    judged = [(rid, shape) for rid, shape, _ in started if rid == "waits"]
    return on_device_tokens, judged, engine.answers["waits"].req.cached_tokens


def test_a_request_whose_prefix_in_host_memory_is_evicted_while_it_waits_is_judged_by_what_is_left(
    remote: Remote,
) -> None:
    on_device_tokens, judged, cached_tokens = remote.call(lose_a_prefix_in_host_memory)
    assert on_device_tokens == 0
    assert judged == [("waits", PrefillShape(700))]
    assert cached_tokens == 0


def flush_while_transfers_are_under_way(engine: Late) -> tuple[int, bool]:
    """Transfers that had not ended when a message came that asks for an idle server, and whether that was heard."""
    calm(engine)
    engine.assert_clean()
    engine.submit("writes", prompt(81, 700))
    engine.run()
    tree = engine.scheduler.tree_cache
    engine.submit("more", prompt(82, 700))
    while not engine.answers.get("more"):
        engine.turn()
    under_way = len(tree.ongoing_write_through) + len(tree.ongoing_load_back)
    for stream in (tree.cache_controller.l2_transfer_engine.device_to_host_stream,):
        stream.synchronize()
    engine.hub.role.take_news(stalls_due=False)
    return under_way, bool(engine.scheduler.flush_cache())


def test_what_has_been_transferred_does_not_keep_a_server_busy(remote: Remote) -> None:
    under_way, flushed = remote.call(flush_while_transfers_are_under_way)
    assert under_way > 0
    assert flushed


def wake_up(engine: Late) -> bool:
    """Whether the hub, which sleeps, is woken by the end of a transfer."""
    engine.submit("last", prompt(83, 700))
    while not engine.answers.get("last"):
        engine.turn()
    engine.hub.events.clear()
    engine.hub.role.rest()
    return engine.hub.events.sleep(20.0)


def test_the_end_of_a_transfer_wakes_the_hub(remote: Remote) -> None:
    assert remote.call(wake_up)
