"""``launch.py gpu-report`` whole, on the CPU engine: every phase measures what it says, and an interrupt keeps it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.cluster import machine
from sgl_flowprefill.cluster.cli import main as launch
from sgl_flowprefill.gpu_report import command
from sgl_flowprefill.gpu_report.phases import UNIFIED_GOODPUT, plan
from sgl_flowprefill.gpu_report.phases.goodput import COMPARED_UNIFIED

pytestmark = [
    pytest.mark.stress,
    pytest.mark.alone,
    pytest.mark.skipif(bool(machine.gpu_count()), reason="checks the CPU engine"),
    pytest.mark.timeout(1200),
]
ROOT = Path(__file__).parents[2]
BUDGET_S = 300


def start(out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "launch.py", "gpu-report", "--out", str(out), *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def read(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())  # type: ignore[no-any-return]


def test_it_runs_whole_on_the_cpu_engine_and_its_figures_are_plausible(tmp_path: Path) -> None:
    out = tmp_path / "report"
    with start(out, "--budget-s", str(BUDGET_S)) as process:
        said, _ = process.communicate(timeout=1000)
    print(said)
    document = read(out)
    phases = document["phases"]
    figures = {name: found.get("figures", {}) for name, found in phases.items()}
    assert document["ended"] == "finished"
    for name, found in phases.items():
        assert found["state"] != "left out", name
        assert json.loads((out / "phases" / f"{name.replace(':', '-')}.json").read_text()) == found
    # A check of times may fail on a busy machine; none of these depends on times.
    assert phases["tokens"]["state"] == "passed"
    assert phases["lookahead"] | {"title": ""} == {
        "title": "", "state": "not here", "took_s": 0.0,
        "line": "this phase needs a card: the CPU engine queues nothing, so it has no look-ahead",
    }  # fmt: skip

    assert 1e8 < figures["machine"]["copy_bytes_per_s"] < 1e12
    assert 1e8 < figures["machine"]["product_flop_per_s"] < 1e13

    findings = {one["check"]: one["passed"] for one in figures["checks:engine"]["findings"]}
    assert findings["attention slots"]
    assert findings["tokens under preemption"]

    tokens = figures["tokens"]
    assert tokens["same"] == tokens["compared"] >= 16
    assert all(row["suspensions"] > 3 * row["prompts"] for row in tokens["rows"])
    assert max(row["depth"] for row in tokens["rows"]) >= 4
    assert 0 < tokens["rounding"] < 1e-3

    costs = {row["tokens"]: row for row in figures["cost"]["rows"]}
    assert sorted([*costs, *figures["cost"]["left_out_tokens"]]) == [512, 2048, 8192]
    assert costs[512]["without_s"] < costs[2048]["without_s"]
    for row in costs.values():
        assert row["rounds"] >= 3
        assert -0.3 < row["checkpoints_cost"] < 0.3
        assert row["points"] >= 16

    blocking = figures["blocking"]["rows"]
    assert {(row["tokens"], row["tiles"]) for row in blocking} >= {(2048, False), (2048, True)}
    left_out = figures["blocking"]["left_out_tokens"]
    assert sorted([*{row["tokens"] for row in blocking}, *left_out]) == [2048, 8192, 32_768, 131_071]
    for row in blocking:
        assert row["samples"] >= 20
        assert 0 < row["noticed_p50_ms"] <= row["p50_ms"] <= row["p99_ms"] <= row["max_ms"] < 1e3 * row["forward_s"]

    operators = figures["operators"]
    assert operators["forwards"] > 20
    assert (out / "profile.parquet").exists()
    for row in operators["rows"]:
        assert 0 < row["attention_share"] + row["mlp_share"] < 1
        assert row["simulated_s"] > 0

    tiles = {row["length_ms"]: row for row in figures["tiles"]["rows"]}
    assert tiles[2.0]["points"] > tiles[5.0]["points"] > tiles[20.0]["points"] >= 16
    assert tiles[2.0]["tiles"]["rows"] < tiles[20.0]["tiles"]["rows"]

    steps = figures["steps"]
    assert steps["same"] == steps["compared"] == 4 * 64
    assert steps["steps_at_random"] == 63
    assert steps["prefills_at_random"] >= 1
    assert 0 <= steps["difference"] <= steps["rounding"] < 1e-3
    assert not steps["decode_graphs"]
    alone, *due = steps["rows"]
    assert [row["objective_ms"] for row in due] == [200.0, 100.0]
    for row in due:
        assert row["prefills"] >= 1
        assert row["steps"] >= 19
        assert alone["step"]["p50_ms"] / 2 < row["step"]["p50_ms"] < row["objective_ms"]
        assert row["objective_ms"] / 2 < row["gaps"]["p50_ms"] < 2 * row["objective_ms"]
        assert row["gap_limit_ms"] == row["objective_ms"] + alone["step"]["p99_ms"]
        assert row["gaps_kept"] == (row["gaps"]["p99_ms"] <= row["gap_limit_ms"])

    goodput = figures["goodput"]
    assert [row["system"] for row in goodput["rows"]] == ["flowprefill", "stock-spf-2048", "sglang"]
    for row in goodput["rows"]:
        assert row["failed"] == 0, row["errors"]
        assert row["requests"] == goodput["requests"] > 10
        assert 0 < row["attainment"] <= 1
        assert row["ttft"]["p50_ms"] <= row["ttft"]["p99_ms"]

    assert [choice["option"] for choice in document["choices"]] == ["max_blocking_ms", "max_batch_tokens"]
    assert all(choice["why"] for choice in document["choices"])
    page = (out / "report.html").read_text()
    titles = ("What preemption checkpoints and tiles cost", "Requests in time", "Decode steps")
    for text in (*titles, document["choices"][0]["flag"]):
        assert text in page


def test_ctrl_c_keeps_what_has_been_found_and_leaves_no_process(tmp_path: Path) -> None:
    out = tmp_path / "report"
    with start(out) as process:
        while not (out / "phases" / "machine.json").exists():
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said
    document = read(out)
    assert document["ended"] == "interrupted"
    assert document["phases"]["machine"]["state"] == "measured"
    assert "was interrupted" in (out / "report.html").read_text()
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True).stdout
    assert left == ""


def test_a_shape_is_served_with_weights_that_tell_prompts_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checks have the whole budget, so that a slow start of the engine leaves them enough of it."""
    phases = [phase for phase in plan((None,)) if phase.module == "checks"]
    monkeypatch.setattr(command, "plan", lambda *_: phases)
    out = tmp_path / "report"
    options = ["--shape", "llama-small", "--context-length", "2048", "--budget-s", "120"]
    assert launch(["gpu-report", "--out", str(out), *options]) in (0, command.EXIT_FAILED)
    document = read(out)
    print(*(f"{found['title']}: {found['line']}" for found in document["phases"].values()), sep="\n")
    assert "weights made on the device" in document["model"]
    found = document["phases"]["checks:engine"]["figures"]
    assert found["engine"]["model"].startswith("llama-small")
    checks = {one["check"]: one for one in found["findings"]}
    assert checks["tokens under preemption"]["passed"], checks["tokens under preemption"]["figures"]


