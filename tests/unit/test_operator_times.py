"""How a forward divides over its operators, and what that says about the rest of a suspended one."""

from __future__ import annotations

import math
from dataclasses import astuple
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.runtime.tiles import LIGHTEST, TILE_STEP_TOKENS, TilePlan, Tiles
from sgl_flowprefill.ttft import YARDSTICK, OperatorTimes, PrefillShape
from sgl_flowprefill.ttft.operators import LEAST_PAIRS

LENGTHS = (16, 128, 512, 2048, 8192)


def measured(new: int, cached: int = 0, slower: float = 1.0) -> tuple[list[PrefillShape], float, float, float]:
    """A machine on which a pair costs 2 ns, a token 10 us in attention, 30 us in MLPs and 4 us in the rest, a forward
    1 ms in each; ``slower`` than that by a factor."""
    pairs = new * (cached + new / 2)
    attention_s, mlp_s, rest_s = 1e-3 + 10e-6 * new + 2e-9 * pairs, 1e-3 + 30e-6 * new, 1e-3 + 4e-6 * new
    forward_s = attention_s + mlp_s + rest_s
    return [PrefillShape(new, cached)], slower * forward_s, slower * attention_s, slower * mlp_s


def test_operator_times_are_recovered_and_hold_for_prefixes_that_were_not_measured() -> None:
    times = fitted()
    assert times.mlp_s_per_token == pytest.approx(30e-6)
    assert times.rest_s_per_token == pytest.approx(4e-6)
    batch, _, attention_s, mlp_s = measured(500, 20_000)
    assert times.attention_share(batch) == pytest.approx(attention_s / (attention_s + mlp_s))


def test_one_measured_length_says_nothing() -> None:
    assert OperatorTimes.fit([]) is None
    assert OperatorTimes.fit([measured(512), measured(512)]) is None


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.floats(0.0, 1.0))
def test_what_is_left_falls_from_all_to_nothing(is_attention: list[bool], share: float) -> None:
    progress = Progress(is_attention)
    left = [progress.left(passed, share) for passed in range(len(is_attention) + 1)]
    assert left[0] == 1.0
    assert left[-1] == pytest.approx(0.0, abs=1e-9)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(left))


def test_an_operator_counts_by_its_time() -> None:
    progress = Progress([True, False] * 4)
    assert progress.left(1, attention_share=0.8) == pytest.approx(1 - 0.8 / 4)
    assert progress.left(2, attention_share=0.8) == pytest.approx(3 / 4)
    assert Progress([False] * 4).left(1, attention_share=0.8) == pytest.approx(3 / 4)
    assert Progress([True, False]).left(5, attention_share=0.5) == 0.0


def test_a_model_that_runs_its_layers_twice_is_followed() -> None:
    progress = Progress([True, False])
    progress.passed_all(4)
    assert progress.checkpoints == 4
    assert progress.left(2, attention_share=0.8) == pytest.approx(0.5)
    assert progress.left(3, attention_share=0.8) == pytest.approx(0.1)


def test_tiles_take_as_long_as_a_task_may_block() -> None:
    times = fitted()
    tiles = TilePlan(50e-3, 4, 8, times).tiles(times.forward_s([YARDSTICK]))
    assert tiles.rows * 30e-6 / 4 == pytest.approx(50e-3, rel=0.04)
    assert tiles.attention_rows * 10e-6 / 4 == pytest.approx(50e-3, rel=0.04)
    assert tiles.norm_rows * 4e-6 / 8 == pytest.approx(50e-3, rel=0.04)
    assert tiles.pairs * 2e-9 / 4 == pytest.approx(50e-3)
    longer = TilePlan(50e-3, 4, 8, times, mlp_piece=2 / 3).tiles(times.forward_s([YARDSTICK]))
    assert longer.rows * 30e-6 / 4 * 2 / 3 == pytest.approx(50e-3, rel=0.04)
    assert longer.attention_rows == tiles.attention_rows


@pytest.mark.parametrize("slower", [0.2, 5.0])
def test_tiles_are_as_long_as_the_engine_is_fast_whatever_the_profile_says(slower: float) -> None:
    right = fitted()
    wrong = fitted(slower)
    yardstick_s = right.forward_s([YARDSTICK])
    assert wrong.forward_s([YARDSTICK]) == pytest.approx(slower * yardstick_s)
    assert same(TilePlan(20e-3, 4, 8, wrong).tiles(yardstick_s), TilePlan(20e-3, 4, 8, right).tiles(yardstick_s))


def test_a_busy_moment_spoils_a_look_and_not_the_tiles() -> None:
    looks = [look for tokens in LENGTHS for look in (measured(tokens, slower=9.0), measured(tokens), measured(tokens))]
    times = OperatorTimes.fit(looks)
    assert times is not None
    yardstick_s = times.forward_s([YARDSTICK])
    assert same(TilePlan(20e-3, 4, 8, times).tiles(yardstick_s), TilePlan(20e-3, 4, 8, fitted()).tiles(yardstick_s))


def test_attention_that_seems_not_to_grow_with_pairs_has_bounded_tiles() -> None:
    """As when short prompts met a busy machine: their attention takes as long as that of longer ones."""
    noisy = []
    for tokens in (16, 128, 512, 1024):
        batch, forward_s, attention_s, mlp_s = measured(tokens)
        busy_s = 20e-6 * (1024 - tokens)
        noisy.append((batch, forward_s + busy_s, attention_s + busy_s, mlp_s))
    times = OperatorTimes.fit(noisy)
    assert times is not None
    assert times.attention_s_per_pair == pytest.approx(LEAST_PAIRS * measured(1024)[2] / (1024**2 / 2), rel=0.01)
    assert math.isfinite(TilePlan(20e-3, 4, 8, times).tiles(0.1).pairs)


def test_what_seems_to_cost_nothing_has_bounded_tiles() -> None:
    times = OperatorTimes(np.array([1e-3, 0.0, 2e-9]), np.array([1e-3, 30e-6]), np.array([1e-3, 0.0]))
    tiles = TilePlan(50e-3, 4, 8, times).tiles(0.1)
    assert tiles.attention_rows == tiles.norm_rows == pytest.approx(LIGHTEST * tiles.rows, rel=0.04)


def test_without_operator_times_a_tile_of_an_mlp_is_one_of_a_whole_layer() -> None:
    plan = TilePlan(50e-3, 2, 5, None)
    tiles = plan.tiles(YARDSTICK.new_tokens * 100e-6)
    assert tiles.rows * 100e-6 / 2 == pytest.approx(50e-3, rel=0.3)
    assert tiles.attention_rows == tiles.norm_rows == tiles.rows
    assert tiles.pairs == math.inf
    assert TilePlan(1e-9, 2, 5, None).tiles(0.2).rows == TILE_STEP_TOKENS


def fitted(slower: float = 1.0) -> OperatorTimes:
    times = OperatorTimes.fit([measured(tokens, slower=slower) for tokens in LENGTHS])
    assert times is not None
    return times


def same(tiles: Tiles, others: Tiles) -> bool:
    """Whether all are as long, to a step."""
    pairs = zip(astuple(tiles)[:3], astuple(others)[:3], strict=True)
    return tiles.pairs == pytest.approx(others.pairs) and all(abs(a - b) <= TILE_STEP_TOKENS for a, b in pairs)
