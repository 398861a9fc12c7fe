"""``bench simulate --oracle``: learned predictions beside exact ones, trace by trace."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.oracle import JUST_CHANGED
from sgl_flowprefill.bench.metrics.paired import Difference

COMMAND = ["simulate", "--oracle", "--rate", "9", "--requests", "150", "--seeds", "2"]


def test_a_difference_is_as_sure_as_the_traces_agree() -> None:
    found = Difference.of([0.90, 0.92, 0.97], [0.92, 0.92, 0.98])
    assert found.points == pytest.approx(-1.0)
    assert found.by_trace == pytest.approx([-2.0, 0.0, -1.0])
    assert (found.low, found.high) == pytest.approx((-1 - 4.3027 / math.sqrt(3), -1 + 4.3027 / math.sqrt(3)), abs=1e-3)
    assert str(found) == "-1.00 (95%: -3.48 to +1.48)"


def test_one_trace_says_nothing_of_how_sure_it_is() -> None:
    found = Difference.of([0.5], [0.25])
    assert (found.points, str(found)) == (25.0, "+25.00")
    assert found.to_dict()["ci95_points"] is None


@pytest.mark.parametrize("layout", [(), ("--unified",)], ids=["pair", "unified"])
def test_the_command_compares_what_both_predictions_lead_to(layout: tuple[str, ...], tmp_path: Path) -> None:
    """Exact predictions are made wrong here, which learned ones do not follow: so these do better."""
    out = tmp_path / "oracle.json"
    command = [*COMMAND, *layout, "--slower", "0.5", "--prediction-bias", "4", "--policy", "feasible"]
    assert main([*command, "--out", str(out)]) == 0
    of = json.loads(out.read_text())["traces"]["qwen-like"]["systems"]["feasible"]
    assert list(of) == ["all", f"first {JUST_CHANGED} after the change"]
    for part in of.values():
        assert len(part["by_trace_points"]) == 2
        assert part["difference_points"] == pytest.approx(100 * (part["learned"] - part["oracle"]))
        low, high = part["ci95_points"]
        assert low <= part["difference_points"] <= high
    assert of["all"]["difference_points"] > 0


def test_a_machine_can_become_faster_and_has_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--slower", "-0.5", "--requests", "40", "--seeds", "1"]) == 0
    assert "50% less time from the middle on" in " ".join(capsys.readouterr().out.split())
    assert main([*COMMAND, "--slower", "-1"]) == 2
    assert "--slower -1.0: it has to be above -1, and not 0" in capsys.readouterr().err


def test_what_predicts_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--policy", "stock-fcfs"]) == 2
    assert "stock-fcfs predicts nothing" in capsys.readouterr().err
