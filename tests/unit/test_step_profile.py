"""Times of decode steps: the model that measured ones determine, and the file that keeps them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.profiling import Setting
from sgl_flowprefill.profiling.steps import LinearSteps, Step, StepProfile
from sgl_flowprefill.runtime import step_profile

SHAPES = ((1, 64), (2, 128), (8, 512), (32, 2048), (1, 3072), (8, 4096))
SETTING = Setting(model="m", device="d", dtype="f", attention_backend="a", threads=1, sglang="0")


def steps_of(model: LinearSteps) -> list[Step]:
    return [Step(requests=n, context_tokens=tokens, time_s=model.predict_s(n, tokens)) for n, tokens in SHAPES]


@given(st.floats(1e-4, 1e-1), st.floats(0.0, 1e-2), st.floats(0.0, 1e-5))
def test_steps_that_follow_the_model_determine_it(fixed_s: float, per_request_s: float, per_token_s: float) -> None:
    model = LinearSteps(fixed_s, per_request_s, per_token_s)
    found = LinearSteps.fit(steps_of(model))
    for requests, tokens in ((1, 1), (5, 999), (64, 30_000)):
        assert found.predict_s(requests, tokens) == pytest.approx(model.predict_s(requests, tokens), rel=1e-3)


def test_no_step_gets_shorter_with_more_to_do_whatever_was_measured() -> None:
    measured = [
        Step(requests=1, context_tokens=64, time_s=0.02),
        Step(requests=8, context_tokens=512, time_s=0.01),
        Step(requests=16, context_tokens=1024, time_s=0.015),
    ]
    found = LinearSteps.fit(measured)
    assert 0.0 < found.predict_s(1, 0) <= found.predict_s(32, 0) <= found.predict_s(32, 10_000)


def test_steps_are_read_by_the_server_that_they_were_measured_on_and_by_no_other(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "steps.json"
    profile = StepProfile(setting=SETTING, steps=tuple(steps_of(LinearSteps(0.01, 1e-3, 1e-6))))
    assert StepProfile.read(path, SETTING) is None
    profile.write(path)
    assert StepProfile.read(path, SETTING) == profile
    assert StepProfile.read(path, SETTING.model_copy(update={"threads": 2})) is None
    path.write_text(path.read_text()[:-20])
    assert StepProfile.read(path, SETTING) is None


def test_a_full_disk_costs_the_next_start_a_measurement_and_this_one_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured = steps_of(LinearSteps(0.01, 1e-3, 1e-6))
    (tmp_path / "full").write_text("no directory")
    monkeypatch.setattr(step_profile, "current_setting", lambda scheduler: SETTING)
    monkeypatch.setattr(step_profile, "profile_path", lambda setting: tmp_path / "full" / "p.parquet")
    monkeypatch.setattr(step_profile, "_measure", lambda role: tuple(measured))
    ranks = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value: value)
    model = step_profile.load_or_measure_steps(SimpleNamespace(scheduler=SimpleNamespace(tp_group=ranks)))  # type: ignore[arg-type]
    assert model.predict_s(8, 512) == pytest.approx(measured[2].time_s, rel=1e-3)
    assert [record.message for record in caplog.records if "cannot keep the times of decode steps" in record.message]