def test_servers_that_decode_are_compared_where_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = ("operators", "steps", UNIFIED_GOODPUT)
    phases = [phase for phase in plan((None,), unified=True) if phase.name in wanted]
    monkeypatch.setattr(command, "plan", lambda _, unified, asked: phases if unified else [])
    out = tmp_path / "report"
    assert launch(["gpu-report", "--unified", "--out", str(out), "--budget-s", "200"]) in (0, command.EXIT_FAILED)
    document = read(out)
    print(*(f"{found['title']}: {found['line']}" for found in document["phases"].values()), sep="\n")
    goodput = document["phases"][UNIFIED_GOODPUT]
    assert goodput["state"] == "measured", goodput
    figures = goodput["figures"]
    assert figures["judge"] == "gaps"
    assert figures["answer_tokens"] > 2
    assert [row["system"] for row in figures["rows"]] == list(COMPARED_UNIFIED)
    for row in figures["rows"]:
        assert row["failed"] == 0, row["errors"]
        assert row["requests"] == figures["requests"] > 10
        assert 0 < row["attainment"] <= 1
        assert 0 < row["gaps"]["p50_ms"] <= row["gaps"]["p99_ms"]
    ours, *stock = figures["rows"]
    assert ours["steps"]["decode_steps"] > figures["requests"]
    assert all(row["steps"] is None for row in stock)
