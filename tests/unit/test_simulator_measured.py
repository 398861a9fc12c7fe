"""The simulator as the engine on a machine: which profile it takes, and what it charges beside forwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sgl_flowprefill.bench.simulator.measured import Engine, best_profile, measured_setup
from sgl_flowprefill.bench.simulator.step_cost import CPU_ENGINE
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling import Profile, Row, Setting, write_profile
from sgl_flowprefill.profiling.steps import Step
from sgl_flowprefill.ttft import PrefillShape

SETTING = Setting(model="toy-1", device="d", dtype="f", attention_backend="a", threads=1, sglang="0")


def row(new_tokens: int, cached_tokens: int = 0, factor: float = 1.0) -> Row:
    time_s = 0.01 + 1e-4 * new_tokens + 1e-9 * new_tokens * (new_tokens + 2 * cached_tokens)
    return Row((PrefillShape(new_tokens, cached_tokens),), factor * time_s, 0.0, 0, 0.0)


def test_a_profile_with_cached_prefixes_is_preferred_to_a_newer_one_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=r"launch\.py profile"):
        best_profile("toy")
    singles = [row(tokens) for tokens in (16, 256, 4096)]
    profiles = {
        "full": Profile(SETTING, 4096, [*singles, row(256, 1024)], complete=True),
        "short": Profile(SETTING, 4096, singles, complete=True),
        "partial": Profile(SETTING, 4096, [*singles, row(256, 1024)], complete=False),
    }
    for seconds, (name, profile) in enumerate(profiles.items()):
        path = tmp_path / "profiles" / f"{name}.parquet"
        write_profile(path, profile)
        os.utime(path, (seconds, seconds))
    assert best_profile("toy").stem == "full"
    (tmp_path / "profiles" / "full.parquet").unlink()
    assert best_profile("toy").stem == "short"


def test_lone_requests_say_what_is_charged_beside_a_forward_and_how_slow_the_machine_is(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    lengths = (512, 1024, 2048, 8192)
    write_profile(path, Profile(SETTING, 8192, [row(tokens) for tokens in (16, *lengths)], complete=True))
    solo_ttft_s = {tokens: 0.02 + row(tokens, factor=1.25).time_s for tokens in lengths}
    engine = Engine(str(path), 8, None, between_forwards_s=0.002)
    cost = measured_setup(engine, solo_ttft_s, FlowPrefillConfig()).machine.cost
    assert cost.serving_s == pytest.approx(0.018, abs=0.001)
    for tokens in lengths:
        assert cost.predict_s([PrefillShape(tokens)]) == pytest.approx(
            row(tokens, factor=1.25).time_s + 0.002, rel=0.01
        )


def test_flowprefill_is_simulated_with_the_options_of_its_servers(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_profile(path, Profile(SETTING, 8192, [row(tokens) for tokens in (16, 512, 2048, 8192)], complete=True))
    engine = Engine(str(path), 8, None, between_forwards_s=0.0)
    options = FlowPrefillConfig(max_suspended=3, max_blocking_ms=2.5, max_starvation_s=7.0, max_batch_tokens=99)
    solo_ttft_s = {tokens: 0.02 + row(tokens).time_s for tokens in (512, 2048)}
    setup = measured_setup(engine, solo_ttft_s, options)
    assert (setup.limits.max_suspended, setup.limits.max_batch_tokens) == (3, 99)
    assert (setup.max_operator_s, setup.max_starvation_s) == (0.0025, 7.0)
    assert measured_setup(engine, solo_ttft_s, FlowPrefillConfig()).max_operator_s == 0.005


def test_decode_steps_cost_what_was_measured_of_them(tmp_path: Path) -> None:
    path = tmp_path / "toy.parquet"
    write_profile(path, Profile(SETTING, 8192, [row(tokens) for tokens in (16, 512, 2048, 8192)], complete=True))
    engine = Engine(str(path), 8, None, between_forwards_s=0.0)
    shapes = [(1, 528), (4, 2112), (16, 8448), (4, 16448)]
    steps = [Step(requests=n, context_tokens=c, time_s=0.006 + 0.002 * n + 1e-6 * c) for n, c in shapes]
    solo_ttft_s = {tokens: 0.02 + row(tokens).time_s for tokens in (512, 2048)}
    measured = measured_setup(engine, solo_ttft_s, FlowPrefillConfig(), steps).steps()
    assert measured.predict_s(8, 10_000) == pytest.approx(0.006 + 0.016 + 0.01)
    assert measured_setup(engine, solo_ttft_s, FlowPrefillConfig()).steps() is CPU_ENGINE, "an assumption otherwise"
