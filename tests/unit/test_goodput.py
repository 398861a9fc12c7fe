"""The goodput run without servers: the simulator stands in for them, so what must come out is known."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sgl_flowprefill.bench.capacity import campaign as campaign_module
from sgl_flowprefill.bench.capacity.campaign import Campaign
from sgl_flowprefill.bench.capacity.prober import Plan
from sgl_flowprefill.bench.capacity.probes import Probe
from sgl_flowprefill.bench.capacity.results import GoodputResult, SystemFigures, mean_estimate, ratio_estimate
from sgl_flowprefill.bench.cli.goodput import publish
from sgl_flowprefill.bench.loadgen.replay import STOPPED
from sgl_flowprefill.bench.reports.goodput import cells, rates_table, render_html
from sgl_flowprefill.bench.simulator.joint import attainments
from sgl_flowprefill.bench.simulator.measured import saturation_rps
from sgl_flowprefill.bench.simulator.systems import run as simulated
from sgl_flowprefill.bench.systems.catalog import SYSTEMS, select
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE
from sgl_flowprefill.provenance import PROVENANCE, read_result
from tests.simulated_servers import (
    DECODE_TOKENS_PER_S,
    NAMES,
    OPTIONS,
    SOLO_TTFT_S,
    Model,
    campaign_of,
    verdict,
    write_toy_profile,
)


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_profile(tmp_path_factory.mktemp("profile"))


def test_answers_take_a_share_of_what_the_decode_server_carries_at_saturation_and_the_same_at_all_rates(
    profile: Path, tmp_path: Path
) -> None:
    prober = campaign_of(Model(profile), tmp_path, max_output_tokens=None).prober
    with prober.serving(SYSTEMS[NAMES[0]]):
        pass
    whole = prober.plan.trace(0, prober.plan.workload.rate_rps, prober.time_scale)
    saturated_rps = saturation_rps(whole, prober.setup.machine.cost)
    for rate_rps in (1.0, 5.0):
        trace = prober.trace(0, rate_rps)
        own = prober.plan.trace(0, rate_rps, prober.time_scale)
        assert trace == prober.answers.of(own)
        mean_tokens = sum(request.output_tokens for request in trace.requests) / len(trace.requests)
        assert saturated_rps * mean_tokens == pytest.approx(DECODE_SHARE * DECODE_TOKENS_PER_S, rel=0.25)
    again = campaign_of(Model(profile), tmp_path, max_output_tokens=None).prober
    assert again.is_calibrated
    assert again.answers == prober.answers, "a run that goes on keeps its lengths"


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that has found all, its model and where its log is."""

    model: Model
    campaign: Campaign
    folder: Path


