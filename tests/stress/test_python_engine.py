"""SGLang's engine in Python, without an HTTP server: its requests get their objectives as all others do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgl_flowprefill.events import Arrival, read_events
from sgl_flowprefill.model import embedded_model_path
from tests.servers.conftest import SLO_POLICY

pytestmark = pytest.mark.stress

PROGRAM = """
import sys

import sglang as sgl

if __name__ == "__main__":
    engine = sgl.Engine(model_path=sys.argv[1], max_total_tokens=20000)
    one = {"max_new_tokens": 1}
    engine.generate("bake lomi", one)
    engine.generate("bake lomi", one | {"custom_params": {"ttft_slo": 1.5}})
    engine.generate(["bake", "lomi"], [one, one | {"custom_params": {"slo_class": "interactive"}}])
    engine.generate("bake lomi", one, priority=11)
    for wrong in ({"ttft_slo": -1}, {"slo_class": "urgent"}):
        try:
            engine.generate("bake lomi", one | {"custom_params": wrong})
        except ValueError as error:
            print("refused:", error)
    engine.shutdown()
"""


def test_requests_of_the_engine_in_python_have_the_objectives_that_they_ask_for(tmp_path: Path) -> None:
    program, policy, log = tmp_path / "program.py", tmp_path / "policy.yaml", tmp_path / "events.jsonl"
    program.write_text(PROGRAM)
    policy.write_text(SLO_POLICY)
    env = os.environ | {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_EVENT_LOG": str(log),
        "FLOWPREFILL_SLO_POLICY": str(policy),
        "FLOWPREFILL_EXPLORATION_SHARE": "0",
        "SGLANG_PLATFORM": "flowprefill_cpu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, str(program), str(embedded_model_path())]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    refused = [line for line in run.stdout.splitlines() if line.startswith("refused:")]
    assert "positive, finite number of seconds" in refused[0]
    assert "there are interactive, batch, default" in refused[1]
    arrivals = [event for event in read_events(log) if isinstance(event, Arrival)]
    seen = [(event.ttft_slo_s, event.slo_class, event.slo_source) for event in arrivals]
    assert seen[:2] == [(5.0, "default", "default"), (1.5, "default", "body")]
    assert sorted(seen[2:4]) == [(0.75, "interactive", "body"), (5.0, "default", "default")]
    assert seen[4:] == [(0.75, "interactive", "priority")]
