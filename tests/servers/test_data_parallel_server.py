"""Servers with data-parallel attention, as users start them: one beside a decode server, one that decodes itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from sgl_flowprefill.answers import REPORT_KEY
from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import read_events
from sgl_flowprefill.model import EmbeddedModel
from tests.data_parallel_ranks import qwen3
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison, Reference

MODEL = EmbeddedModel(heads=2, layers=4, context_tokens=8192)
ARGS = ("--tp", "2", "--dp", "2", "--enable-dp-attention", "--enable-metrics")
ASKED = {
    **{f"long {i}": (prompt(10 + i, 7000 - 500 * i), 60.0 - i) for i in range(6)},
    **{f"shared {i}": (prompt(40 + i, 500 + 90 * i, prompt(1, 400)), 8.0) for i in range(8)},
    **{f"urgent {i}": (prompt(70 + i, 40 + 20 * i), 0.5) for i in range(10)},
}
"""Long prompts with loose objectives first, then tighter ones, each with its objective."""


async def ask_all(url: str) -> dict[str, dict[str, Any]]:
    """What ``meta_info`` says of the answer to each of ASKED, sent 60 ms apart."""

    async def one(session: aiohttp.ClientSession, delay_s: float, tokens: list[int], slo_s: float) -> Any:
        await asyncio.sleep(delay_s)
        sampling = {"max_new_tokens": TOKENS, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        async with session.post(url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            return (await response.json())["meta_info"]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
        jobs = [one(session, 0.06 * i, tokens, slo_s) for i, (tokens, slo_s) in enumerate(ASKED.values())]
        return dict(zip(ASKED, await asyncio.gather(*jobs), strict=True))


@pytest.mark.stress
@pytest.mark.parametrize(
    "servers",
    [{"prefill_args": ARGS}, {"server_args": ARGS, "prefill": 0, "decode": 0, "unified": 1}],
    ids=["prefill", "unified"],
)
def test_answers_are_those_of_transformers_and_the_log_has_the_requests_of_both_ranks(
    no_cluster: None, tmp_path: Path, servers: dict[str, Any]
) -> None:
    model_path, log = qwen3(MODEL), tmp_path / "events.jsonl"
    options = FlowPrefillConfig(event_log=str(log), exploration_share=0)
    config = ClusterConfig(True, model_path, log_dir=tmp_path, options=options, **servers)
    with Cluster(config, on_progress=print) as cluster:
        start_s = time.monotonic()
        answers = asyncio.run(ask_all(cluster.url))
        assert requests.get(cluster.prefill_url + "/health", timeout=30).status_code == 200
        with requests.get(cluster.prefill_url + "/flowprefill/state", timeout=30, stream=True) as stream:
            assert stream.status_code == 200
            assert any(line.startswith(b"data:") for line in stream.iter_lines())
        time.sleep(6.0)  # the log reaches the file when the scheduler turns idle, and tells of transfers a second later
        cluster.check()
    comparison = Comparison(Reference(model_path))
    for name, meta_info in answers.items():
        comparison.generated(name, ASKED[name][0], meta_info)
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == TOKENS * len(ASKED)
    reports = [meta_info[REPORT_KEY] for meta_info in answers.values()]
    assert all(report["met"] is not None for report in reports), "a rank does not report"
    assert all(report["predicted_s"] is not None for report in reports), "a rank does not tell its decode server"

    events = [event for event in read_events(log) if event.t_s >= start_s]
    arrived = {
        event.rid
        for event in events
        if event.kind == "arrival" and event.ttft_slo_s in {slo for _, slo in ASKED.values()}
    }
    left = {event.rid for event in events if event.kind == "leave"}
    suspensions = sum(event.kind == "suspend" for event in events)
    print(f"{comparison}; {suspensions} suspensions")
    assert len(arrived) == len(ASKED)
    assert arrived <= left
    assert suspensions >= 1
