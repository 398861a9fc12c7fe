"""Probes on real servers: one that is stopped early leaves them as they were, and a short search comes to its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan, Prober
from sgl_flowprefill.bench.capacity.probes import ProbeLog
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.cli.validate import compared
from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi
from sgl_flowprefill.bench.systems.catalog import SYSTEMS, endpoint
from sgl_flowprefill.bench.systems.serving import Served, Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.config import FlowPrefillConfig

pytestmark = pytest.mark.server
OURS = SYSTEMS["flowprefill"]


@pytest.fixture
def prober(flowprefill_cluster: Cluster, tmp_path: Path) -> Prober:
    @contextmanager
    def serve(system: System) -> Iterator[Served]:
        event_log = flowprefill_cluster.config.options.event_log
        assert event_log is not None
        yield Served(system, flowprefill_cluster, Client(flowprefill_cluster.url, GenerateApi()), Path(event_log))

    plan = Plan(workload("mixed"), seeds=1, duration_s=4.0, max_output_tokens=2)
    log = ProbeLog(tmp_path / "probes.jsonl", plan.settings())
    return Prober(plan, log, serve, Console(file=StringIO()), flowprefill_cluster.config.options)


def test_answers_are_shortened_to_what_the_real_decode_server_carries(prober: Prober) -> None:
    prober.plan = dataclasses.replace(prober.plan, max_output_tokens=None)
    with prober.serving(OURS) as served:
        answers = prober.answers
        print(f"the decode server carries {answers.decode_tokens_per_s:.0f} tokens/s; answers x {answers.scale:.3f}")
        assert 0 < answers.scale < 1, "one core does not carry the answers of a GPU's workload"
        probe = prober.probe(served, OURS, seed=0, rate_rps=4.0)
    assert probe.complete, probe.run.client.invalid_reason
    asked = {request.arrival_s: request.output_tokens for request in prober.trace(0, 4.0).requests}
    assert {result.scheduled_s: result.output_tokens for result in probe.run.results} == asked
    assert len(set(asked.values())) > 3, "they keep their relative lengths"


def test_a_search_with_real_servers(prober: Prober) -> None:
    with prober.serving(OURS) as served:
        overloaded = prober.probe(served, OURS, seed=0, rate_rps=100.0, attainment=0.9)
        assert overloaded.run.stopped_early
        assert overloaded.attainment_bounds[1] < 0.9
        assert overloaded.blocking_s is not None
        light = prober.probe(served, OURS, seed=0, rate_rps=5.0)
        assert light.complete
        assert not any(result.error for result in light.run.results)
        assert not any(result.cached_tokens for result in light.run.results)  # nothing is left of the probe before
        assert compared(prober, OURS, 1.0) is None
    campaign = Campaign(prober, [OURS], Goal((0.5,), precision=8.0))
    campaign.run(budget_s=15.0)
    result = GoodputResult.of(campaign, "embedded")
    rate = result.figures["flowprefill"].max_rate(0.5)
    assert rate is not None
    assert 0 < rate.value < 200.0
    assert (result.figures["flowprefill"].uncontended_tokens_per_s or 0) > 0


@pytest.mark.stress
def test_servers_behind_an_openai_api_take_part_as_an_endpoint_of_another_engine(
    flowprefill_cluster: Cluster, tmp_path: Path
) -> None:
    system = endpoint(f"other={flowprefill_cluster.url}/v1")
    said: list[str] = []
    log = ProbeLog(tmp_path / "probes.jsonl", {})
    plan = Plan(workload("mixed"), seeds=1, duration_s=4.0, max_output_tokens=2)
    with serving(Servers(), tmp_path, said.append, side_by_side=False) as serve:
        prober = Prober(plan, log, serve, Console(file=StringIO()), FlowPrefillConfig())
        with prober.serving(system) as served:
            assert any(f"{flowprefill_cluster.url} serves" in line for line in said), said
            assert set(log.solo_ttft_s["other"][0]) == set(REFERENCE_TTFT_S)
            overloaded = prober.probe(served, system, seed=0, rate_rps=100.0, attainment=0.9)
            assert overloaded.run.stopped_early
            light = prober.probe(served, system, seed=0, rate_rps=5.0)
            assert light.complete
            assert not any(result.error for result in light.run.results)
            if any("takes token ids" in line for line in said):
                asked = [request.prompt_tokens for request in prober.trace(0, 5.0).requests]
                assert [result.prompt_tokens for result in light.run.results] == asked
            assert served.blocking_s(light.run) is None
        campaign = Campaign(prober, [system], Goal((0.5,), precision=8.0))
        campaign.run(budget_s=15.0)
    document = GoodputResult.of(campaign, "embedded").to_dict()["systems"]["other"]
    assert 0 < document["max_rate_rps"]["50"] < 200.0
    assert document["simulated_max_rate_rps"] == {"50": None}
    assert document["uncontended_tokens_per_s"] > 0
