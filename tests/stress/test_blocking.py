"""How long an arrival waits until the running prefill can be suspended, and what the tiles that bound it cost.

An arrival at a random moment falls into one of the pieces between two interruption points, a long one the likelier, and
waits for its end. So the distribution of waits follows from the pieces alone, without a queue of other requests.
What is computed in tiles, and with operators whole, is compared when all is measured, of all but the longest prompts;
``test_preemption.py`` compares what suspended prefills compute.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import cycle
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers
from sgl_flowprefill.runtime.tiled_attention import prefill_backend
from sgl_flowprefill.runtime.tiles import WHOLE, Tiles
from sgl_flowprefill.ttft.online import ALL_TASKS
from tests.engine import PrefillEngine, keep_freed_memory
from tests.prompts import prompt
from tests.reference import Comparison

pytestmark = [pytest.mark.stress, pytest.mark.alone]

LENGTHS_TOKENS = (512, 2048, 8192, 32_000)
COST_RUNS = {512: 24, 2048: 24, 8192: 8, 32_000: 8}
"""Prefills by their tokens."""
MAX_BLOCKING_S = FlowPrefillConfig().max_blocking_ms * 1e-3
COMPARED_TOKENS = 8192
"""The longest prompt whose answers are compared: transformers takes long for longer ones."""


@pytest.fixture(scope="module")
def engine(shared_engine: PrefillEngine) -> PrefillEngine:
    keep_freed_memory()
    return shared_engine


def pieces_s(
    engine: PrefillEngine, tokens: int, seed: int, passing: Callable[[], object] = lambda: None
) -> list[float]:
    """Times between the interruption points of one prefill, at each of which ``passing`` is called, its start and its
    end.
    """
    assert engine.scheduler.flush_cache()
    executor = engine.scheduler.hub.executor
    points: list[float] = []

    def interrupted() -> bool:
        points.append(time.perf_counter())
        passing()
        return False

    def run(task: PrefillTask, forward: Callable[[Any], Any]) -> None:
        points.append(time.perf_counter())
        type(executor).run(executor, task, forward)
        points.append(time.perf_counter())

    with patch.object(executor, "interrupted", interrupted), patch.object(executor, "run", run):
        engine.submit(f"{tokens}-{seed}", prompt(seed, tokens), logprobs=True)
        engine.run()
    return np.diff(points).tolist()


def wait_s(pieces: list[float], quantile: float) -> float:
    """Quantile of the time from a random moment within ``pieces`` to the end of its piece."""
    whole_s = sum(pieces)
    low_s, high_s = 0.0, max(pieces)
    for _ in range(50):
        middle_s = (low_s + high_s) / 2
        longer = sum(max(0.0, piece - middle_s) for piece in pieces) / whole_s
        low_s, high_s = (middle_s, high_s) if longer > 1 - quantile else (low_s, middle_s)
    return high_s


@contextmanager
def held(engine: PrefillEngine, tiles: Tiles) -> Iterator[None]:
    """Operators run in ``tiles``, whatever the machine's speed; WHOLE: as in the original."""
    sizes = engine.scheduler.hub.tiles
    with patch.object(sizes, "now", tiles), patch.object(sizes, "follow"):
        yield


def test_waits_are_bounded_whatever_the_length(engine: PrefillEngine, comparison: Comparison) -> None:
    waits_s, answers = {}, {}
    for _ in range(ALL_TASKS):  # tiles follow what the machine takes now, as on a server that has been up
        pieces_s(engine, LENGTHS_TOKENS[0], seed=0)
    for tiled in (True, False):
        with nullcontext() if tiled else held(engine, WHOLE):
            for tokens in LENGTHS_TOKENS:
                pieces_s(engine, tokens, seed=tokens)  # warm up
                pieces = [piece for seed in range(3) for piece in pieces_s(engine, tokens, seed=seed)]
                waits_s[tiled, tokens] = wait_s(pieces, 0.5), wait_s(pieces, 0.99), max(pieces)
                answers |= {(tiled, tokens, seed): engine.answers[f"{tokens}-{seed}"] for seed in range(3)}
    print(f"\nthe machine takes {engine.scheduler.hub.work.ttft.correction:.2f} of its profile's times")
    print(f"wait for an interruption point, ms: p50, p99, longest (bound {MAX_BLOCKING_S * 1e3:g})")
    for tokens in LENGTHS_TOKENS:
        row = [f"{value * 1e3:.1f}" for tiled in (True, False) for value in waits_s[tiled, tokens]]
        print(f"{tokens:6} tokens: {', '.join(row[:3])}; operators whole: {', '.join(row[3:])}")
    for (tiled, tokens, seed), answer in answers.items():
        if tokens <= COMPARED_TOKENS:
            how = "in tiles" if tiled else "operators whole"
            comparison.answer(f"{tokens}-{seed} {how}", prompt(seed, tokens), [answer.token], [answer.logprob])
    comparison.assert_same_with_logprobs()
    assert comparison.counts["answers"] == 2 * 3 * (len(LENGTHS_TOKENS) - 1)
    for tokens in LENGTHS_TOKENS:
        assert waits_s[True, tokens][1] <= 1.5 * MAX_BLOCKING_S


def layers_s(engine: PrefillEngine, tokens: int, seed: int, tiles: Sequence[Tiles]) -> list[float]:
    """Times of the decoder layers of one prefill, the layers of which run in ``tiles`` by turns."""
    runner, sizes = engine.scheduler.tp_worker.model_runner, engine.scheduler.hub.tiles
    attention = prefill_backend(runner.attn_backend)
    took_s = []

    def timed(forward: Callable[..., Any], now: Tiles) -> Callable[..., Any]:
        def layer(*args: Any, **kwargs: Any) -> Any:
            sizes.now, attention.tile_pairs = now, now.pairs
            begin_s = time.perf_counter()
            output = forward(*args, **kwargs)
            took_s.append(time.perf_counter() - begin_s)
            return output

        return layer

    with ExitStack() as patches:
        patches.enter_context(held(engine, sizes.now))
        for layer, now in zip(find_decoder_layers(runner.model), cycle(tiles), strict=False):
            module = runner.model.get_submodule(layer.name)
            patches.enter_context(patch.object(module, "forward", timed(module.forward, now)))
        pieces_s(engine, tokens, seed)
    return took_s


def tiled_over_whole(engine: PrefillEngine, tokens: int, runs: int) -> list[float]:
    """Time of a layer in tiles over that of its neighbour whole, and the other way round in every second run: between
    the two a machine has no time to change its speed.
    """
    ratios = []
    for run in range(1 + runs):
        by_turns = (WHOLE, engine.scheduler.hub.tiles.now)
        took_s = layers_s(engine, tokens, 100 + run, by_turns if run % 2 else by_turns[::-1])
        if run:  # the first warms up
            ratios += [b / a if run % 2 else a / b for a, b in zip(took_s[::2], took_s[1::2], strict=True)]
    return ratios


def test_tiles_cost_little_throughput(engine: PrefillEngine) -> None:
    print(f"\ntime of a decoder layer in {engine.scheduler.hub.tiles.now} over that of one whole")
    medians = []
    for tokens, runs in COST_RUNS.items():
        low, middle, high = statistics.quantiles(tiled_over_whole(engine, tokens, runs), n=4)
        print(f"{tokens:6} tokens: {middle:.3f} (quartiles {low:.3f} to {high:.3f})")
        medians.append(middle)
    assert max(medians) < 1.02
