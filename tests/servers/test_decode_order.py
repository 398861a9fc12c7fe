"""A decode server with hardly any places: an urgent request does not wait behind all that came before it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison

RELAXED = 10
RELAXED_TOKENS, URGENT_TOKENS = 3000, 64
URGENT_AFTER_S = 0.5
"""By then all relaxed requests wait: three of them at the prefill server, one running there, the others for a place."""


class Answer(NamedTuple):
    """What a request got."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    finished_s: float
    """Seconds after the first request was sent."""


async def answers(url: str) -> dict[str, Answer]:
    start_s = time.monotonic()
    found: dict[str, Answer] = {}

    async def one(session: aiohttp.ClientSession, name: str, delay_s: float, tokens: list[int], slo_s: float) -> None:
        await asyncio.sleep(delay_s)
        sampling = {"max_new_tokens": TOKENS, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        async with session.post(url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            entries = (await response.json())["meta_info"]["output_token_logprobs"]
        finished_s = time.monotonic() - start_s
        found[name] = Answer(tokens, [entry[1] for entry in entries], [entry[0] for entry in entries], finished_s)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        await asyncio.gather(
            *(one(session, f"relaxed {i}", 0.02 * i, prompt(100 + i, RELAXED_TOKENS), 60.0) for i in range(RELAXED)),
            one(session, "urgent", URGENT_AFTER_S, prompt(7, URGENT_TOKENS), 1.0),
        )
    return found


@pytest.mark.stress
def test_an_urgent_request_gets_the_next_place(no_cluster: None, comparison: Comparison, tmp_path: Path) -> None:
    config = ClusterConfig(
        flowprefill=True,
        decode_args=("--max-running-requests", "1"),  # and two more places for requests that wait for their prefill
        log_dir=tmp_path,
    )
    with Cluster(config, on_progress=print) as cluster:
        found = asyncio.run(answers(cluster.url))
    times = {name: answer.finished_s for name, answer in found.items()}
    before_urgent = sum(time_s < times["urgent"] for name, time_s in times.items() if name != "urgent")
    assert before_urgent <= RELAXED - 4, times
    for name, answer in found.items():
        comparison.answer(name, answer.prompt, answer.tokens, answer.logprobs)
    comparison.assert_same()
    assert comparison.counts["answers"] == RELAXED + 1
    assert comparison.counts["log probabilities"] == TOKENS * (RELAXED + 1)
