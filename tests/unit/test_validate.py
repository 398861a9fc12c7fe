"""``bench validate`` without servers: the simulator stands in for them, so it must agree with itself."""

from __future__ import annotations

import dataclasses
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sgl_flowprefill.bench.capacity.prober import Plan, Prober
from sgl_flowprefill.bench.capacity.probes import ProbeLog
from sgl_flowprefill.bench.cli import validate
from sgl_flowprefill.bench.cli.options import Validate, parse
from sgl_flowprefill.bench.cli.validate import compared, load_rps, rows_table, worst_points
from sgl_flowprefill.bench.systems.catalog import SYSTEMS
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_servers import OPTIONS, WORKLOAD, Model, campaign_of, write_toy_profile


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_profile(tmp_path_factory.mktemp("profile"))


def test_validation_sets_what_was_measured_beside_what_is_simulated(profile: Path, tmp_path: Path) -> None:
    model = Model(profile)
    prober = campaign_of(model, tmp_path).prober
    system = SYSTEMS["stock-fcfs"]
    assert compared(prober, system, 0.5) is None
    with prober.serving(system) as served:
        for seed in range(2):
            prober.probe(served, system, seed, load_rps(prober, 1.2))
    row = compared(prober, system, 1.2)
    assert row is not None
    assert row["measured"] == row["simulated"]  # the simulator against itself
    assert row["differing"] == row["chance_points"] == 0
    assert row["ttft_difference_s"] == pytest.approx([0, 0, 0])
    assert sum(figures["requests"] for figures in row["classes"].values()) == row["requests"]
    assert row["requests"] == sum(probe.total for probe in prober.log.probes)
    prober.log.probes[0] = dataclasses.replace(
        prober.log.probes[0], run=dataclasses.replace(prober.log.probes[0].run, stopped_early=True)
    )
    other = prober.log.probes[1]
    fewer = compared(prober, system, 1.2)
    assert fewer is not None
    assert fewer["requests"] == other.total
    late = [dataclasses.replace(result, ttft_s=(result.ttft_s or 0.0) + 1e3) for result in other.run.results]
    prober.log.probes[1] = dataclasses.replace(other, run=dataclasses.replace(other.run, results=late))
    apart = compared(prober, system, 1.2)
    assert apart is not None
    assert apart["ttft_difference_s"] == pytest.approx([-1e3] * 3)
    assert apart["differing"] == round(apart["simulated"] * other.total) > 0 == apart["measured"]


UNIFIED = ("unified", "unified-sglang", "unified-stock-spf-512-mixed", "unified-stock-spf-512-interval-1")


@pytest.mark.parametrize("name", UNIFIED)
def test_validation_of_servers_that_decode_is_by_first_tokens_and_by_gaps_too(
    profile: Path, tmp_path: Path, name: str
) -> None:
    prober = campaign_of(Model(profile), tmp_path, UNIFIED, seeds=1, max_output_tokens=20, judge="gaps").prober
    system = SYSTEMS[name]
    with prober.serving(system) as served:
        prober.probe(served, system, 0, load_rps(prober, 0.9))
    row = compared(prober, system, 0.9)
    assert row is not None
    assert 0 < row["joint"]["measured"] <= row["measured"]
    assert row["joint"]["differing"] == row["differing"] == 0  # the simulator against itself
    assert row["joint"]["measured_tbt_p99_s"] == row["joint"]["simulated_tbt_p99_s"] > 0
    assert sum(figures["requests"] for figures in row["classes"].values()) == row["requests"]
    [probe] = prober.log.probes
    stuttering = [dataclasses.replace(one, tbt_s=(*one.tbt_s[:-1], 9.0)) for one in probe.run.results]
    prober.log.probes[0] = dataclasses.replace(probe, run=dataclasses.replace(probe.run, results=stuttering))
    apart = compared(prober, system, 0.9)
    assert apart is not None
    assert apart["difference_points"] == 0
    assert apart["joint"]["measured"] < row["joint"]["measured"]
    assert worst_points([row, apart]) == apart["joint"]["difference_points"] > 0
    console = Console(file=StringIO(), width=160)
    console.print(rows_table([apart]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"+{apart['joint']['difference_points']:.1f}" in text
    assert f"TBT p99 {1e3 * apart['joint']['measured_tbt_p99_s']:.0f} ms / " in text
    again = campaign_of(Model(profile), tmp_path, UNIFIED, seeds=1, max_output_tokens=20, judge="gaps").prober
    assert compared(again, system, 0.9) == row, "steps are in the log"


@pytest.mark.parametrize("name", ["unified", "unified-sglang"])
def test_both_sides_become_slower_in_the_middle_of_a_replay(profile: Path, tmp_path: Path, name: str) -> None:
    rows = {}
    for slower in (0.0, 0.5):
        plan = Plan(WORKLOAD, 1, 60.0, 20, "gaps", slower=slower)
        log = ProbeLog(tmp_path / f"{slower}.jsonl", plan.settings())
        prober = Prober(plan, log, Model(profile).serve, Console(file=StringIO()), OPTIONS)
        with prober.serving(SYSTEMS[name]) as served:
            prober.probe(served, SYSTEMS[name], 0, load_rps(prober, 0.8))
        row = rows[slower] = compared(prober, SYSTEMS[name], 0.8)
        assert row is not None
        assert row["differing"] == row["joint"]["differing"] == 0
    assert rows[0.5]["simulated_ttft_p50_s"] > rows[0.0]["simulated_ttft_p50_s"]
    with pytest.raises(ValueError, match=r"slower 0\.5, not 0\.0"):
        ProbeLog(tmp_path / "0.5.jsonl", Plan(WORKLOAD, 1, 60.0, 20, "gaps").settings())


def test_a_run_validates_one_kind_of_servers(tmp_path: Path) -> None:
    for arguments, remedy in ((["--systems", "unified"], "give"), (["--unified", "--systems", "sglang"], "leave out")):
        options = parse(["validate", "--out", str(tmp_path), *arguments])
        assert isinstance(options, Validate)
        with pytest.raises(ValueError, match=f"validates one kind: {remedy} --unified"):
            validate.run(options, Console(file=StringIO()))


def test_the_simulator_is_as_fast_as_the_machine_was_between_lone_requests(profile: Path, tmp_path: Path) -> None:
    model = Model(profile)
    prober = campaign_of(model, tmp_path).prober
    system = SYSTEMS["flowprefill"]
    prompt = [PrefillShape(2048)]
    with prober.serving(system) as served:
        at_start_s = prober.setup_of(system).machine.cost.predict_s(prompt)
        model.slowdown = 1.2
        prober.measure_isolated(served, system)
    ratio = prober.setup_of(system).machine.cost.predict_s(prompt) / at_start_s
    assert ratio == pytest.approx(1.1, rel=0.02)
