"""A decode server with hardly any places: an urgent request does not wait behind all that came before it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from tests.prompts import prompt

pytestmark = pytest.mark.server

RELAXED = 10
RELAXED_TOKENS, URGENT_TOKENS = 3000, 64
URGENT_AFTER_S = 0.5
"""By then all relaxed requests wait: three of them at the prefill server, one running there, the others for a place."""


async def finished_s(url: str) -> dict[str, float]:
    """When each request had its only token, seconds after the first was sent."""
    start_s = time.monotonic()
    times: dict[str, float] = {}

    async def one(session: aiohttp.ClientSession, name: str, delay_s: float, tokens: list[int], slo_s: float) -> None:
        await asyncio.sleep(delay_s)
        sampling = {"max_new_tokens": 1, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
        async with session.post(url + "/generate", json={"input_ids": tokens, "sampling_params": sampling}) as response:
            assert response.status == 200, await response.text()
            await response.json()
        times[name] = time.monotonic() - start_s

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        await asyncio.gather(
            *(one(session, f"relaxed {i}", 0.02 * i, prompt(100 + i, RELAXED_TOKENS), 60.0) for i in range(RELAXED)),
            one(session, "urgent", URGENT_AFTER_S, prompt(7, URGENT_TOKENS), 1.0),
        )
    return times


def test_an_urgent_request_gets_the_next_place(no_cluster: None, tmp_path: Path) -> None:
    config = ClusterConfig(
        flowprefill=True,
        decode_args=("--max-running-requests", "1"),  # and two more places for requests that wait for their prefill
        log_dir=tmp_path,
    )
    with Cluster(config, on_progress=print) as cluster:
        times = asyncio.run(finished_s(cluster.url))
    before_urgent = sum(time_s < times["urgent"] for name, time_s in times.items() if name != "urgent")
    assert before_urgent <= RELAXED - 4, times
