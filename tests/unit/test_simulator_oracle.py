"""``bench simulate --oracle``: learned predictions beside exact ones, trace by trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.options import Simulate
from sgl_flowprefill.bench.cli.oracle import compare
from sgl_flowprefill.bench.metrics.paired import Difference
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.requests import Conditions
from sgl_flowprefill.bench.simulator.step_cost import step_cost
from sgl_flowprefill.bench.simulator.systems import Setup
from sgl_flowprefill.bench.workloads.synthetic import qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace

COMMAND = ["simulate", "--oracle", "--rate", "9", "--requests", "150", "--seeds", "2"]


def traces() -> list[Trace]:
    """Those of COMMAND."""
    unscaled = [qwen_like(150, seed, 1.0) for seed in range(2)]
    return [trace.scaled(rate_scale=9.0 / trace.rate_rps) for trace in unscaled]


def test_a_difference_is_as_sure_as_the_traces_agree() -> None:
    found = Difference.of([0.90, 0.92, 0.97], [0.92, 0.92, 0.98])
    assert found.points == pytest.approx(-1.0)
    assert found.by_trace_points == pytest.approx([-2.0, 0.0, -1.0])
    half_width_points = 4.3027 / math.sqrt(3)
    assert found.low_points == pytest.approx(-1 - half_width_points, abs=1e-3)
    assert found.high_points == pytest.approx(-1 + half_width_points, abs=1e-3)
    assert str(found) == "-1.00 (95%: -3.48 to +1.48)"


def test_one_trace_says_nothing_of_how_sure_it_is() -> None:
    found = Difference.of([0.5], [0.25])
    assert (found.points, str(found)) == (25.0, "+25.00")
    assert found.to_dict()["ci95_points"] is None


@pytest.mark.parametrize("layout", [(), ("--unified",)], ids=["pair", "unified"])
def test_the_command_compares_what_both_predictions_lead_to(layout: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "oracle.json"
    command = [*COMMAND, *layout, "--slower", "0.5", "--policy", "feasible"]
    assert main([*command, "--out", str(out)]) == 0
    assert_compared(json.loads(out.read_text())["traces"]["qwen-like"]["systems"]["feasible"])


def assert_compared(of: dict[str, Any]) -> None:
    """Fewer requests than JUST_CHANGED come behind the change: so many as in the trace that has the fewest."""
    just_changed = min(sum(one.arrival_s >= trace.middle_s for one in trace.requests) for trace in traces())
    assert list(of) == ["all", f"first {just_changed} after the change"]
    for part in of.values():
        assert len(part["by_trace_points"]) == 2
        assert part["difference_points"] == pytest.approx(100 * (part["learned"] - part["oracle"]))
        low, high = part["ci95_points"]
        assert low <= part["difference_points"] <= high


@pytest.mark.parametrize("is_unified", [False, True], ids=["pair", "unified"])
def test_predictions_that_are_learned_do_better_than_such_that_stay_wrong(is_unified: bool) -> None:
    """Exact predictions are made wrong here, which learned ones do not follow."""
    setup = Setup(
        Machine(LLAMA_8B, LLAMA_8B.kv_tokens),
        conditions=Conditions(prediction_bias=4.0),
        step_cost=step_cost(LLAMA_8B),
        slower=0.5,
    )
    options = Simulate(oracle=True, unified=is_unified, policy=("feasible",))
    of = compare("qwen-like", traces(), options, setup, Console())["systems"]["feasible"]
    assert_compared(of)
    assert of["all"]["difference_points"] > 0


@pytest.mark.parametrize("option", [("--prediction-error", "0.1"), ("--prediction-bias", "1.3")])
def test_an_oracle_that_is_wrong_is_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, *option]) == 2
    assert "an oracle is exact: leave out --oracle, or --prediction-error and" in capsys.readouterr().err


def test_a_machine_can_become_faster_and_has_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--slower", "-0.5", "--requests", "40", "--seeds", "1"]) == 0
    assert "50% less time from the middle on" in " ".join(capsys.readouterr().out.split())
    assert main([*COMMAND, "--slower", "-1"]) == 2
    assert "--slower -1.0: it has to be above -1, and not 0" in capsys.readouterr().err


def test_what_predicts_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--policy", "stock-fcfs"]) == 2
    assert "stock-fcfs predicts nothing" in capsys.readouterr().err
