"""Somebody sets the wall clock of real servers while they serve: deadlines, grammars and health checks do not notice.

The clock is ``time.time`` of every Python process of both servers, replaced from their start (tests/stepping_clock):
that needs no package of the system. What reads the clock from C, as ``datetime.now`` does, is not set.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
import pytest
import requests

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import read_events
from tests.integration.conftest import WallClock
from tests.prompts import prompt

pytestmark = pytest.mark.server

OFFSETS_S = (0.0, 30.0, -30.0, 60.0)
"""What the wall clock shows more than it should, one after the other; the first is a run without a step."""
SEGMENT_S = 8.0
LONG, LONG_TOKENS, LONG_SLO_S = 4, 10_000, 60.0
URGENT, URGENT_TOKENS, URGENT_SLO_S = 14, 64, 1.5
"""Requests of each segment. The long ones are there from its beginning, and are more than it has time for."""


@pytest.fixture
def stepping(wall_clock: WallClock) -> Iterator[WallClock]:
    yield wall_clock
    wall_clock.set(0.0)


async def run(cluster: Cluster, clock: WallClock) -> list[list[float]]:
    """TTFT of the urgent requests of each segment; the others are served, too."""

    async def one(session: aiohttp.ClientSession, delay_s: float, tokens: list[int], **sampling: Any) -> float:
        await asyncio.sleep(delay_s)
        started_s = time.monotonic()
        body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 0, **sampling}}
        async with session.post(cluster.gateway_url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
        assert answer["meta_info"]["finish_reason"]["type"] == "length", answer
        if "json_schema" in sampling:
            assert answer["text"].startswith("{"), answer
        return time.monotonic() - started_s

    def objective(slo_s: float) -> dict[str, Any]:
        return {"custom_params": {"ttft_slo": slo_s}}

    urgent: list[list[asyncio.Task[float]]] = []
    others: list[asyncio.Task[float]] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        for segment, offset_s in enumerate(OFFSETS_S):
            clock.set(offset_s)
            seed = 10_000 + 100 * segment
            schema = json.dumps({"type": "object", "properties": {f"field{segment}": {"type": "integer"}}})
            sends = [(0.0, prompt(seed + i, LONG_TOKENS), objective(LONG_SLO_S)) for i in range(LONG)]
            sends.append(
                (SEGMENT_S / 2, prompt(seed + 20, URGENT_TOKENS), objective(LONG_SLO_S) | {"json_schema": schema})
            )
            others += [asyncio.create_task(one(session, at_s, tokens, **rest)) for at_s, tokens, rest in sends]
            urgent.append(
                [
                    asyncio.create_task(
                        one(session, 0.5 + 0.5 * i, prompt(seed + 30 + i, URGENT_TOKENS), **objective(URGENT_SLO_S))
                    )
                    for i in range(URGENT)
                ]
            )
            await asyncio.sleep(SEGMENT_S)
        await asyncio.gather(*others)
        return [list(await asyncio.gather(*tasks)) for tasks in urgent]


def test_steps_of_the_wall_clock_change_no_deadline_and_fail_no_grammar(
    flowprefill_cluster: Cluster, stepping: WallClock
) -> None:
    start_s = time.monotonic()
    ttfts_s = asyncio.run(run(flowprefill_cluster, stepping))
    in_time = [sum(ttft_s <= URGENT_SLO_S for ttft_s in segment) for segment in ttfts_s]
    for offset_s, count, segment in zip(OFFSETS_S, in_time, ttfts_s, strict=True):
        print(f"wall clock {offset_s:+g} s: {count} of {URGENT} in time, slowest {max(segment):.2f} s")
    time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
    log = flowprefill_cluster.config.options.event_log
    assert log is not None
    arrivals = [event for event in read_events(log) if event["event"] == "arrival" and event["t_s"] >= start_s]
    assert len(arrivals) == len(OFFSETS_S) * (LONG + URGENT + 1)
    assert all(0.0 <= event["t_s"] - event["received_s"] < 5.0 for event in arrivals)
    assert all(count >= in_time[0] - 2 for count in in_time)
    assert in_time[0] >= URGENT * 0.8


def test_a_scheduler_that_hangs_is_not_healthy_after_the_wall_clock_was_set_back(
    flowprefill_cluster: Cluster, stepping: WallClock
) -> None:
    server = psutil.Process(flowprefill_cluster.processes["prefill"])
    scheduler = next(process for process in server.children(recursive=True) if "scheduler" in process.name())
    url = flowprefill_cluster.prefill_url + "/health"
    assert requests.get(url, timeout=30).status_code == 200
    os.kill(scheduler.pid, signal.SIGSTOP)
    try:
        stepping.set(-30.0)
        with pytest.raises(requests.Timeout):
            requests.get(url, timeout=4)
    finally:
        os.kill(scheduler.pid, signal.SIGCONT)
    assert requests.get(url, timeout=30).status_code == 200
