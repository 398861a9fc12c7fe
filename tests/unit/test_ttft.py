"""The cubic TTFT model, with which reports compare."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.budget import throughput_budget_tokens
from sgl_flowprefill.ttft.cubic import CubicTTFT

LENGTHS = [16, 64, 256, 512, 1024, 2048, 4096, 8192]


def cost_s(tokens: float) -> float:
    return 0.01 + 6e-5 * tokens + 2e-9 * tokens**2


MODEL = CubicTTFT.fit(LENGTHS, [cost_s(n) for n in LENGTHS])


@pytest.mark.parametrize("tokens", [16, 100, 700, 3000, 8000, 8192])
def test_it_recovers_a_cost_that_is_a_polynomial(tokens: int) -> None:
    assert MODEL.predict_s([PrefillShape(tokens)]) == pytest.approx(cost_s(tokens), rel=0.02)


def test_it_grows_beyond_the_longest_profiled_prompt() -> None:
    assert MODEL.predict_s([PrefillShape(16384)]) > 1.8 * MODEL.predict_s([PrefillShape(8192)])


@given(st.integers(0, 40_000), st.integers(0, 40_000))
def test_more_tokens_never_take_less_time(a: int, b: int) -> None:
    low, high = sorted((a, b))
    assert MODEL.predict_s([PrefillShape(low)]) <= MODEL.predict_s([PrefillShape(high)])


def test_a_batch_costs_what_its_tokens_cost() -> None:
    assert MODEL.predict_s([PrefillShape(300), PrefillShape(724)]) == MODEL.predict_s([PrefillShape(1024)])


def test_too_few_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 prompt lengths"):
        CubicTTFT.fit([16, 16, 64, 64], [1, 1, 2, 2])


def test_a_batch_is_as_big_as_throughput_needs() -> None:
    linear = CubicTTFT.fit(LENGTHS, [1e-4 * n for n in LENGTHS])
    assert throughput_budget_tokens(linear, 8192) == 64
    overhead = CubicTTFT.fit(LENGTHS, [0.05 + 1e-4 * n for n in LENGTHS])
    assert throughput_budget_tokens(overhead, 16384) == 8192  # two take 1.74 s, together 1.69; of 4,096: 0.92, 0.87
    assert throughput_budget_tokens(overhead, 6000) == 4096
