"""What clients may put into ``ttft_slo``."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints.api_contract import generate_contract_error

from sgl_flowprefill.slo import SLO_KEY, TBT_KEY, SloError, body_error, objective_s, with_objective


@pytest.mark.parametrize("custom_params", [None, {}, {"other": 1}, {"ttft_slo": None}, "text"])
def test_a_request_without_an_objective_names_none(custom_params: Any) -> None:
    assert objective_s(SLO_KEY, custom_params) is None


@pytest.mark.parametrize("value", [0.25, 2, 1e-3])
def test_a_positive_number_is_the_objective(value: float) -> None:
    assert objective_s(SLO_KEY, {"ttft_slo": value}) == value


@pytest.mark.parametrize("value", [0, -1, math.inf, -math.inf, math.nan, "1", True, [1], {}, 10**20, -(10**20)])
def test_anything_else_is_refused_with_the_value_and_an_example(value: Any) -> None:
    with pytest.raises(SloError, match="positive, finite number") as error:
        objective_s(SLO_KEY, {"ttft_slo": value})
    assert repr(value) in str(error.value)
    assert "0.5" in str(error.value)


def test_the_time_between_tokens_is_an_objective_beside_it() -> None:
    assert objective_s(TBT_KEY, {"tbt_slo": 0.05}) == 0.05
    assert objective_s(TBT_KEY, {"ttft_slo": 0.05}) is None
    error = body_error({"custom_params": {"ttft_slo": 1, "tbt_slo": -1}})
    assert error is not None
    assert 'custom_params["tbt_slo"] must be a positive, finite number' in error
    assert '{"tbt_slo": 0.1}' in error
    top = {"ttft_slo": 2, "tbt_slo": 0.2}
    assert with_objective({"n": 1}, top) == {"n": 1, "custom_params": top}
    assert with_objective({"custom_params": {"tbt_slo": 0.2}}, {"ttft_slo": 2}) == {"custom_params": top}
    two = body_error({"custom_params": {"tbt_slo": 0.2}, "sampling_params": {"custom_params": {"tbt_slo": 0.3}}})
    assert two is not None
    assert 'custom_params["tbt_slo"] is 0.2 at the top' in two


def test_bodies_of_both_apis_are_checked() -> None:
    bad = {"custom_params": {"ttft_slo": -1}}
    assert body_error(bad) is not None
    assert body_error({"sampling_params": bad}) is not None
    assert body_error({"sampling_params": [{}, bad]}) is not None
    assert body_error({"sampling_params": {"custom_params": {"ttft_slo": 1}}}) is None
    assert body_error([1, 2]) is None
    assert body_error({"custom_params": None, "sampling_params": {"custom_params": None}}) is None
    assert body_error({"instances": [{}], "parameters": {"sampling_params": bad}}) is not None
    assert body_error({"instances": [{}], "parameters": {"sampling_params": {}}}) is None


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "9" * 30, "1e999"])
def test_a_number_that_no_float_or_message_can_hold_is_an_error_and_no_exception(number: str) -> None:
    body = json.loads(f'{{"text": "a", "sampling_params": {{"custom_params": {{"ttft_slo": {number}}}}}}}')
    error = body_error(body)
    assert error is not None
    assert "positive, finite number" in error


def test_a_refusal_repeats_only_the_beginning_of_a_long_value() -> None:
    error = body_error({"custom_params": {"ttft_slo": "soon" * 300_000}})
    assert error is not None
    assert "'soonsoonsoon" in error
    assert len(error) < 300


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (None, {"custom_params": {"ttft_slo": 2.0}}),
        ({"n": 1}, {"n": 1, "custom_params": {"ttft_slo": 2.0}}),
        ({"custom_params": {"other": 1}}, {"custom_params": {"other": 1, "ttft_slo": 2.0}}),
        ({"custom_params": {"ttft_slo": 2}}, {"custom_params": {"ttft_slo": 2.0}}),
        ([{}, {"n": 1}], [{"custom_params": {"ttft_slo": 2.0}}, {"n": 1, "custom_params": {"ttft_slo": 2.0}}]),
    ],
)
def test_an_objective_at_the_top_of_a_generate_body_is_one_of_its_sampling_parameters(
    sampling: Any, expected: Any
) -> None:
    top = {"ttft_slo": 2, "thinking_budget": 3}  # SGLang ignores the other
    body = {"text": "a", "custom_params": top} | ({} if sampling is None else {"sampling_params": sampling})
    assert generate_contract_error(body) is None
    assert body_error(body) is None
    assert with_objective(sampling, top) == expected


def test_two_objectives_in_one_request_are_refused_with_both() -> None:
    body = {"custom_params": {"ttft_slo": 2}, "sampling_params": [{}, {"custom_params": {"ttft_slo": 0.5}}]}
    error = body_error(body)
    assert error is not None
    assert "2 at the top" in error
    assert "0.5 in its sampling_params" in error


@pytest.mark.parametrize("custom_params", ["text", "", [], [{"ttft_slo": 1}], 0, False])
def test_custom_params_that_are_no_object_are_refused_wherever_they_are(custom_params: Any) -> None:
    inner = {"custom_params": custom_params}
    bodies = [inner, {"sampling_params": inner}, {"sampling_params": [{}, inner]}]
    for body in (*bodies, {"instances": [{}], "parameters": {"sampling_params": inner}}):
        error = body_error(body)
        assert error is not None, body
        assert f"must be an object, got {custom_params!r}" in error


def test_an_objective_that_has_nowhere_to_go_is_refused() -> None:
    error = body_error({"custom_params": {"ttft_slo": 2}, "sampling_params": {"custom_params": "text"}})
    assert error is not None
    assert "'text'" in error


def test_sampling_parameters_without_an_objective_beside_them_stay_as_they_are() -> None:
    for sampling in (None, {}, {"custom_params": {"ttft_slo": 1}}, [{}], "invalid"):
        assert with_objective(sampling, None) == sampling
