"""How many times slower than the paper's setup an engine is, measured through its endpoint."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import aiohttp
import numpy as np

from sgl_flowprefill.bench.loadgen.client import Client
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder

REFERENCE_TTFT_S: Final[Mapping[int, float]] = {512: 0.05, 1024: 0.08, 2048: 0.16, 4096: 0.30, 8192: 0.62}
"""TTFT of isolated requests to Llama-3.1-8B on one A800 by prompt tokens: the setup for which the paper's SLOs are
made."""
REPEATS: Final = 3
FIRST_PROBE_INDEX: Final = 1 << 20
"""Prompt indices of probes lie beyond those of any trace, and differ from run to run."""


class CalibrationError(RuntimeError):
    """A probe got no answer; the message has the server's."""


def measure_isolated_ttft(
    client: Client, prompts: PromptBuilder, on_progress: Callable[[str], None] | None = None
) -> dict[int, float]:
    """Median TTFT (s) of isolated requests by prompt tokens: fresh prompts, one after the other.

    Raises CalibrationError if a request fails.
    """
    return asyncio.run(_measure(client, prompts, on_progress or (lambda line: None)))


def isolated_ttft_s(client: Client, prompts: PromptBuilder, tokens: int) -> float:
    """TTFT (s) of one request with a fresh prompt. Raises CalibrationError if it fails."""

    async def measure() -> float:
        async with client.session() as session:
            return await _probe(client, session, prompts.unique(tokens, next(fresh_indices())))

    return asyncio.run(measure())


def time_scale(isolated_ttft_s: Mapping[int, float]) -> float:
    """The factor between an engine's TTFTs of isolated requests and the reference's: the median over prompt lengths."""
    return float(np.median([ttft_s / REFERENCE_TTFT_S[tokens] for tokens, ttft_s in isolated_ttft_s.items()]))


def fresh_indices() -> Iterator[int]:
    """Indices of prompts that no trace and no earlier run has."""
    return iter(range(FIRST_PROBE_INDEX + time.time_ns() % FIRST_PROBE_INDEX, 1 << 40))


def median_of(turns: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Median TTFT (s) of several measurements by prompt tokens."""
    return {tokens: float(np.median([times_s[tokens] for times_s in turns])) for tokens in turns[0]}


async def _measure(client: Client, prompts: PromptBuilder, on_progress: Callable[[str], None]) -> dict[int, float]:
    indices = fresh_indices()
    ttft_s = {}
    async with client.session() as session:

        async def probe(tokens: int) -> float:
            return await _probe(client, session, prompts.unique(tokens, next(indices)))

        await probe(min(REFERENCE_TTFT_S))
        for tokens in REFERENCE_TTFT_S:
            ttft_s[tokens] = float(np.median([await probe(tokens) for _ in range(REPEATS)]))
            on_progress(f"alone, {tokens} tokens take {ttft_s[tokens]:.3f} s to the first token")
    return ttft_s


async def _probe(client: Client, session: aiohttp.ClientSession, prompt: list[int]) -> float:
    outcome = await client.stream(session, client.api.body(prompt, 2, None))
    if outcome.error or outcome.first_token_s is None:
        raise CalibrationError(f"an isolated request of {len(prompt)} tokens to {client.url} failed: {outcome.error}")
    return outcome.first_token_s - outcome.sent_s
