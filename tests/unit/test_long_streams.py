"""Beside a stream that is so long that steps over it alone are late, others wait no longer than until they starve."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest

from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.systems import run
from sgl_flowprefill.policy import DecodeLimits
from tests.unit.test_simulator_unified import toy_setup, trace_of, unified

STARVE_S = 5.0
SHORT = (50, 5, 1.0, 0.1)
"""A prompt of 50 ms, and an answer of five tokens."""
LONG = (4600, 400, 9.0, 0.1)
"""Steps over it take 102 ms by themselves, of the 90 that they may: its answer takes 45 s or more."""


@pytest.mark.parametrize(("policy", "starves_s"), [("feasible", STARVE_S), ("s-edf", STARVE_S), ("fcfs", 0.0)])
def test_requests_that_starve_beside_a_stream_that_no_step_serves_in_time_start_before_it_ends(
    policy: str, starves_s: float
) -> None:
    setup = dataclasses.replace(toy_setup(), step_cost=StepCost(0.01, 0.0, 2e-5), max_starvation_s=STARVE_S)
    arrivals_s = [6.0 + 3.0 * number for number in range(8)]
    trace = trace_of((0.0, *LONG), *((arrival_s, *SHORT) for arrival_s in arrivals_s))
    long, *short = run(unified(policy), trace, setup).requests
    assert long.last_token_s > 45.0
    waited_s = [request.first_token_s - request.arrival_s for request in short]
    assert all(starves_s < waited < starves_s + 5.0 for waited in waited_s), "a turn of 50 ms is every 2.5 s"
    assert all(after.first_token_s > before.first_token_s for before, after in pairwise(short))
    assert long.tbt_s.max() < 0.25, "steps still take nine tenths of the time"


@pytest.mark.parametrize("policy", ["feasible", "s-edf", "fcfs"])
def test_requests_that_starve_make_steps_over_a_long_stream_no_longer_than_twice_what_it_makes_unavoidable(
    policy: str,
) -> None:
    """Each adds 30 ms to steps of 102, and would stay until several others have come."""
    steps = StepCost(0.01, 0.0, 2e-4)
    setup = dataclasses.replace(toy_setup(), step_cost=steps, max_starvation_s=STARVE_S)
    long_tokens, answer_tokens = 460, 500
    trace = trace_of((0.0, long_tokens, answer_tokens, 9.0, 0.1), *[(6.0, 150, 100, 1.0, 0.1)] * 8)
    long, *others = run(unified(policy), trace, setup).requests
    assert sum(one.first_token_s < long.last_token_s for one in others) >= 4, "they start all the same"
    assert all(len(one.tbt_s) == 99 for one in others)
    unavoidable_s = steps.predict_s(2, long_tokens + answer_tokens) / DecodeLimits().max_share
    assert long.tbt_s.max() < 2 * unavoidable_s
