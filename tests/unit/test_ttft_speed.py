"""The machine's speed during a profile, by its references."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.ttft.speed import MachineSpeed

TIMES_S = {"short": 0.03, "long": 0.12}


def referred(
    slowness: Callable[[float], float], noise: float, seed: int = 0, count: int = 60, odd: int | None = None
) -> MachineSpeed:
    """References once a second, in turns, on a machine that is ``slowness(at_s)`` times slower than usual. The one of
    number ``odd`` was of a shape of its own by chance.
    """
    rng = random.Random(seed)
    at_s = [float(second) for second in range(count)]
    shapes = [list(TIMES_S)[second % 2] for second in range(count)]
    times_s = [
        TIMES_S[shape] * slowness(at) * math.exp(rng.gauss(0, noise)) for shape, at in zip(shapes, at_s, strict=True)
    ]
    return MachineSpeed.of([shape if i != odd else "odd" for i, shape in enumerate(shapes)], times_s, at_s)


def on_and_off(at_s: float) -> float:
    return 1.5 if int(at_s // 20) % 2 else 1.0


def test_a_machine_that_is_slow_now_and_then_is_followed() -> None:
    speed = referred(on_and_off, 0.02)
    at_s = [5.0, 15.0, 25.0, 35.0, 45.0, 55.0]
    found = np.exp(speed.log_slowness(at_s))
    assert found / found[0] == pytest.approx([on_and_off(at) for at in at_s], rel=0.04)
    assert speed.range == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("index", [0, 1, 31, 58, 59])
def test_a_machine_is_followed_although_a_reference_was_of_another_shape(index: int) -> None:
    speed = referred(on_and_off, 0.02, odd=index)
    assert len(speed.at_s) == 60
    assert np.isfinite(speed.log_ratios).all()
    at_s = [5.0, 15.0, 25.0, 35.0, 45.0, 55.0]
    found = np.exp(speed.log_slowness(at_s))
    assert found / found[0] == pytest.approx([on_and_off(at) for at in at_s], rel=0.04)


@given(st.integers(0, 1000), st.floats(0.0, 0.1))
def test_rows_of_a_steady_machine_stay_nearly_as_they_are(seed: int, noise: float) -> None:
    found = referred(lambda at_s: 1.0, noise, seed).log_slowness([float(second) for second in range(60)])
    assert float(np.sqrt(np.mean(found**2))) <= 0.75 * noise + 1e-9


@given(st.integers(0, 59), st.floats(0.01, 100.0))
def test_one_absurd_reference_moves_nothing(index: int, factor: float) -> None:
    speed = referred(lambda at_s: factor if at_s == index else 1.0, 0.0)
    assert np.abs(speed.log_slowness([float(second) for second in range(60)])).max() < 1e-9


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_few_references_say_nothing(count: int) -> None:
    speed = referred(on_and_off, 0.1, count=count)
    assert speed.log_slowness([0.0, 100.0]).tolist() == [0.0, 0.0]
