"""A real scheduler explores: it measures shapes, is there at once for an arrival, and is left as it was."""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest

from sgl_flowprefill.model.embedded import VOCAB_SIZE
from tests.engine import PrefillEngine
from tests.exploring import ShortPrompts, explore, explorer_of, held
from tests.late_device import LateDevice
from tests.prompts import prompt
from tests.reference import Comparison
from tests.unit.test_ttft_learning import FITTED, PROFILE, LearnsAtOnce

LONG = prompt(801, 900)


@pytest.fixture
def cached(engine: PrefillEngine) -> Iterator[PrefillEngine]:
    """The engine, which has LONG in its radix cache."""
    engine.scheduler.flush_cache()
    engine.submit("before", LONG, logprobs=True)
    engine.run()
    yield engine
    engine.assert_clean()


def test_shapes_are_measured_and_nothing_is_left_of_them(cached: PrefillEngine, comparison: Comparison) -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    explorer = explorer_of(cached, ttft)
    before, rows = held(cached), len(ttft.journal.reservoir)
    for _ in range(12):
        assert explore(cached, explorer)
        assert held(cached) == before
    state = explorer.state()
    print(f"\n{state}")
    assert (state["explored"], state["given_up"]) == (12, 0)
    # The made-up profile is another machine's: what is far from it is believed when it has come again.
    assert len(ttft.journal.reservoir) - rows == ttft.journal.explored_rows
    assert ttft.journal.explored_rows + ttft.journal.refused == 12
    assert set(cached.answers) == {"before"}, "nobody was answered"

    cached.submit("again", LONG, logprobs=True)
    cached.run()
    assert cached.answers["again"].req.cached_tokens >= len(LONG) - 64, "the cached prefix was evicted"
    for rid, answer in cached.answers.items():
        comparison.answer(rid, LONG, [answer.token], [answer.logprob])
    comparison.assert_same()


def test_shapes_with_a_cached_prefix_are_explored_where_one_is_cached(cached: PrefillEngine) -> None:
    seen: list[tuple[int, int]] = []
    explorer = explorer_of(cached)
    make_batch = explorer.engine.make_batch

    def noted(shape: Any) -> Any:
        batch = make_batch(shape)
        seen.extend(zip(explorer.engine.shapes(batch), shape, strict=True))
        return batch

    explorer.engine.make_batch = noted  # type: ignore[method-assign]
    for _ in range(40):
        explore(cached, explorer)
        if sum(asked.cached_tokens > 0 for _, asked in seen) >= 5:
            break
    print(f"\n{len(seen)} requests")
    assert sum(asked.cached_tokens > 0 for _, asked in seen) >= 5
    for found, asked in seen:
        # A random token may happen to go on as a cached prompt does.
        assert abs(found.cached_tokens - asked.cached_tokens) <= 2
    cached.scheduler.flush_cache()
    seen.clear()
    for _ in range(10):
        explore(cached, explorer)
    assert seen
    assert not any(asked.cached_tokens for _, asked in seen), "made with a prefix that is gone"


