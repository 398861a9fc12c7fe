"""How long an arrival waits until the running prefill can be suspended, and what the tiles that bound it cost.

An arrival at a random moment falls into one of the pieces between two interruption points, a long one the likelier, and
waits for its end. So the distribution of waits follows from the pieces alone, without a queue of other requests.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.runtime.checkpoints import _then, find_decoder_layers
from tests.engine import PrefillEngine
from tests.prompts import prompt

LENGTHS_TOKENS = (512, 2048, 8192, 32_000)
COST_TOKENS = 32_000
COST_PAIRS = 7
MAX_BLOCKING_S = FlowPrefillConfig().max_blocking_ms * 1e-3


@pytest.fixture(scope="module")
def engine() -> PrefillEngine:
    return PrefillEngine(str(embedded_model_path()), max_total_tokens=80_000)


def pieces_s(engine: PrefillEngine, tokens: int, seed: int) -> list[float]:
    """Times between the interruption points of one prefill."""
    assert engine.scheduler.flush_cache()
    points = [time.perf_counter()]

    def interrupted() -> bool:
        points.append(time.perf_counter())
        return False

    engine.scheduler._executor._interrupted = interrupted
    engine.submit(f"{tokens}-{seed}", prompt(seed, tokens))
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


def untiled(engine: PrefillEngine) -> Callable[[], None]:
    """Take the tiles away, so that every operator runs whole, as in the original; what puts them back."""
    scheduler = engine.scheduler
    model, backend = scheduler.tp_worker.model_runner.model, scheduler.tp_worker.model_runner.attn_backend
    wrapped = {module: module.__dict__["forward"] for module in model.modules() if "forward" in module.__dict__}
    between_tiles, tile_pairs = backend.between_tiles, backend.tile_pairs
    for module in wrapped:
        del module.forward
    for layer in find_decoder_layers(model):
        for name in (*layer.attention, *layer.mlp):
            module = model.get_submodule(name)
            module.forward = _then(module.forward, scheduler._executor.checkpoint)
    backend.between_tiles, backend.tile_pairs = (lambda: None), math.inf

    def put_back() -> None:
        for module, forward in wrapped.items():
            module.forward = forward
        backend.between_tiles, backend.tile_pairs = between_tiles, tile_pairs

    return put_back


@pytest.mark.stress
def test_waits_are_bounded_whatever_the_length(engine: PrefillEngine) -> None:
    waits_s = {}
    for tiles in (True, False):
        put_back = (lambda: None) if tiles else untiled(engine)
        for tokens in LENGTHS_TOKENS:
            pieces_s(engine, tokens, seed=tokens)  # warm up
            pieces = [piece for seed in range(3) for piece in pieces_s(engine, tokens, seed=seed)]
            waits_s[tiles, tokens] = wait_s(pieces, 0.5), wait_s(pieces, 0.99), max(pieces)
        put_back()
    print(f"\nwait for an interruption point, ms: p50, p99, longest (bound {MAX_BLOCKING_S * 1e3:g})")
    for tokens in LENGTHS_TOKENS:
        row = [f"{value * 1e3:.1f}" for tiles in (True, False) for value in waits_s[tiles, tokens]]
        print(f"{tokens:6} tokens: {', '.join(row[:3])}; operators whole: {', '.join(row[3:])}")
    for tokens in LENGTHS_TOKENS:
        assert waits_s[True, tokens][1] <= 1.5 * MAX_BLOCKING_S


@pytest.mark.stress
def test_tiles_cost_no_throughput(engine: PrefillEngine) -> None:
    ratios = []
    for pair in range(COST_PAIRS + 1):
        taken_s = {}
        for tiles in (True, False) if pair % 2 else (False, True):
            put_back = (lambda: None) if tiles else untiled(engine)
            taken_s[tiles] = sum(pieces_s(engine, COST_TOKENS, seed=100 + pair))
            put_back()
        if pair:
            ratios.append(taken_s[True] / taken_s[False])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"\n{COST_TOKENS} tokens in tiles take {middle:.3f} of the time without (quartiles {low:.3f} to {high:.3f})")
    assert middle < 1.02
