"""How many tokens per second the decode server carries, measured through an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import numpy as np

from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError, fresh_indices
from sgl_flowprefill.bench.loadgen.client import Client, Outcome
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder

STREAMS: Final = 16
STREAM_PROMPT_TOKENS: Final = 1024
STREAM_ANSWER_TOKENS: Final = 160


def measure_decode(client: Client, prompts: PromptBuilder) -> float:
    """Tokens per second that come while STREAMS answers stream at a time: what decode server, gateway and client carry
    together. Takes some seconds. Raises CalibrationError if a request fails.
    """
    return asyncio.run(_measure(client, prompts))


async def _measure(client: Client, prompts: PromptBuilder) -> float:
    # The same prompt: only its first prefill takes time, so that all answers stream at once.
    prompt = prompts.unique(STREAM_PROMPT_TOKENS, next(fresh_indices()))
    async with client.session() as session:

        async def stream(answer_tokens: int) -> Outcome:
            outcome = await client.stream(session, client.api.body(prompt, answer_tokens, None))
            if outcome.error or outcome.first_token_s is None:
                raise CalibrationError(f"a request to {client.url} failed: {outcome.error}")
            return outcome

        await stream(1)
        outcomes = await asyncio.gather(*(stream(STREAM_ANSWER_TOKENS) for _ in range(STREAMS)))
    return tokens_per_s(outcomes)


def tokens_per_s(outcomes: Sequence[Outcome]) -> float:
    """Tokens per second while all of ``outcomes`` streamed."""
    begin_s = max(outcome.first_token_s or 0.0 for outcome in outcomes)
    end_s = min(outcome.end_s for outcome in outcomes)
    if end_s <= begin_s:
        raise CalibrationError(
            f"{len(outcomes)} answers of {STREAM_ANSWER_TOKENS} tokens did not stream at a time, so it is not known "
            "what the decode server carries: give --max-output-tokens"
        )
    times_s = [(outcome.first_token_s or 0.0) + np.cumsum(outcome.tbt_s) for outcome in outcomes]
    return float(sum(((begin_s < times) & (times <= end_s)).sum() for times in times_s) / (end_s - begin_s))
