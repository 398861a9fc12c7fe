"""The limit bounds what brute force and every policy reach, and is exact where everything can be met."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.cost import LLAMA_8B
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.limit import (
    Work,
    attainment_limit,
    edf_meets_all,
    fractional_optimum,
    most_on_time,
)
from sgl_flowprefill.bench.simulator.requests import prepare
from sgl_flowprefill.bench.simulator.systems import Setup, run
from sgl_flowprefill.bench.systems.catalog import simulated
from sgl_flowprefill.bench.workloads.synthetic import mixed, qwen_like
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.ttft import PrefillShape

JOBS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 6), st.integers(0, 8)).map(
        lambda t: Work(float(t[0]), float(t[0] + t[1] + t[2]), float(t[1]))
    ),
    min_size=1,
    max_size=7,
)


def optimum(jobs: list[Work]) -> int:
    """Largest subset that preemptive EDF completes in time."""
    for size in range(len(jobs), 0, -1):
        if any(edf_meets_all(sorted(subset)) for subset in combinations(jobs, size)):
            return size
    return 0


@settings(max_examples=200, deadline=None)
@given(JOBS)
def test_no_schedule_does_better_than_the_limit(jobs: list[Work]) -> None:
    best = optimum(jobs)
    assert best <= most_on_time(jobs) <= len(jobs)
    assert best <= fractional_optimum(jobs) + 1e-6


def test_the_fractional_optimum_of_a_small_case() -> None:
    # Six units of time for works of 2, 3 and 4: the shortest two, and a quarter of the longest.
    jobs = [Work(0.0, 6.0, 2.0), Work(0.0, 6.0, 3.0), Work(0.0, 6.0, 4.0)]
    assert fractional_optimum(jobs) == pytest.approx(2.25)
    assert most_on_time(jobs) == 2


def test_busy_periods_do_not_lend_each_other_time() -> None:
    jobs = [Work(0.0, 3.0, 2.0), Work(0.0, 3.0, 2.0), Work(100.0, 103.0, 2.0), Work(100.0, 103.0, 2.0)]
    assert most_on_time(jobs) == 2  # 1.5 each, rounded down


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20))
def test_a_forward_takes_at_least_the_least_of_its_requests(tokens: list[int]) -> None:
    while sum(tokens) > 2048:
        tokens.pop()
    if tokens:
        whole_s = LLAMA_8B.predict_s([PrefillShape(n) for n in tokens])
        assert sum(LLAMA_8B.least_s(PrefillShape(n), 2048) for n in tokens) <= whole_s + 1e-12


@pytest.mark.parametrize("workload", [qwen_like, mixed])
@pytest.mark.parametrize("instances", [1, 3])
def test_no_policy_does_better_than_the_limit(workload: object, instances: int) -> None:
    trace = workload(400, 0, 11.0 * instances)  # type: ignore[operator]
    setup = Setup(
        Machine(LLAMA_8B, LLAMA_8B.kv_tokens),
        limits=Limits(max_suspended=64, max_batch_tokens=2048),
        instances=instances,
    )
    limit = attainment_limit(prepare(trace, LLAMA_8B, setup.conditions), LLAMA_8B, 2048, instances)
    for system in ("s-edf", "feasible", "edf", "stock-spf-2048"):
        assert run(simulated(system), trace, setup).attainment <= limit
