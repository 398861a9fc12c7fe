"""A machine that becomes slower in the middle of a trace: times worked out by hand, what is learned, and the limit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.metrics.joint import summarise_joint
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, CostModel
from sgl_flowprefill.bench.simulator.engine import simulate
from sgl_flowprefill.bench.simulator.instance import Machine, Slowdown
from sgl_flowprefill.bench.simulator.joint import answered, attainments
from sgl_flowprefill.bench.simulator.learned import LearnedTTFT
from sgl_flowprefill.bench.simulator.limit import attainment_limit, joint_limit
from sgl_flowprefill.bench.simulator.requests import Conditions, prepare
from sgl_flowprefill.bench.simulator.router import RoundRobin
from sgl_flowprefill.bench.simulator.search import mean_limit
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.systems import Setup, run
from sgl_flowprefill.bench.simulator.unified import UnifiedInstance
from sgl_flowprefill.bench.systems.catalog import simulated
from sgl_flowprefill.bench.systems.system import Layout
from sgl_flowprefill.bench.workloads.synthetic import mixed, qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.policy import Limits

TOY = CostModel("toy", layers=10, fixed_s=0.0, per_token_s=0.001, per_pair_s=0.0, projection_share=0.5)
"""A token takes a millisecond."""
STEPS = StepCost(fixed_s=0.01, per_request_s=0.0)


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    """Requests as (arrival in s, prompt, answer), with objectives that all meet."""
    return Trace("toy", [TraceRequest(at_s, prompt, answer, "all", 9.0, 0.1) for at_s, prompt, answer in requests])


def toy_setup(slower: float = 1.0) -> Setup:
    limits = Limits(max_suspended=4, max_batch_tokens=1)
    return Setup(Machine(TOY, 100_000), limits=limits, max_operator_s=0.01, step_cost=STEPS, slower=slower)


def llama(slower: float = 0.0) -> Setup:
    return Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens), learned=True, slower=slower)


@given(st.floats(0.3, 3.0), st.floats(0.0, 10.0), st.floats(0.0, 20.0), st.floats(0.0, 10.0))
def test_work_takes_as_long_as_the_machine_needs_for_it(
    factor: float, from_s: float, begin_s: float, work: float
) -> None:
    slowdown = Slowdown(factor, from_s)
    end_s = slowdown.end_s(begin_s, work)
    assert slowdown.work_s(end_s) - slowdown.work_s(begin_s) == pytest.approx(work, abs=1e-9)
    least, most = sorted((1.0, factor))
    assert begin_s + least * work <= end_s + 1e-9 <= begin_s + most * work + 2e-9
    assert Slowdown().end_s(begin_s, work) == begin_s + work


SLOWED = trace_of((0.0, 100, 2), (0.45, 100, 4), (1.0, 100, 2))
"""The middle is at 500 ms, in the second prompt."""


@pytest.mark.parametrize("system", ["feasible", "fcfs/chunk", "stock-fcfs", "stock-fcfs-256-mixed"])
def test_what_runs_in_the_middle_takes_longer_from_then_on(system: str) -> None:
    requests = run(simulated(system, "unified"), SLOWED, toy_setup()).requests
    times_ms = [[round(1e3 * s, 3) for s in np.cumsum([one.first_token_s, *one.tbt_s])] for one in requests]
    assert times_ms == [[100.0, 110.0], [600.0, 620.0, 640.0, 660.0], [1200.0, 1220.0]]


def test_a_prefill_instance_becomes_slower_too() -> None:
    for system in ("feasible", "stock-fcfs-512"):
        requests = run(simulated(system), SLOWED, toy_setup()).requests
        assert [request.first_token_s for request in requests] == pytest.approx([0.1, 0.6, 1.2])


def test_a_suspended_prompt_goes_on_as_slowly_as_the_machine_is_then() -> None:
    urgent = TraceRequest(0.45, 100, 1, "urgent", 0.3, 0.1)
    trace = Trace("toy", [TraceRequest(0.0, 600, 1, "patient", 9.0, 0.1), urgent, *trace_of((1.0, 10, 1)).requests])
    for layout in ("pair", "unified"):
        patient, first, _ = run(simulated("feasible", layout), trace, toy_setup()).requests  # type: ignore[arg-type]
        assert first.first_token_s == pytest.approx(0.6, abs=0.02), "at an operator of 10 ms; half of it at full speed"
        assert patient.first_token_s == pytest.approx(0.9), "0.7 s of work, 0.2 s of them at half the speed"


def test_predictions_and_margin_follow_and_gaps_stay_in_time() -> None:
    trace = qwen_like(400, seed=1, rate_rps=3.0)
    figures = {}
    for slower in (0.0, 0.2):
        setup = llama(slower).met_by(trace)
        instance = simulated("feasible", "unified").new_instance(setup)
        assert isinstance(instance, UnifiedInstance)
        requests = prepare(trace, LLAMA_8B, setup.conditions)
        ttft = instance.hub.work.ttft
        assert isinstance(ttft, LearnedTTFT)
        with patch.object(ttft, "follow", wraps=ttft.follow) as follow:
            simulate(requests, [instance], RoundRobin(1))
        assert follow.call_count == ttft.journal.number, "when a task has ended, as on a server"
        figures[slower] = summarise_joint([answered(request) for request in requests])
        assert ttft.correction == pytest.approx(1 + slower, rel=0.05)
        assert figures[slower].tbt_attainment > 0.999
    assert figures[0.0].joint_attainment - figures[0.2].joint_attainment <= 0.05


@pytest.mark.parametrize("layout", ["pair", "unified"])
def test_an_oracle_knows_at_once_that_the_machine_has_changed(layout: Layout) -> None:
    """From 0.5 s on, the first takes 0.6 s, longer than it has. Who does not know goes on, and both are late."""
    two = [TraceRequest(0.6, tokens, 1, "urgent", 0.55, 0.1) for tokens in (300, 200)]
    trace = Trace("toy", [*two, *trace_of((1.0, 10, 1)).requests])
    assert [request.met for request in run(simulated("feasible", layout), trace, toy_setup()).requests] == [
        False,
        True,
        True,
    ]


# ---- the limit -------------------------------------------------------------------------------------------------------


def test_a_request_that_only_the_slower_machine_makes_late_is_out_of_reach() -> None:
    request = Trace("toy", [TraceRequest(0.0, 1000, 1, "all", 1.2, 0.1)])
    requests = prepare(request, TOY, Conditions())
    assert attainment_limit(requests, TOY, 1) == 1.0
    assert attainment_limit(requests, TOY, 1, slowdown=Slowdown(1.3, 0.5)) == 1.0
    assert attainment_limit(requests, TOY, 1, slowdown=Slowdown(1.5, 0.5)) == 0.0


def test_the_joint_limit_charges_short_answers_and_not_long_ones() -> None:
    def limits(answer: int, slowdown: Slowdown) -> tuple[float, float]:
        trace = Trace("toy", [TraceRequest(0.0, 100, answer, "all", 0.3, 0.1)] * 3)
        requests = prepare(trace, TOY, Conditions())
        steps = StepCost(fixed_s=0.01, per_request_s=0.05)
        rest = 2048, 1, slowdown
        return attainment_limit(requests, TOY, *rest), joint_limit(requests, TOY, steps, *rest)

    # Three prompts in 0.3 s; each answer takes 0.1 + 9 * 0.05 s of the 0.3 + 9 * 0.1 s that all have.
    assert limits(10, Slowdown()) == (1.0, pytest.approx(2 / 3))
    assert limits(1, Slowdown()) == (1.0, 1.0)
    assert limits(101, Slowdown()) == (1.0, 1.0), "one gap may be late, of whatever length"
    # 1.2 s are 0.1 + 1.1 / 2 s of work: one answer of 0.55 s, and of prompts only one and a half.
    assert limits(10, Slowdown(2.0, 0.1)) == (pytest.approx(2 / 3), pytest.approx(1 / 3))


@pytest.mark.parametrize("slower", [0.0, 0.5])
@pytest.mark.parametrize("workload", [qwen_like, mixed])
def test_no_server_does_better_than_the_joint_limit(workload: object, slower: float) -> None:
    trace = workload(200, 0, 25.0)  # type: ignore[operator]
    short = [dataclasses.replace(one, output_tokens=min(one.output_tokens, 90)) for one in trace.requests]
    trace = dataclasses.replace(trace, requests=short)
    setup = llama(slower)
    for name in ("feasible", "s-edf", "stock-spf-768-mixed", "stock-spf-1024-interval-1", "stock-priority"):
        system = simulated(name, "unified")
        limit = mean_limit([trace], setup, system.max_batch_tokens(setup), joint=True)
        assert attainments(system, [trace], setup)["gaps"] <= limit + 1e-9 < 1


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(), ("--unified",)], ids=["pair", "unified"])
def test_the_command_says_what_is_lost_beyond_what_the_limit_loses(
    layout: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "slower.json"
    command = ["simulate", *layout, "--slower", "0.5", "--requests", "80", "--seeds", "1", "--rate", "9", "--out"]
    assert main([*command, str(out), "--policy", "feasible", "stock-spf-2048"]) == 0
    judged = "joint_attainment" if layout else "ttft_attainment"
    for entry in json.loads(out.read_text())["traces"]["qwen-like"]["systems"].values():
        lost = 100 * (entry["steady"][judged] - entry["slower"][judged])
        assert lost == pytest.approx(entry["lost_points"])
        limit = entry["limit"]
        assert entry["slower"][judged] <= limit["slower"] <= limit["steady"]
        assert limit["lost_points"] == pytest.approx(100 * (limit["steady"] - limit["slower"]))
        assert entry["lost_beyond_limit_points"] == pytest.approx(lost - limit["lost_points"])
    assert "50% slower from the middle on" in capsys.readouterr().out
    assert main(["simulate", *layout, "--slower", "0.2", "--goodput"]) == 2
    assert "--slower 0.2 compares at one rate" in capsys.readouterr().err
