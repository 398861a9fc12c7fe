"""Online correction: follows the machine, is not fooled by single measurements, and keeps a margin."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.ttft import AdaptiveTTFT, PrefillShape
from sgl_flowprefill.ttft.base import TTFTModel
from sgl_flowprefill.ttft.online import GREATEST_FACTOR, LEAST_FACTOR

SIZES = [40, 300, 900, 2000, 6000]


class Proportional:
    def predict_s(self, batch: list[PrefillShape]) -> float:
        return 1e-4 * sum(request.new_tokens for request in batch)


PROFILE: TTFTModel = Proportional()  # type: ignore[assignment]


def adaptive(quantile: float = 0.5) -> AdaptiveTTFT:
    return AdaptiveTTFT(quantile, PROFILE)


def run(ttft: AdaptiveTTFT, tasks: int, slower: float, noise: float = 0.0, seed: int = 0) -> None:
    rng = random.Random(seed)
    for _ in range(tasks):
        batch = [PrefillShape(rng.choice(SIZES))]
        ttft.observe(batch, PROFILE.predict_s(batch) * slower * math.exp(rng.gauss(0, noise)))


def error(ttft: AdaptiveTTFT, slower: float, tokens: int) -> float:
    batch = [PrefillShape(tokens)]
    return abs(ttft.predict(batch).expected_s / (PROFILE.predict_s(batch) * slower) - 1)


@given(st.integers(0, 1000), st.floats(0.0, 0.04), st.integers(0, 200), st.sampled_from([1.5, 0.7, 3.0]))
def test_a_machine_of_another_speed_is_predicted_within_a_tenth_after_20_tasks(
    seed: int, noise: float, before: int, slower: float
) -> None:
    ttft = adaptive()
    run(ttft, before, 1.0, noise, seed)
    run(ttft, 20, slower, noise, seed + 1)
    assert all(error(ttft, slower, tokens) <= 0.10 for tokens in SIZES)


@given(st.floats(1e-9, 1e9), st.integers(0, 60), st.sampled_from(SIZES))
def test_one_absurd_measurement_changes_little(absurd_s: float, before: int, tokens: int) -> None:
    ttft = adaptive()
    run(ttft, before, 1.2, 0.05)
    expected_s = [ttft.predict([PrefillShape(size)]).expected_s for size in SIZES]
    ttft.observe([PrefillShape(tokens)], absurd_s)
    for size, was_s in zip(SIZES, expected_s, strict=True):
        assert ttft.predict([PrefillShape(size)]).expected_s == pytest.approx(was_s, rel=0.08)


def test_a_size_that_is_slower_than_the_others_gets_a_correction_of_its_own() -> None:
    ttft = adaptive()
    for _ in range(40):
        for tokens in (100, 500, 500, 6000):
            batch = [PrefillShape(tokens)]
            ttft.observe(batch, PROFILE.predict_s(batch) * (2.0 if tokens == 6000 else 1.0))
    assert error(ttft, 2.0, 6000) < 0.05
    assert error(ttft, 1.0, 500) < 0.05


def test_a_burst_of_a_size_that_has_a_correction_of_its_own_is_not_corrected_twice() -> None:
    """Nor do other sizes pay for it. A machine that becomes slower meanwhile is followed as ever."""
    ttft, rng = adaptive(), random.Random(0)

    def complete(tokens: int, slower: float = 1.0) -> None:
        batch, own = [PrefillShape(tokens)], 1.5 if tokens == 6000 else 1.0
        ttft.observe(batch, PROFILE.predict_s(batch) * own * slower * math.exp(rng.gauss(0, 0.02)))

    for _ in range(40):
        for tokens in SIZES:
            complete(tokens)
    for _ in range(40):
        complete(6000)
        assert error(ttft, 1.5, 6000) < 0.1
        assert error(ttft, 1.0, 500) < 0.1
    for _ in range(20):
        complete(6000, slower=2.0)
    assert error(ttft, 2 * 1.5, 6000) < 0.1
    assert error(ttft, 2.0, 500) < 0.1
    assert ttft.correction == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("slower", [0.25, 2.0, 4.0])
@pytest.mark.parametrize("within_tasks", [1, 50, 100])
def test_a_machine_that_changes_while_one_size_comes_is_no_level_of_that_size(slower: float, within_tasks: int) -> None:
    ttft, rng = adaptive(), random.Random(0)
    for task in range(within_tasks + 60):
        batch = [PrefillShape(6000)]
        slowness = slower ** min(1.0, task / within_tasks)
        ttft.observe(batch, PROFILE.predict_s(batch) * slowness * math.exp(rng.gauss(0, 0.02)))
    assert ttft.correction == pytest.approx(slower, rel=0.1)
    assert all(error(ttft, slower, size) < 0.1 for size in SIZES)


@pytest.mark.parametrize("measured_s", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_is_not_learned_from(measured_s: float) -> None:
    ttft = adaptive()
    for _ in range(100):
        ttft.observe([PrefillShape(500)], measured_s)
    assert ttft.state()["observed"] == 0


@given(st.lists(st.tuples(st.sampled_from(SIZES), st.floats(1e-12, 1e12)), max_size=80))
def test_no_history_takes_the_correction_out_of_its_bounds(history: list[tuple[int, float]]) -> None:
    ttft = adaptive()
    for tokens, measured_s in history:
        ttft.observe([PrefillShape(tokens)], measured_s)
    for tokens in SIZES:
        prediction = ttft.predict([PrefillShape(tokens)])
        assert prediction.expected_s / prediction.raw_s * (1 + 1e-12) >= LEAST_FACTOR
        assert prediction.expected_s / prediction.raw_s <= GREATEST_FACTOR * (1 + 1e-12)


@pytest.mark.parametrize("quantile", [0.5, 0.75, 0.9])
def test_the_chosen_share_of_tasks_stays_within_the_planned_time(quantile: float) -> None:
    ttft = adaptive(quantile)
    rng = random.Random(5)
    within = 0
    for index in range(3000):
        batch = [PrefillShape(rng.choice(SIZES))]
        measured_s = PROFILE.predict_s(batch) * math.exp(rng.gauss(0, 0.2))
        within += index >= 1000 and measured_s <= ttft.predict(batch).planned_s
        ttft.observe(batch, measured_s)
    assert within / 2000 == pytest.approx(quantile, abs=0.05)


def test_the_margin_starts_as_the_profile_has_it() -> None:
    residuals = [random.Random(1).gauss(0, 0.1) for _ in range(400)]
    expected = sorted(residuals)[int(0.75 * len(residuals))]
    assert math.log(AdaptiveTTFT(0.75, PROFILE, residuals).margin) == pytest.approx(expected, abs=0.01)


def test_its_state_can_be_looked_at() -> None:
    ttft = adaptive(0.75)
    run(ttft, 40, 1.5)
    state = ttft.state()
    assert state["observed"] == 40
    assert state["correction"] == 1.5
    assert state["correction_from_256"] == 1.5


def test_a_quantile_is_between_0_and_1() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        AdaptiveTTFT(1.0, PROFILE)