def test_a_prefix_ends_where_an_image_begins(cached: PrefillEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang has ids there that are no tokens. Here that is said of the last token, which the engine can compute."""
    image = VOCAB_SIZE - 1
    text = [token for token in prompt(802, 700) if token != image][:600]
    recent = cached.hub.role.recent_prompts
    recent.clear()
    cached.submit("image", [*text, *[image] * 64, *text])
    cached.run()
    assert [len(tokens) for tokens in recent] == [1264]
    monkeypatch.setattr(cached.scheduler.model_config, "vocab_size", image)
    engine = ShortPrompts(cached.hub.role)
    assert engine.find_prefix() == 599, "all of the text but the token that SGLang always computes"
    assert engine.cached_prompt == text[:-1]
    recent.clear()
    recent.append([image] * 64)
    assert engine.find_prefix() == 0


def test_the_look_for_a_prefix_ends_between_two_prompts(cached: PrefillEngine) -> None:
    recent, engine = cached.hub.role.recent_prompts, ShortPrompts(cached.hub.role)
    recent.clear()
    for number, tokens in enumerate((200, 400, 600)):
        cached.submit(f"recent{number}", prompt(810 + number, tokens))
        cached.run()
    assert [len(tokens) for tokens in recent] == [200, 400, 600]
    assert engine.find_prefix() == 599
    for looks, found in ((0, 0), (1, 199), (2, 399)):
        events = iter([False] * looks + [True])
        assert engine.find_prefix(lambda events=events: next(events)) == found
        assert len(engine.cached_prompt) == found


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.stress) for seed in range(2, 6))])
def test_an_arrival_ends_it_at_the_next_interruption_point(
    cached: PrefillEngine, comparison: Comparison, seed: int, late: bool
) -> None:
    rng = random.Random(seed)
    if late:
        cached.use(LateDevice(2, seed))
    executor, stopping_s = cached.hub.executor, [0.0]
    for number in range(4):
        # Anywhere in the reference or in the shape behind it.
        left = points = rng.randrange(1, 4 * cached.hub.work.progress.checkpoints)
        arrived_s = math.inf

        def arrives() -> bool:
            nonlocal left, arrived_s
            left -= 1
            if left <= 0:
                arrived_s = time.perf_counter()
            return left <= 0

        before, passed, interrupted = held(cached), executor.points_passed, executor.interrupted
        explorer = explorer_of(cached)
        executor.interrupted = executor.ends_waiting = arrives
        explore(cached, explorer)
        stopping_s.append(time.perf_counter() - arrived_s)
        executor.interrupted = executor.ends_waiting = interrupted
        state = explorer.state()
        assert state["explored"] + state["given_up"] == 1
        assert executor.points_passed - passed <= points
        assert state["given_up"] == (left <= 0)
        assert held(cached) == before
        rid, tokens = f"{seed}-{number}", prompt(900 + 10 * seed + number, 300)
        cached.submit(rid, tokens, logprobs=True)
        cached.run()
        comparison.answer(rid, tokens, [cached.answers[rid].token], [cached.answers[rid].logprob])
    comparison.assert_same()
    print(f"\nfrom an arrival at an interruption point until the hub looks: at most {1e3 * max(stopping_s):.1f} ms")


def test_a_shape_that_fails_leaves_nothing_and_is_the_last(
    cached: PrefillEngine, comparison: Comparison, caplog: pytest.LogCaptureFixture
) -> None:
    explorer = explorer_of(cached)
    before, run_batch = held(cached), cached.scheduler.run_batch
    mlp = cached.scheduler.tp_worker.model_runner.model.model.layers[3].mlp
    handle = mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    try:
        with caplog.at_level(logging.WARNING):
            assert explore(cached, explorer)
    finally:
        handle.remove()
    assert cached.scheduler.run_batch is run_batch
    assert "out of luck" in caplog.text
    assert explorer.state()["share"] == 0
    assert not explore(cached, explorer)
    assert held(cached) == before
    cached.submit("after", LONG, logprobs=True)
    cached.run()
    comparison.answer("after", LONG, [cached.answers["after"].token], [cached.answers["after"].logprob])
    comparison.assert_same()


def test_nothing_runs_while_the_server_is_paused_or_its_weights_are_away(cached: PrefillEngine) -> None:
    scheduler, explorer = cached.scheduler, explorer_of(cached)
    scheduler._engine_paused = True
    assert not explore(cached, explorer)
    scheduler._engine_paused = False
    scheduler.weight_updater.offload_tags.add("weights")
    assert not explore(cached, explorer)
    scheduler.weight_updater.offload_tags.clear()
    assert explore(cached, explorer)


def test_cached_prefixes_stay_where_the_kv_cache_is_full_of_them(cached: PrefillEngine) -> None:
    scheduler = cached.scheduler
    allocator = scheduler.token_to_kv_pool_allocator
    taken = allocator.alloc(int(allocator.available_size()) - 300)
    explorer = explorer_of(cached)
    before = held(cached)
    for _ in range(10):
        explore(cached, explorer)
        assert held(cached) == before
    assert explorer.state()["explored"] >= 1
    allocator.free(taken)
    cached.scheduler.flush_cache()
