"""Probes on real servers: one that is stopped early leaves them as they were, and a short search comes to its end. What
the servers answer in replays is compared with transformers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from rich.console import Console

from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan, Prober
from sgl_flowprefill.bench.capacity.probes import Probe, ProbeLog
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.cli.validate import compared
from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi, Outcome
from sgl_flowprefill.bench.loadgen.replay import Enough, OnProgress, ReplayRun
from sgl_flowprefill.bench.systems.catalog import SYSTEMS, endpoint
from sgl_flowprefill.bench.systems.endpoint import Say
from sgl_flowprefill.bench.systems.serving import Served, Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.config import FlowPrefillConfig
from tests.reference import TOKENS, Comparison

pytestmark = pytest.mark.usefixtures("quick_replays")

OURS = SYSTEMS["flowprefill"]
LONGEST_TOKENS = 2048
"""Answers to longer prompts are not compared here: transformers takes seconds for each."""


@dataclass(frozen=True)
class LastEventApi(GenerateApi):
    """Keeps the last event of one stream."""

    last: dict[str, Any] = field(default_factory=dict)

    def read(self, event: dict[str, Any], now_s: float, outcome: Outcome) -> None:
        self.last.update(event)
        super().read(event, now_s, outcome)


@dataclass(frozen=True)
class KeepingClient(Client):
    """Asks for log probabilities as well, and keeps all whole answers."""

    answers: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)
    """Prompt, and what the last event says of the answer (``meta_info``)."""

    async def stream(self, session: aiohttp.ClientSession, body: bytes, outcome: Outcome | None = None) -> Outcome:
        request, api = orjson.loads(body), LastEventApi()
        body = orjson.dumps(request | {"return_logprob": True})
        outcome = await Client(self.url, api, self.timeout_s).stream(session, body, outcome)
        if outcome.error is None:
            self.answers.append((request["input_ids"], api.last["meta_info"]))
        return outcome


@dataclass(frozen=True)
class ComparedServed(Served):
    """Servers whose answers in replays are kept."""

    answers: list[tuple[list[int], dict[str, Any]]] = field(default_factory=list)
    solo_s: dict[int, float] = field(default_factory=dict)
    """TTFT of isolated requests by prompt tokens, once measured: of all that is done here it takes longest."""

    def solo_ttft_s(self, prompts: PromptBuilder, say: Say | None = None) -> dict[int, float]:
        if not self.solo_s:
            self.solo_s.update(super().solo_ttft_s(prompts, say))
        return dict(self.solo_s)

    def replay(
        self,
        trace: Trace,
        prompts: PromptBuilder,
        on_progress: OnProgress | None = None,
        enough: Enough | None = None,
        slower: float = 0.0,
    ) -> ReplayRun:
        self.answers.clear()
        client = KeepingClient(self.client.url, self.client.api, answers=self.answers)
        served = Served(self.system, self.cluster, client, self.event_log)
        return served.replay(trace, prompts, on_progress, enough, slower)

    def compare(self, comparison: Comparison, most: int) -> int:
        """Compare answers of the last replay, ``most`` at most, to prompts that are not too long. How many it was."""
        found = [(tokens, meta_info) for tokens, meta_info in self.answers if len(tokens) <= LONGEST_TOKENS][:most]
        before = comparison.counts["log probabilities"]
        for tokens, meta_info in found:
            comparison.generated(f"{len(tokens)} tokens", tokens, meta_info)
        comparison.assert_same()
        expected = sum(min(meta_info["completion_tokens"], TOKENS) for _, meta_info in found)
        assert comparison.counts["log probabilities"] - before == expected
        return len(found)


def short(probe: Probe) -> int:
    """Requests of ``probe`` whose prompts are not too long: some."""
    found = sum(result.prompt_tokens <= LONGEST_TOKENS for result in probe.run.results)
    assert found
    return found


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that falls behind on a busy machine is no failure here: tests/unit/test_replay.py has its judgement."""
    monkeypatch.setattr("sgl_flowprefill.bench.loadgen.replay.MAX_LATENESS_OF_SLO", 10.0)
    monkeypatch.setattr("sgl_flowprefill.bench.loadgen.calibrate.REPEATS", 1)  # what they tell is not judged here


@pytest.fixture
def prober(flowprefill_cluster: Cluster, tmp_path: Path) -> Prober:
    solo_s: dict[int, float] = {}

    @contextmanager
    def serve(system: System) -> Iterator[Served]:
        event_log = flowprefill_cluster.config.options.event_log
        assert event_log is not None
        client = Client(flowprefill_cluster.url, GenerateApi())
        yield ComparedServed(system, flowprefill_cluster, client, Path(event_log), solo_s=solo_s)

    plan = Plan(workload("mixed"), seeds=1, duration_s=4.0, max_output_tokens=2)
    log = ProbeLog(tmp_path / "probes.jsonl", plan.settings())
    return Prober(plan, log, serve, Console(file=StringIO()), flowprefill_cluster.config.options)


@pytest.mark.stress
def test_answers_are_shortened_to_what_the_real_decode_server_carries(prober: Prober, comparison: Comparison) -> None:
    prober.plan = dataclasses.replace(prober.plan, max_output_tokens=None)
    with prober.serving(OURS) as served:
        answers = prober.answers
        print(f"the decode server carries {answers.decode_tokens_per_s:.0f} tokens/s; answers x {answers.scale:.3f}")
        assert 0 < answers.scale < 1, "one core does not carry the answers of a GPU's workload"
        probe = prober.probe(served, OURS, seed=0, rate_rps=4.0)
    assert probe.complete, probe.run.client.invalid_reason
    assert served.compare(comparison, most=100) == short(probe)
    asked = {request.arrival_s: request.output_tokens for request in prober.trace(0, 4.0).requests}
    assert {result.scheduled_s: result.output_tokens for result in probe.run.results} == asked
    assert len(set(asked.values())) > 3, "they keep their relative lengths"


def test_a_search_with_real_servers(prober: Prober, comparison: Comparison) -> None:
    with prober.serving(OURS) as served:
        overloaded = prober.probe(served, OURS, seed=0, rate_rps=100.0, attainment=0.9)
        assert overloaded.run.stopped_early
        assert overloaded.attainment_bounds[1] < 0.9
        assert overloaded.blocking_s is not None
        served.compare(comparison, most=10)
        light = prober.probe(served, OURS, seed=0, rate_rps=5.0)
        assert light.complete
        assert not any(result.error for result in light.run.results)
        assert not any(result.cached_tokens for result in light.run.results)  # nothing is left of the probe before
        assert served.compare(comparison, most=100) == short(light)
        assert compared(prober, OURS, 1.0) is None
    campaign = Campaign(prober, [OURS], Goal((0.5,), precision=8.0))
    campaign.run(budget_s=8.0)
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
