"""`launch.py profile` on the real engine: interrupted, resumed, reported on, and used by schedulers of its setting."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.profiling import read_profile, write_profile

ROOT = Path(__file__).parents[2]
OPTIONS = ["--max-total-tokens", "20000"]


def command(directory: Path, *arguments: str) -> list[str]:
    output = ["-o", str(directory / "p.parquet"), "--log-dir", str(directory)]
    return [sys.executable, "launch.py", "profile", *output, *arguments]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    embedded_model_path()
    return tmp_path_factory.mktemp("profile")


@pytest.fixture(scope="module")
def profile(directory: Path) -> Path:
    """A profile whose run was interrupted once."""
    partial = directory / "p.partial.parquet"
    run = subprocess.Popen(command(directory, "--budget-s", "300", *OPTIONS), cwd=ROOT, start_new_session=True)
    started_s = time.monotonic()
    while not partial.exists():
        assert run.poll() is None, (directory / "profile.log").read_text()[-2000:]
        assert time.monotonic() - started_s < 240
        time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 1
    kept = read_profile(partial)
    assert kept.rows
    # The design of a long budget would take long to complete.
    kept.longest_tokens = 256
    kept.rows = [row for row in kept.rows if max(new + cached for new, cached in row.shape) <= 256]
    write_profile(partial, kept)
    done = subprocess.run(command(directory, "--budget-s", "25", *OPTIONS), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    resumed = read_profile(directory / "p.parquet")
    assert resumed.complete
    assert resumed.rows[: len(kept.rows)] == kept.rows
    return directory / "p.parquet"


def test_it_has_operator_times_that_fit_into_the_whole(profile: Path) -> None:
    rows = [row for row in read_profile(profile).rows if row.attention_s is not None]
    assert rows
    for row in rows:
        assert row.attention_s is not None
        assert row.mlp_s is not None
        assert 0 < row.attention_s + row.mlp_s < row.time_s


def test_it_is_reported_on(profile: Path) -> None:
    done = subprocess.run(command(profile.parent, "--report", "--json"), cwd=ROOT, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    assert figures["median_ape"] < 0.5
    assert {"p90_ape", "worst_shape", "cubic", "strata", "predict_one_us", "predict_1000_ms"} <= set(figures)


def test_a_scheduler_predicts_with_its_own_profile_and_refuses_another_ones(profile: Path) -> None:
    directory = profile.parent
    other = read_profile(profile)
    other.setting = other.setting.model_copy(update={"device": "another device"})
    write_profile(directory / "other.parquet", other)
    ends = {}
    for name in ("p.parquet", "other.parquet"):
        arguments = ["--budget-s", "1", "--flowprefill-profile", str(directory / name), *OPTIONS]
        again = [sys.executable, "launch.py", "profile", "-o", str(directory / "again.parquet")]
        again += ["--log-dir", str(directory), *arguments]
        done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True)
        ends[name] = done.stderr + (directory / "profile.log").read_text()
    assert "FlowPrefill predicts TTFT from" in ends["p.parquet"]
    assert "measured for another server (device another device, not" in ends["other.parquet"]
