"""What clients may put into ``ttft_slo``."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sgl_flowprefill.slo import SloError, body_error, ttft_slo_s


@pytest.mark.parametrize("custom_params", [None, {}, {"other": 1}, {"ttft_slo": None}, "text"])
def test_a_request_without_an_objective_gets_the_default(custom_params: Any) -> None:
    assert ttft_slo_s(custom_params, default_s=3.0) == 3.0


@pytest.mark.parametrize("value", [0.25, 2, 1e-3])
def test_a_positive_number_is_the_objective(value: float) -> None:
    assert ttft_slo_s({"ttft_slo": value}, default_s=3.0) == value


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, "1", True, [1], {}])
def test_anything_else_is_refused_with_the_value_and_an_example(value: Any) -> None:
    with pytest.raises(SloError, match="positive, finite number") as error:
        ttft_slo_s({"ttft_slo": value}, default_s=3.0)
    assert repr(value) in str(error.value)
    assert "0.5" in str(error.value)


def test_bodies_of_both_apis_are_checked() -> None:
    bad = {"custom_params": {"ttft_slo": -1}}
    assert body_error(bad) is not None
    assert body_error({"sampling_params": bad}) is not None
    assert body_error({"sampling_params": [{}, bad]}) is not None
    assert body_error({"sampling_params": {"custom_params": {"ttft_slo": 1}}}) is None
    assert body_error([1, 2]) is None
