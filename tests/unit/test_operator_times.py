"""How a forward divides over its operators, and what that says about the rest of a suspended one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.runtime.tiles import LIGHTEST, TILE_STEP_TOKENS, plan_tiles
from sgl_flowprefill.ttft import OperatorTimes, PrefillShape


class Linear:
    """A machine whose forward pass takes as long for every token."""

    def __init__(self, s_per_token: float) -> None:
        self._s_per_token = s_per_token

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return self._s_per_token * sum(shape.new_tokens for shape in batch)


def measured(new: int, cached: int = 0) -> tuple[list[PrefillShape], float, float, float]:
    """A machine on which a pair costs 2 ns, a token 10 us in attention, 30 us in MLPs and 4 us in the rest, a forward
    1 ms in each."""
    pairs = new * (cached + new / 2)
    attention_s, mlp_s, rest_s = 1e-3 + 10e-6 * new + 2e-9 * pairs, 1e-3 + 30e-6 * new, 1e-3 + 4e-6 * new
    return [PrefillShape(new, cached)], attention_s + mlp_s + rest_s, attention_s, mlp_s


def test_operator_times_are_recovered_and_hold_for_prefixes_that_were_not_measured() -> None:
    times = OperatorTimes.fit([measured(tokens) for tokens in (16, 128, 512, 2048, 8192)])
    assert times is not None
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
    times = OperatorTimes.fit([measured(tokens) for tokens in (16, 128, 512, 2048, 8192)])
    assert times is not None
    tiles = plan_tiles(50e-3, 4, 8, Linear(100e-6), times)
    assert tiles.rows * 30e-6 / 4 == pytest.approx(50e-3, rel=0.04)
    assert tiles.attention_rows * 10e-6 / 4 == pytest.approx(50e-3, rel=0.04)
    assert tiles.norm_rows * 4e-6 / 8 == pytest.approx(50e-3, rel=0.04)
    assert tiles.pairs * 2e-9 / 4 == pytest.approx(50e-3)
    longer = plan_tiles(50e-3, 4, 8, Linear(100e-6), times, mlp_piece=2 / 3)
    assert longer.rows * 30e-6 / 4 * 2 / 3 == pytest.approx(50e-3, rel=0.04)
    assert longer.attention_rows == tiles.attention_rows


def test_what_seems_to_cost_nothing_has_bounded_tiles() -> None:
    times = OperatorTimes(np.array([1e-3, 0.0, 2e-9]), np.array([1e-3, 30e-6]), np.array([1e-3, 0.0]))
    tiles = plan_tiles(50e-3, 4, 8, Linear(100e-6), times)
    assert tiles.attention_rows == tiles.norm_rows == pytest.approx(LIGHTEST * tiles.rows, rel=0.04)


def test_without_operator_times_a_tile_of_an_mlp_is_one_of_a_whole_layer() -> None:
    tiles = plan_tiles(50e-3, 2, 5, Linear(100e-6), None)
    assert tiles.rows * 100e-6 / 2 == pytest.approx(50e-3, rel=0.3)
    assert tiles.attention_rows == tiles.norm_rows == tiles.rows
    assert tiles.pairs == math.inf
    assert plan_tiles(1e-9, 2, 5, Linear(100e-6), None).rows == TILE_STEP_TOKENS
