"""How fast answers stream where nothing else is to be done, measured through an endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import aiohttp
import numpy as np

from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError, fresh_indices
from sgl_flowprefill.bench.loadgen.client import Client, Outcome
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.profiling.steps import Step
from sgl_flowprefill.ttft.features import Array

STREAMS: Final = 16
STREAM_PROMPT_TOKENS: Final = 1024
STREAM_ANSWER_TOKENS: Final = 160
STEP_SHAPES: Final = ((1, 512), (4, 512), (16, 512), (4, 4096))
"""Answers that stream at a time, and the tokens of the prompt that all of them have, for the times of decode steps."""
STEP_ANSWER_TOKENS: Final = (32, 128)
"""Tokens of each answer: more, where the first answer ends before the last begins."""

LAX_S: Final = 300.0
"""Objective of all of these: a server that keeps objectives lets no more stream at a time than they allow."""


def measure_decode(client: Client, prompts: PromptBuilder) -> float:
    """Tokens per second that come while STREAMS answers stream at a time: what decode server, gateway and client carry
    together. Takes some seconds. Raises CalibrationError if a request fails.
    """
    return asyncio.run(_measure(client, prompts))


def measure_steps(client: Client, prompts: PromptBuilder) -> tuple[Step, ...]:
    """Decode steps as clients see them: the mean time between the tokens of answers of STEP_SHAPES. Takes some seconds.
    Raises CalibrationError if a request fails.
    """
    return asyncio.run(_measure_steps(client, prompts))


async def _measure(client: Client, prompts: PromptBuilder) -> float:
    prompt = prompts.unique(STREAM_PROMPT_TOKENS, next(fresh_indices()))
    async with client.session() as session:
        return tokens_per_s(await _at_a_time(client, session, prompt, STREAMS, STREAM_ANSWER_TOKENS))


async def _measure_steps(client: Client, prompts: PromptBuilder) -> tuple[Step, ...]:
    indices, steps = fresh_indices(), []
    async with client.session() as session:
        for streams, tokens in STEP_SHAPES:
            prompt = prompts.unique(tokens, next(indices))
            for answer_tokens in STEP_ANSWER_TOKENS:
                outcomes = await _at_a_time(client, session, prompt, streams, answer_tokens)
                if gaps_s(outcomes):
                    break
            context_tokens = streams * (tokens + answer_tokens // 2)
            steps.append(Step(requests=streams, context_tokens=context_tokens, time_s=step_s(outcomes)))
    return tuple(steps)


async def _at_a_time(
    client: Client, session: aiohttp.ClientSession, prompt: list[int], streams: int, answer_tokens: int
) -> list[Outcome]:
    """As many answers to the same prompt: only its first prefill takes time, so that all of them stream at once."""

    async def stream(tokens: int) -> Outcome:
        outcome = await client.stream(session, client.api.body(prompt, tokens, LAX_S, LAX_S))
        if outcome.error or outcome.first_token_s is None:
            raise CalibrationError(f"a request to {client.url} failed: {outcome.error}")
        return outcome

    await stream(1)
    return await asyncio.gather(*(stream(answer_tokens) for _ in range(streams)))


def step_s(outcomes: Sequence[Outcome]) -> float:
    """Mean time between the tokens of ``outcomes`` while all of them streamed. Raises CalibrationError if none did."""
    found_s = gaps_s(outcomes)
    if not found_s:
        raise CalibrationError(
            f"{len(outcomes)} answers of {outcomes[0].tokens} tokens did not stream at a time, so it is not known what "
            "a decode step takes: let nobody else use the server"
        )
    return float(np.mean(found_s))


def gaps_s(outcomes: Sequence[Outcome]) -> list[float]:
    """Times between the tokens of ``outcomes`` while all of them streamed; none if they never did."""
    times_s = [_token_times_s(outcome) for outcome in outcomes]
    begin_s, end_s = max(times[0] for times in times_s), min(times[-1] for times in times_s)
    return [
        after_s - before_s
        for times in times_s
        for before_s, after_s in pairwise(times)
        if before_s >= begin_s and after_s <= end_s
    ]


def _token_times_s(outcome: Outcome) -> Array:
    """When each token came."""
    return np.cumsum([outcome.first_token_s or 0.0, *outcome.tbt_s])


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