@pytest.fixture(scope="module")
def finished(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    model, folder = Model(profile), tmp_path_factory.mktemp("finished")
    campaign = campaign_of(model, folder)
    campaign.run()
    return Finished(model, campaign, folder)


def test_a_run_finds_the_rates_of_its_servers_and_reports_them(finished: Finished, tmp_path: Path) -> None:
    model, campaign = finished.model, finished.campaign
    assert campaign.probes_left() == 0
    result = GoodputResult.of(campaign, "toy")
    for name in NAMES:
        for share in (0.9, 0.99):
            for seed, bracket in result.figures[name].brackets[share].items():
                kept = [
                    simulated(
                        SYSTEMS[name].simulated(OPTIONS), campaign.prober.trace(seed, rate), model.setup
                    ).attainment
                    >= share
                    for rate in bracket
                    if rate > 0
                ]
                assert kept == ([True, False] if bracket.low_rps else [False]), (name, share, seed)
    console = Console(file=StringIO(), width=200)
    publish(result, tmp_path, console)
    document = json.loads((tmp_path / "goodput.json").read_text())
    for name in NAMES:
        system = document["systems"][name]
        assert set(system) >= {"max_rate_rps", "ci95", "uncontended_tokens_per_s", "blocking_mean_s"}
        assert system["simulated_attainment"] == pytest.approx(system["attainment_by_slo_scale"]["1.0"], abs=0.01)
        for key in ("90", "99"):
            low, high = system["ci95"][key]
            assert low <= system["max_rate_rps"][key] <= high
    ratios = document["ratios"]
    assert set(ratios) >= {"vs_unchunked_fcfs_90", "vs_best_stock_90", "vs_best_stock_99", "blocking_vs_layer"}
    rates = {name: document["systems"][name]["max_rate_rps"]["90"] for name in NAMES}
    assert ratios["vs_unchunked_fcfs_90"] == pytest.approx(rates["flowprefill"] / rates["stock-fcfs"])
    assert document["best_stock"]["90"] == max(("stock-fcfs", "stock-spf-512"), key=lambda name: rates[name])
    assert ratios["blocking_vs_layer"] > 1.5
    assert ratios["slo_tightness_vs_best_stock"] > 1
    page = (tmp_path / "goodput.html").read_text()
    for plot in ("rates", "attainment", "ttft", "scales", "blocking"):
        assert f'id="plot-{plot}"' in page
    markup = re.sub(r"<script\b[^>]*>.*?</script>", "<script></script>", page, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)\s*=""", markup)
    assert "SGLang spf, chunk 512" in console.file.getvalue()  # type: ignore[attr-defined]
    assert set(PROVENANCE) <= set(document)


def test_a_result_is_read_and_shown_again_without_planning_or_simulating(
    finished: Finished, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(file=StringIO(), width=200)
    publish(GoodputResult.of(finished.campaign, "toy"), tmp_path, console)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a result is data")

    monkeypatch.setattr(campaign_module, "mean_attainment", refuse)
    resumed = campaign_of(Model(profile), finished.folder)
    again = GoodputResult.of(resumed, "toy").to_dict()
    monkeypatch.setattr(Plan, "trace", refuse)
    found = read_result(tmp_path / "goodput.json")
    assert {name: again[name] for name in found.figures} == found.figures, "a finished run finds the same from its log"
    table = Console(file=StringIO(), width=200)
    table.print(rates_table(found.figures))
    printed, shown = (one.file.getvalue() for one in (console, table))  # type: ignore[attr-defined]
    assert shown.strip() in printed
    written = json.loads((tmp_path / "goodput.json").read_text())
    assert render_html(written) == (tmp_path / "goodput.html").read_text()


def test_systems_take_turns_and_are_compared_at_one_rate_to_the_end(profile: Path, tmp_path: Path) -> None:
    model = Model(profile)
    campaign = campaign_of(model, tmp_path, attainments=(0.9,), precision=1.02)
    campaign.run()
    first_round = model.order[: len(NAMES) + 1]
    assert first_round[0] == NAMES[0]
    assert set(first_round) == set(NAMES)
    at = campaign.log.facts["comparison_rps"]
    for name in NAMES:
        for seed in range(2):
            probe = campaign.log.complete_at(at, name, seed)
            assert probe is not None
            assert len(probe.run.results) == probe.total
    assert sum(probe.slo_scale == 1 for probe in campaign.log.probes) <= len(model.order) * 2


def test_unified_servers_are_searched_by_their_first_tokens_and_gaps_together(profile: Path, tmp_path: Path) -> None:
    model = Model(profile)

    def campaign_for() -> Campaign:
        return campaign_of(
            model,
            tmp_path,
            ("unified", "unified-stock-spf-512-mixed", "unified-sglang"),
            seeds=1,
            judge="gaps",
            max_output_tokens=20,
            attainments=(0.9,),
        )

    campaign = campaign_for()
    campaign.run()
    result = GoodputResult.of(campaign, "toy")
    for name, figures in result.figures.items():
        simulation = SYSTEMS[name].simulated(OPTIONS)
        assert simulation is not None
        for rate_rps in figures.brackets[0.9][0]:
            if 0 < rate_rps < math.inf:
                traces = [campaign.prober.trace(0, rate_rps)]
                kept = attainments(simulation, traces, model.setup)["gaps"] >= 0.9
                assert kept == (rate_rps == figures.brackets[0.9][0].low_rps), (name, rate_rps)
    assert all(probe.slo_scale == 1 for probe in campaign.log.probes), "no other objectives between tokens are told"
    console = Console(file=StringIO(), width=250)
    publish(result, tmp_path, console)
    document = json.loads((tmp_path / "goodput.json").read_text())
    assert document["judge"] == "gaps"
    rates = {name: system["max_rate_rps"]["90"] for name, system in document["systems"].items()}
    assert rates["unified"] > rates["unified-stock-spf-512-mixed"]
    best = max(("unified-stock-spf-512-mixed", "unified-sglang"), key=lambda name: rates[name])
    assert document["ratios"]["vs_best_stock_90"] == pytest.approx(rates["unified"] / rates[best])
    joint = document["systems"]["unified"]["joint"]
    assert 0 < joint["joint_attainment"] <= joint["joint_attainment_mean_tpot"] <= 1
    assert joint["tbt_p50_s"] <= joint["tbt_p99_s"] <= joint["tbt_max_s"]
    assert joint["tokens_per_s"] > 0
    assert joint["retractions"] is None, "simulated answers do not say"
    assert "TBT p50 / p99 / longest" in console.file.getvalue()  # type: ignore[attr-defined]
    assert "at most 1% of their gaps late" in " ".join((tmp_path / "goodput.html").read_text().split())
    resumed = campaign_for()
    assert resumed.probes_left() == 0, "gaps are in the log"
    assert GoodputResult.of(resumed, "toy").to_dict()["systems"] == result.to_dict()["systems"]
    with pytest.raises(ValueError, match="judge gaps, not ttft"):
        campaign_of(Model(profile), tmp_path, seeds=1, max_output_tokens=20)


def test_systems_that_order_by_slos_are_told_tighter_ones(profile: Path, tmp_path: Path) -> None:
    model = Model(profile)
    campaign = campaign_of(model, tmp_path, ("flowprefill", "stock-spf-512"), attainments=(0.9,))
    campaign.run()
    at = campaign.log.facts["comparison_rps"]
    told = [(probe.system, probe.slo_scale, probe.seed) for probe in campaign.log.probes if probe.slo_scale != 1]
    assert sorted(told) == [("flowprefill", scale, seed) for scale in (0.4, 0.6, 0.8) for seed in (0, 1)]
    assert {probe.rate_rps for probe in campaign.log.probes if probe.slo_scale != 1} == {at}
    ours, stock = (GoodputResult.of(campaign, "").figures[name] for name in ("flowprefill", "stock-spf-512"))
    for scale in (0.4, 0.6, 0.8):
        traces = [campaign.prober.trace(seed, at, scale) for seed in range(2)]
        expected = [
            simulated(SYSTEMS["flowprefill"].simulated(OPTIONS), trace, model.setup).attainment for trace in traces
        ]
        assert ours.attainment_by_slo_scale[scale] == pytest.approx(np.mean(expected))
        assert stock.attainment_by_slo_scale[scale] == pytest.approx(
            np.mean([np.mean([r.meets_ttft(scale) for r in probe.run.results]) for probe in stock.compared.values()])
        )
    for seed, scale in ours.slo_scales(0.9).items():
        kept = [one for one in (0.4, 0.6, 0.8, 1.0) if ours.attainment_at(one, seed) >= 0.9]
        assert max(0.4, min(kept) - 0.2) <= scale <= min(kept)
    for seed, scale in stock.slo_scales(0.9).items():
        assert stock.attainment_at(scale * 1.0001, seed) >= 0.9 > stock.attainment_at(scale * 0.9999, seed)


@pytest.fixture(scope="module")
def compared_probe(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Probe:
    """FlowPrefill's probe at the rate at which systems are compared, replayed to its end."""
    names = ("flowprefill", "stock-fcfs")
    campaign = campaign_of(Model(profile), tmp_path_factory.mktemp("run"), names, attainments=(0.9,), seeds=1)
    campaign.run()
    (probe,) = GoodputResult.of(campaign, "").figures["flowprefill"].compared.values()
    return probe


@pytest.mark.parametrize(
    ("share", "scale"),
    [(0.99, 1.5), (0.965, 0.9), (0.9, 0.7), (0.65, 0.44), (0.5, 0.4)],
    ids=["above 1", "below 1", "between two", "above the tightest", "the tightest"],
)
def test_the_scale_kept_is_interpolated_between_those_told(compared_probe: Probe, share: float, scale: float) -> None:
    probe = compared_probe
    (result, *_) = probe.run.results

    def met(share: float) -> Probe:
        ttft_s = [result.ttft_slo_s * (1.0 if place < 100 * share else 1.5) for place in range(100)]
        results = [dataclasses.replace(result, ttft_s=one) for one in ttft_s]
        return dataclasses.replace(probe, run=dataclasses.replace(probe.run, results=results))

    figures = SystemFigures(
        SYSTEMS["flowprefill"],
        {},
        {0: met(0.98)},
        {0.8: {0: met(0.95)}, 0.6: {0: met(0.85)}, 0.4: {0: met(0.6)}},
        [],
        {},
    )
    assert figures.slo_scales(share) == {0: pytest.approx(scale)}


def test_a_run_that_was_stopped_goes_on_and_makes_no_probe_twice(
    finished: Finished, profile: Path, tmp_path: Path
) -> None:
    interrupted = Model(profile, interrupt_after=9)
    with pytest.raises(KeyboardInterrupt):
        campaign_of(interrupted, tmp_path / "parts").run()
    path = tmp_path / "parts" / "probes.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "probe", "sys')  # killed while it wrote
    resumed = campaign_of(Model(profile), tmp_path / "parts")
    assert len(resumed.log.probes) == 9
    resumed.run()
    key = [
        (probe.system, probe.seed, probe.rate_rps, probe.total) for probe in resumed.log.probes if probe.slo_scale == 1
    ]
    found = GoodputResult.of(resumed, "").ratios_of_ours["vs_unchunked_fcfs_90"]
    expected = GoodputResult.of(finished.campaign, "").ratios_of_ours["vs_unchunked_fcfs_90"]
    assert found is not None
    assert expected is not None
    assert found.value == pytest.approx(expected.value, rel=0.1)
    for name in NAMES:
        for seed in range(2):
            rates = [(at, total) for system, of, at, total in key if (system, of) == (name, seed)]
            complete = [p for p in resumed.log.of(name, seed) if p.complete]
            assert len(rates) - len(set(rates)) <= len(complete)


def test_the_time_scale_of_a_run_stays(profile: Path, tmp_path: Path) -> None:
    prober = campaign_of(Model(profile), tmp_path).prober
    prober.fix_time_scale("auto")
    assert "time_scale" not in prober.log.facts
    prober.fix_time_scale(1.5)
    prober.fix_time_scale("auto")
    prober.fix_time_scale(1.5)
    assert prober.time_scale == 1.5
    with pytest.raises(ValueError, match=r"time scale 1\.5, not 1\.4: give another --out"):
        prober.fix_time_scale(1.4)


def test_probes_of_other_settings_are_refused(profile: Path, tmp_path: Path) -> None:
    campaign_of(Model(profile), tmp_path)
    with pytest.raises(ValueError, match=r"duration_s 40\.0, not 45\.0"):
        campaign_of(Model(profile), tmp_path, duration_s=45.0)


def test_a_spent_budget_ends_the_run_between_probes(profile: Path, tmp_path: Path) -> None:
    campaign = campaign_of(Model(profile), tmp_path)
    campaign.run(budget_s=0.0)
    assert campaign.log.facts["time_scale"] > 0
    assert not campaign.log.probes
    assert campaign.probes_left() > 0
    assert not GoodputResult.of(campaign, "").finished


def test_a_client_that_keeps_falling_behind_ends_the_search_and_is_named(profile: Path, tmp_path: Path) -> None:
    campaign = campaign_of(
        Model(profile, invalid="it fell behind"), tmp_path, ("flowprefill",), seeds=1, attainments=(0.9,)
    )
    campaign.run()
    assert len(campaign.log.probes) == 3
    result = GoodputResult.of(campaign, "")
    assert result.problems == [
        "flowprefill: 3 of 3 probes are not valid; the first: it fell behind",
    ]
    assert result.figures["flowprefill"].max_rate(0.9) is None


def test_requests_that_failed_are_named_also_where_a_probe_was_stopped_early(profile: Path, tmp_path: Path) -> None:
    campaign = campaign_of(Model(profile), tmp_path, ("stock-fcfs",), seeds=1, attainments=(0.9,))
    campaign.run(budget_s=0.0)
    probe = verdict("stock-fcfs", 0, 1.0, False)
    (result,) = probe.run.results
    late, refused = (dataclasses.replace(result, error=error) for error in (STOPPED, "http 400: too long"))
    for results, problems in (
        ([late], []),
        ([late, refused], ["stock-fcfs: 1 requests failed; the first: http 400: too long"]),
    ):
        run = dataclasses.replace(probe.run, results=results, stopped_early=True)
        campaign.log.add(dataclasses.replace(probe, run=run, total=20))
        assert GoodputResult.of(campaign, "").problems == problems


def test_a_machine_whose_speed_changed_is_reported(profile: Path, tmp_path: Path) -> None:
    campaign = campaign_of(Model(profile), tmp_path, ("flowprefill", "stock-fcfs"), seeds=1)
    campaign.run()
    assert not GoodputResult.of(campaign, "").problems
    campaign.log.add_solo("stock-fcfs", {tokens: 1.3 * time_s for tokens, time_s in SOLO_TTFT_S.items()})
    (problem,) = GoodputResult.of(campaign, "").problems
    assert "speed changed: isolated requests on stock-fcfs" in problem


def test_the_prefilter_measures_the_best_stock_and_says_what_it_left_out(profile: Path, tmp_path: Path) -> None:
    names = ("flowprefill", "stock-fcfs", "stock-fcfs-8192", "stock-lpm", "stock-spf-512", "stock-spf-2048")
    campaign = campaign_of(Model(profile), tmp_path, names, prefilter=1, attainments=(0.9,))
    campaign.run(budget_s=0.0)
    measured = {system.name for system in campaign.systems}
    best = max(names[1:], key=lambda name: campaign.simulated_rps(SYSTEMS[name], 0.9))
    assert measured == {"flowprefill", "stock-fcfs", best}
    left_out = GoodputResult.of(campaign, "").only_simulated_rps
    assert set(left_out) == set(names) - measured
    assert all(rates[0.9] > 0 for rates in left_out.values())


def test_a_race_finds_the_best_stock_with_fewer_probes(profile: Path, tmp_path: Path) -> None:
    raced_names = ("stock-fcfs-8192", "stock-lpm-512", "stock-hrrn-512", "stock-spf-1024", "stock-priority-2048")
    names = ("flowprefill", "stock-fcfs", *raced_names)
    whole, race = (
        campaign_of(Model(profile), tmp_path / str(race), names, duration_s=60.0, race=race) for race in (False, True)
    )
    whole.run()
    for fact, value in whole.log.facts.items():
        if fact.startswith("simulated rate"):
            race.log.fix(fact, value)  # the simulator says the same of both
    race.run()
    assert race.probes_left() == 0
    assert len(race.log.probes) < len(whole.log.probes)
    complete, raced = GoodputResult.of(whole, ""), GoodputResult.of(race, "")
    out: list[tuple[str, float]] = []
    for share in (0.9, 0.99):
        best = raced.best_stock(share)
        rate, found = complete.figures[complete.best_stock(share)].max_rate(share), raced.figures[best].max_rate(share)
        assert found.value == pytest.approx(rate.value, rel=0.1)
        assert raced.figures["stock-fcfs"].max_rate(share) is not None, "the stand-in for DistServe is measured"
        for name in (name for name in names[2:] if share in raced.figures[name].beaten):
            out.append((name, share))
            assert name != best
            assert raced.figures[name].max_rate(share) is None
            below_rps = raced.figures[name].below_rps(share)
            assert complete.figures[name].mean_bracket(share, range(2)).low_rps <= below_rps
            assert below_rps <= rate.ci95[1]
    name, share = out[0]
    found = raced.to_dict()
    rows = " ".join(cells(found["systems"][name], found))
    assert "below" in rows
    publish(raced, tmp_path, Console(file=StringIO(), width=200))
    document = json.loads((tmp_path / "goodput.json").read_text())
    assert document["systems"][name]["below_rps"][f"{share:.0%}".rstrip("%")] > 0


def test_a_race_is_decided_by_the_mean_over_seeds(profile: Path, tmp_path: Path) -> None:
    """Neither of two systems that each win on one seed is out before the mean is known."""
    one, other = "stock-spf-512", "stock-spf-1024"
    campaign = campaign_of(Model(profile), tmp_path, ("stock-fcfs", one, other), race=True, attainments=(0.9,))
    campaign.run(budget_s=0.0)
    true_rps = {one: (4.0, 9.0), other: (8.0, 3.0)}
    for _ in range(40):
        for name in (one, other):
            for seed in range(2):
                rate_rps = campaign.next_rps(SYSTEMS[name], seed, 0.9)
                if rate_rps is not None:
                    campaign.log.add(verdict(name, seed, rate_rps, rate_rps <= true_rps[name][seed]))
    assert not campaign.is_beaten(SYSTEMS[one], 0.9)
    assert campaign.is_beaten(SYSTEMS[other], 0.9)
    figures = GoodputResult.of(campaign, "").figures
    rate = figures[one].max_rate(0.9)
    assert rate is not None
    assert rate.value == pytest.approx(6.5, rel=0.1)
    assert figures[other].below_rps(0.9) <= rate.value * 1.1


def test_what_is_only_compared_is_not_searched(profile: Path, tmp_path: Path) -> None:
    campaign = campaign_of(Model(profile), tmp_path, ("flowprefill", "stock-fcfs"), attainments=(0.9,))
    campaign = Campaign(campaign.prober, campaign.asked_for, campaign.goal, select(("flowprefill-layer", "stock-fcfs")))
    campaign.run()
    at = campaign.log.facts["comparison_rps"]
    layer = [probe for probe in campaign.log.probes if probe.system == "flowprefill-layer"]
    assert {(probe.rate_rps, probe.seed) for probe in layer} == {(at, 0), (at, 1)}
    result = GoodputResult.of(campaign, "")
    assert result.figures["flowprefill-layer"].max_rate(0.9) is None
    assert result.figures["stock-fcfs"].max_rate(0.9) is not None
    ratio = result.ratios_of_ours["blocking_vs_layer"]
    assert ratio is not None
    assert ratio.value > 1.5


def test_intervals_are_bootstraps_over_seeds_and_ratios_are_paired() -> None:
    ours, theirs = {0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    mean = mean_estimate(ours)
    assert mean is not None
    assert mean.value == 4.0
    assert 2.0 <= mean.ci95[0] < 4.0 < mean.ci95[1] <= 6.0
    ratio = ratio_estimate(ours, theirs)
    assert ratio is not None
    assert (ratio.value, *ratio.ci95) == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_estimate({0: 2.0, 5: 100.0}, theirs) is not None
    assert ratio_estimate({0: 2.0, 5: 100.0}, theirs).value == 2.0  # type: ignore[union-attr]
    assert ratio_estimate(ours, {0: 0.0, 1: 0.0, 2: 0.0}) is None
    assert ratio_estimate({0: np.inf}, {0: 1.0}) is None
    assert mean_estimate({}) is None
