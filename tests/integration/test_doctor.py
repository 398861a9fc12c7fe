"""`launch.py doctor`: its checks on the CPU engine, and what it says without a GPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sgl_flowprefill.cluster import machine
from tests.processes import still_alive

ROOT = Path(__file__).parents[2]


def doctor(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "launch.py", "doctor", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | env,
    )


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = doctor("--gpu", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "launch.py doctor: this machine has no NVIDIA GPU, so nothing was checked\n"


@pytest.mark.stress
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_the_process_that_checks(number: signal.Signals, tmp_path: Path) -> None:
    """As launchers of servers do (tests/servers/test_cluster.py), and what is followed (tests/unit/test_guard.py)."""
    command = [sys.executable, "launch.py", "doctor", "--log-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (children := psutil.Process(process.pid).children()):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert still_alive(children) == []


@pytest.mark.stress
@pytest.mark.skipif(bool(machine.gpu_count()), reason="checks the CPU engine")
def test_the_cpu_engine_keeps_its_tokens_and_its_attention_state_apart(tmp_path: Path) -> None:
    done = doctor("--log-dir", str(tmp_path))
    print(done.stdout)
    lines = {line.split("  ", 1)[1]: line.split("  ", 1)[0] for line in done.stderr.splitlines() if "  " in line}
    assert lines["attention slots"] == "pass"
    assert lines["tokens under preemption"] == "pass"
    assert lines["tiled attention"] == "pass"
    cost = "cost of preemption checkpoints"
    checks = {"attention slots", "tokens under preemption", "tiled attention", cost, "blocking"}
    assert set(lines) == checks
    assert done.returncode == (0 if set(lines.values()) == {"pass"} else 1)
