"""`launch.py profile` on the real engine: interrupted, resumed, reported on, and used by schedulers of its setting."""

from __future__ import annotations

import io
import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.profiling import read_profile, write_profile
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.process import measure
from tests import profile_process
from tests.engine import PrefillEngine

ROOT = Path(__file__).parents[2]
OPTIONS = ["--max-total-tokens", "20000"]


def command(directory: Path, *arguments: str) -> list[str]:
    output = ["-o", str(directory / "p.parquet"), "--log-dir", str(directory)]
    return [sys.executable, "launch.py", "profile", *output, *arguments]


@pytest.fixture(scope="module", params=["here", pytest.param("by the command", marks=pytest.mark.stress)])
def profile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile whose run was interrupted once, and resumed: by the command, or ``here``, by the process that it would
    start and the engine of this one, which spares two starts.
    """
    directory = tmp_path_factory.mktemp("profile")
    path, partial = directory / "p.parquet", directory / "p.partial.parquet"
    if request.param == "here":
        profile_process.interrupt(directory, partial, OPTIONS)
    else:
        interrupt(directory, partial)
    kept = read_profile(partial)
    assert kept.rows
    # The design of a long budget would take long to complete.
    kept.longest_tokens = 256
    kept.rows = [row for row in kept.rows if max(new + cached for new, cached in row.shape) <= 256]
    if request.param == "here":
        from sgl_flowprefill.runtime.profile import current_setting

        engine = request.getfixturevalue("shared_engine")
        kept.setting = current_setting(engine.scheduler)  # this process has one thread
        write_profile(partial, kept)
        reports = io.StringIO()
        measure(engine.scheduler, path, 6.0, reports)
        engine.assert_clean()
        end = json.loads(reports.getvalue().splitlines()[-1])
        assert (end["path"], end["complete"]) == (str(path), True)
    else:
        write_profile(partial, kept)
        arguments = command(directory, "--budget-s", "12", *OPTIONS)
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    resumed = read_profile(path)
    assert resumed.complete
    assert resumed.rows[: len(kept.rows)] == kept.rows
    assert len(resumed.rows) > len(kept.rows)
    return path


def interrupt(directory: Path, partial: Path) -> None:
    """Start the command, and end it when it has saved something."""
    embedded_model_path()
    run = subprocess.Popen(command(directory, "--budget-s", "20", *OPTIONS), cwd=ROOT, start_new_session=True)
    profile_process.wait_for(partial, lambda: run.poll() is None, directory / "profile.log")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 1


def test_it_has_operator_times_that_fit_into_the_whole(profile: Path) -> None:
    rows = [row for row in read_profile(profile).rows if row.attention_s is not None]
    assert rows
    for row in rows:
        assert row.attention_s is not None
        assert row.mlp_s is not None
        assert 0 < row.attention_s + row.mlp_s < row.time_s


def test_other_kernels_have_a_profile_of_their_own(engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    from sgl_flowprefill.runtime.profile import current_setting, profile_path

    runner = engine.scheduler.tp_worker.model_runner
    settings = [current_setting(engine.scheduler)]
    monkeypatch.setattr(runner.model_config, "quantization", "fp8")
    settings.append(current_setting(engine.scheduler))
    monkeypatch.setattr(runner, "kv_cache_dtype_str", "fp8_e4m3")
    settings.append(current_setting(engine.scheduler))
    options = SimpleNamespace(moe=SimpleNamespace(moe_runner_backend="triton"))
    monkeypatch.setattr("sgl_flowprefill.runtime.profile.get_exec", lambda: options)
    settings.append(current_setting(engine.scheduler))
    assert settings[-1].difference(settings[0]) == (
        "quantization fp8, not none, kv_cache_dtype fp8_e4m3, not auto, moe_runner_backend triton, not auto"
    )
    assert len(set(map(profile_path, settings))) == 4


def test_it_is_reported_on(profile: Path) -> None:
    done = subprocess.run(command(profile.parent, "--report", "--json"), cwd=ROOT, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    assert figures["median_ape"] < 0.5
    assert {"p90_ape", "worst_shape", "cubic", "strata", "predict_one_us", "predict_1000_ms"} <= set(figures)


def test_a_scheduler_predicts_with_its_own_profile(
    profile: Path, shared_engine: PrefillEngine, caplog: pytest.LogCaptureFixture
) -> None:
    from sgl_flowprefill.runtime.profile import load_or_measure

    own = read_profile(profile)
    own.setting = own.setting.model_copy(update={"threads": torch.get_num_threads()})  # this process has one
    write_profile(profile.parent / "own.parquet", own)
    with caplog.at_level(logging.INFO):
        ttft, operators = load_or_measure(
            shared_engine.scheduler.role, FlowPrefillConfig(profile=str(profile.parent / "own.parquet"))
        )
    batches, _ = own.timings()
    assert f"FlowPrefill predicts TTFT from {len(batches)} measured batches" in caplog.text
    assert operators is not None
    expected = fit(own).model
    assert [ttft.model.predict_s(batch) for batch in batches] == pytest.approx(
        [expected.predict_s(batch) for batch in batches]
    )


@pytest.mark.parametrize("learning", [True, False])
def test_learning_is_an_option(profile: Path, shared_engine: PrefillEngine, learning: bool) -> None:
    from sgl_flowprefill.runtime.learner import LearningTTFT
    from sgl_flowprefill.runtime.profile import load_or_measure

    own = read_profile(profile)
    own.setting = own.setting.model_copy(update={"threads": torch.get_num_threads()})
    write_profile(profile.parent / "own.parquet", own)
    config = FlowPrefillConfig(profile=str(profile.parent / "own.parquet"), learning=learning)
    ttft, _ = load_or_measure(shared_engine.scheduler.role, config)
    assert isinstance(ttft, LearningTTFT) is learning
    assert ("refits" in ttft.state()) is learning


def test_a_scheduler_refuses_a_profile_of_another_one(profile: Path, shared_engine: PrefillEngine) -> None:
    from sgl_flowprefill.runtime.profile import load_or_measure

    other = read_profile(profile)
    other.setting = other.setting.model_copy(update={"device": "another device"})
    write_profile(profile.parent / "other.parquet", other)
    config = FlowPrefillConfig(profile=str(profile.parent / "other.parquet"))
    with pytest.raises(SystemExit, match=r"measured for another server \(device another device, not"):
        load_or_measure(shared_engine.scheduler.role, config)
