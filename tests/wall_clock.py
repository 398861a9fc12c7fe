"""Real servers whose wall clock somebody sets while they serve.

The clock is ``time.time`` of every Python process of both servers, replaced from their start (tests/stepping_clock):
that needs no package of the system. What reads the clock from C, as ``datetime.now`` does, is not set.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp

from sgl_flowprefill.cluster import Cluster
from tests.prompts import prompt
from tests.reference import TOKENS

OFFSETS_S = (0.0, 60.0, -30.0)
"""What the wall clock shows more than it should, one after the other; the first is a run without a step."""
SEGMENT_S = 6.0
LONG, LONG_TOKENS, LONG_SLO_S = 4, 6_000, 60.0
URGENT, URGENT_TOKENS, URGENT_SLO_S = 10, 64, 1.5
"""Requests of each segment. The long ones are there from its beginning, and keep the server busy for most of it; there
is also one with a schema of its own that takes a few tenths of a second to compile."""


class WallClock:
    """The wall clock of the servers whose PYTHONPATH has ``folder`` and whose WALL_CLOCK_FILE is ``path``."""

    folder: Final = Path(__file__).with_name("stepping_clock")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.set(0.0)

    def set(self, offset_s: float) -> None:
        """Let it show ``offset_s`` more than the machine's, from now on."""
        with open(os.open(self.path, os.O_CREAT | os.O_WRONLY), "wb") as file:
            file.write(struct.pack("d", offset_s))


class Served(NamedTuple):
    """What a request got."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]
    took_s: float
    """From when it was sent to the end of its answer: of one token, the TTFT."""


class Segment(NamedTuple):
    """What the requests of a segment got."""

    urgent: list[Served]
    """Answers of one token."""
    long: list[Served]


async def assert_ahead(session: aiohttp.ClientSession, server_url: str, offset_s: float) -> None:
    """The wall clock of a server shows ``offset_s`` more than the machine's: its list of models says when it was
    made.
    """
    asked_s = time.time()
    async with session.get(server_url + "/v1/models") as response:
        assert response.status == 200, await response.text()
        [model] = (await response.json())["data"]
    shows = f"{server_url} shows {model['created'] - asked_s:+.1f} s instead of {offset_s:+g} s"
    assert int(asked_s + offset_s) <= model["created"] <= time.time() + offset_s, shows


async def serve_while_it_is_set(cluster: Cluster, clock: WallClock) -> list[Segment]:
    """What the requests of each segment got, but for the one with a schema, which gets no less. In each, all servers
    show what the clock was set to.
    """

    async def one(
        session: aiohttp.ClientSession, delay_s: float, tokens: list[int], new_tokens: int = 1, **sampling: Any
    ) -> Served:
        await asyncio.sleep(delay_s)
        started_s = time.monotonic()
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, **sampling},
            "return_logprob": True,
        }
        async with session.post(cluster.url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
        assert answer["meta_info"]["finish_reason"]["type"] == "length", answer
        if "json_schema" in sampling:
            assert answer["text"].startswith("{"), answer
        took_s = time.monotonic() - started_s
        entries = answer["meta_info"]["output_token_logprobs"]
        return Served(tokens, [entry[1] for entry in entries], [entry[0] for entry in entries], took_s)

    def objective(slo_s: float) -> dict[str, Any]:
        return {"custom_params": {"ttft_slo": slo_s}}

    urgent: list[list[asyncio.Task[Served]]] = []
    long: list[list[asyncio.Task[Served]]] = []
    others: list[asyncio.Task[Any]] = []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        for segment, offset_s in enumerate(OFFSETS_S):
            clock.set(offset_s)
            seed = 10_000 + 100 * segment
            texts = {f"text{segment}{i}": {"type": "string", "minLength": 50, "maxLength": 200 + i} for i in range(6)}
            schema = json.dumps({"type": "object", "properties": texts, "required": list(texts)})
            long.append(
                [
                    asyncio.create_task(
                        one(session, 0.0, prompt(seed + i, LONG_TOKENS), TOKENS, **objective(LONG_SLO_S))
                    )
                    for i in range(LONG)
                ]
            )
            with_schema = objective(LONG_SLO_S) | {"json_schema": schema}
            others.append(
                asyncio.create_task(one(session, SEGMENT_S / 2, prompt(seed + 20, URGENT_TOKENS), **with_schema))
            )
            others += [asyncio.create_task(assert_ahead(session, url, offset_s)) for url in cluster.server_urls]
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
        return [
            Segment(list(await asyncio.gather(*soon)), list(await asyncio.gather(*late)))
            for soon, late in zip(urgent, long, strict=True)
        ]
