"""Times of decode steps: the model that measured ones determine, what it learns, and the file that keeps them."""

from __future__ import annotations

import math
import random
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.policy.decode import CorrectedSteps
from sgl_flowprefill.profiling import Setting
from sgl_flowprefill.profiling.steps import REFIT_STEPS, ROWS, LearnedSteps, LinearSteps, Step, StepProfile
from sgl_flowprefill.runtime import step_profile
from tests.waiting import until

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
    monkeypatch.setattr(step_profile, "measure", lambda role: tuple(measured))
    ranks = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value: value)
    model = step_profile.load_or_measure_steps(SimpleNamespace(scheduler=SimpleNamespace(tp_group=ranks)))  # type: ignore[arg-type]
    assert model.predict_s(8, 512) == pytest.approx(measured[2].time_s, rel=1e-3)
    assert [record.message for record in caplog.records if "cannot keep the times of decode steps" in record.message]


@pytest.mark.parametrize(("device", "most", "widest"), [("cpu", 1000, 32), ("cuda", 1000, 256), ("cuda", 48, 48)])
def test_steps_over_as_many_streams_as_a_gpu_serves_are_measured_there(
    device: str, most: int, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Known:
        limit_tokens = 30_000

        def __init__(self, role: Any) -> None:
            pass

        def time_steps(self, requests: int, tokens: int, steps: int) -> tuple[int, list[float]]:
            return requests, [1.0] + [PROFILED.predict_s(requests, requests * tokens)] * (steps - 1)

    monkeypatch.setattr(step_profile, "SchedulerEngine", Known)
    role: Any = SimpleNamespace(scheduler=SimpleNamespace(device=device, max_running_requests=most))
    measured = step_profile.measure(role)
    assert max(step.requests for step in measured) == widest
    shapes = [(step.requests, step.context_tokens) for step in measured]
    assert len(shapes) == len(set(shapes)), "none is measured twice"
    assert LinearSteps.fit(measured).predict_s(200, 90_000) == pytest.approx(PROFILED.predict_s(200, 90_000), rel=1e-3)


# ---- steps that run -------------------------------------------------------------------------------------------------

PROFILED = LinearSteps(0.01, 1e-3, 1e-6)
OTHER = LinearSteps(0.006, 4e-3, 8e-6)
"""Another machine."""
ANY = ((1, 100), (3, 9_000), (8, 700), (20, 40_000), (40, 5000))


def run_steps(
    learned: LearnedSteps | CorrectedSteps, truth: LinearSteps, count: int, noise: float = 0.05, seed: int = 0
) -> None:
    """Streams come and go, so that steps next to each other are alike."""
    rng = random.Random(seed)
    requests, context = 1, 500
    for _ in range(count):
        if rng.random() < 0.1:
            requests = max(1, min(40, requests + rng.choice([-9, -3, -1, 1, 3, 9])))
            context = requests * rng.choice([60, 300, 1000, 3000])
        context += requests
        learned.observe(requests, context, truth.predict_s(requests, context) * math.exp(rng.gauss(0, noise)))


def off(model: LearnedSteps | CorrectedSteps, truth: LinearSteps) -> float:
    return max(abs(math.log(model.predict_s(*shape) / truth.predict_s(*shape))) for shape in ANY)


def test_steps_of_another_machine_are_learned_and_kept() -> None:
    kept: list[tuple[Step, ...]] = []
    learned = LearnedSteps(steps_of(PROFILED), keep=kept.append)
    before = off(learned, OTHER)
    run_steps(learned, OTHER, 3000)
    assert before > 1
    assert off(learned, OTHER) < 0.15
    assert learned.state()["step_models_adopted"] == len(kept) >= 1
    assert off(LearnedSteps(kept[-1]), OTHER) == pytest.approx(off(learned, OTHER))


def test_a_model_of_steps_that_is_right_stays() -> None:
    learned = LearnedSteps(steps_of(PROFILED))
    for seed in range(5):
        run_steps(learned, PROFILED, 1000, seed=seed)
    assert learned.state()["step_refits"] >= 20
    assert learned.state()["step_models_adopted"] <= 2
    assert off(learned, PROFILED) < 0.1


def test_a_machine_that_is_slower_as_a_whole_changes_no_model_of_steps() -> None:
    learned = LearnedSteps(steps_of(PROFILED))
    slower = LinearSteps(0.02, 2e-3, 2e-6)
    run_steps(learned, slower, 3000)
    shapes = [math.log(learned.predict_s(*shape) / slower.predict_s(*shape)) for shape in ANY]
    assert max(shapes) - min(shapes) < 0.15


def test_steps_that_go_on_are_predicted_as_before_when_another_model_takes_over() -> None:
    learned = LearnedSteps(steps_of(PROFILED))
    corrected, adoptions = CorrectedSteps(learned), 0
    for seed in range(12):
        run_steps(corrected, OTHER, REFIT_STEPS - 1, seed=seed)
        before, adopted = corrected.predict_s(5, 700), learned.state()["step_models_adopted"]
        corrected.observe(5, 700, before)  # as predicted: nothing to correct
        assert corrected.predict_s(5, 700) == pytest.approx(before)
        adoptions += learned.state()["step_models_adopted"] > adopted
    assert adoptions >= 1


@given(
    st.lists(
        st.tuples(
            st.integers(1, 64),
            st.integers(0, 100_000),
            st.one_of(st.floats(1e-4, 1.0), st.sampled_from([0.0, -1.0, math.nan, math.inf, 1e6])),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_whatever_was_measured_no_step_gets_shorter_with_more_to_do(measured: list[tuple[int, int, float]]) -> None:
    learned = LearnedSteps(steps_of(PROFILED))
    for _ in range(2 * REFIT_STEPS // len(measured) + 1):
        for step in measured:
            learned.observe(*step)
    model = learned.model
    assert min(model.fixed_s, model.per_request_s, model.per_token_s) >= 0
    assert all(map(math.isfinite, (model.fixed_s, model.per_request_s, model.per_token_s)))
    assert 0 < model.predict_s(1, 0) <= model.predict_s(32, 0) <= model.predict_s(32, 10_000)
    assert learned.state()["step_rows"] <= ROWS * len(measured)


def test_absurd_steps_change_no_model() -> None:
    learned = LearnedSteps(steps_of(PROFILED))
    rng = random.Random(3)
    for number in range(3000):
        requests, tokens = rng.choice([1, 2, 5, 11, 20]), rng.choice([100, 700, 3000])
        truth_s = PROFILED.predict_s(requests, requests * tokens)
        learned.observe(requests, requests * tokens, truth_s * (rng.choice([1e-4, 500.0]) if number % 40 == 0 else 1))
    assert off(learned, PROFILED) < 0.05


def test_a_server_that_does_not_learn_keeps_its_model_of_steps() -> None:
    learned = LearnedSteps(steps_of(PROFILED), learns=False)
    run_steps(learned, OTHER, 2000)
    assert not any(learned.state().values())
    assert off(learned, PROFILED) < 0.01


def test_a_volume_that_hangs_holds_up_no_step_and_gets_the_newest_model_when_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on, written = threading.Event(), list[tuple[Step, ...]]()
    write = StepProfile.write

    def hanging(profile: StepProfile, path: Path) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert goes_on.wait(60)
        write(profile, path)
        written.append(profile.steps)

    monkeypatch.setattr(StepProfile, "write", hanging)
    path, models = tmp_path / "steps.json", [tuple(steps_of(LinearSteps(0.01 * n, 0.0, 0.0))) for n in range(1, 5)]
    kept = step_profile.Kept(path, SETTING)
    for steps in models:
        kept.write_aside(steps)
    assert not path.exists()
    goes_on.set()
    until(lambda: written[-1:] == models[-1:], 60)
    assert len(written) <= 2, "what was never begun is not written when there is something newer"
    assert StepProfile.read(path, SETTING) == StepProfile(setting=SETTING, steps=models[-1])


def test_learned_steps_take_the_place_of_the_measured_ones_and_a_full_disk_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(step_profile, "current_setting", lambda scheduler: SETTING)
    monkeypatch.setattr(step_profile, "profile_path", lambda setting: tmp_path / "p.parquet")
    monkeypatch.setattr(step_profile, "measure", lambda role: tuple(steps_of(PROFILED)))
    ranks = SimpleNamespace(rank_in_group=0, broadcast_object=lambda value: value)
    role: Any = SimpleNamespace(scheduler=SimpleNamespace(tp_group=ranks))
    learned = step_profile.load_or_measure_steps(role, learns=True)
    run_steps(learned, OTHER, 3000)
    path = step_profile.steps_path(tmp_path / "p.parquet")
    until(lambda: off(step_profile.load_or_measure_steps(role), OTHER) == pytest.approx(off(learned, OTHER)), 60)
    again = step_profile.load_or_measure_steps(role, learns=True)
    path.unlink()
    path.mkdir()  # what cannot be replaced
    for seed in range(1, 5):
        run_steps(again, PROFILED if seed % 2 else OTHER, 3000, seed=seed)
    assert again.state()["step_models_adopted"] >= 2
    until(lambda: caplog.text.count("cannot keep the times of decode steps") == 1, 60)
    kept = step_profile.Kept(path, SETTING)
    for _ in range(2):
        kept.write(tuple(steps_of(OTHER)))
    assert caplog.text.count("cannot keep the times of decode steps") == 2, "one of each"
