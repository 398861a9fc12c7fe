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
from typing import Any, Final

import aiohttp

from tests.prompts import prompt

OFFSETS_S = (0.0, 30.0, -30.0, 60.0)
"""What the wall clock shows more than it should, one after the other; the first is a run without a step."""
SEGMENT_S = 8.0
LONG, LONG_TOKENS, LONG_SLO_S = 4, 10_000, 60.0
URGENT, URGENT_TOKENS, URGENT_SLO_S = 14, 64, 1.5
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


async def serve_while_it_is_set(gateway_url: str, clock: WallClock) -> list[list[float]]:
    """TTFT of the urgent requests of each segment; the others are served, too."""

    async def one(session: aiohttp.ClientSession, delay_s: float, tokens: list[int], **sampling: Any) -> float:
        await asyncio.sleep(delay_s)
        started_s = time.monotonic()
        body = {"input_ids": tokens, "sampling_params": {"max_new_tokens": 1, "temperature": 0, **sampling}}
        async with session.post(gateway_url + "/generate", json=body) as response:
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
            texts = {f"text{segment}{i}": {"type": "string", "minLength": 50, "maxLength": 200 + i} for i in range(6)}
            schema = json.dumps({"type": "object", "properties": texts, "required": list(texts)})
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
