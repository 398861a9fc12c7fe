"""How long answers are: the workload's own lengths, all shortened by one factor to what the decode server carries, or
cut.

On a small machine the decode server shares its core with the gateway and the client, and the answers of a workload that
was recorded on GPUs would need many times what it has. Shortened by one factor they keep their relative lengths.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sgl_flowprefill.bench.loadgen.calibrate import CalibrationError, fresh_indices
from sgl_flowprefill.bench.loadgen.client import Client, Outcome
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace

DECODE_SHARE: Final = 0.5
"""Of what the decode server carries, what answers may take."""
STREAMS: Final = 16
STREAM_PROMPT_TOKENS: Final = 1024
STREAM_ANSWER_TOKENS: Final = 160


@dataclass(frozen=True)
class Answers:
    """What is done to the lengths of a workload's answers."""

    scale: float = 1.0
    max_tokens: int | None = None
    decode_tokens_per_s: float | None = None
    """What the decode server was measured to carry, where ``scale`` comes from that."""

    @classmethod
    def carried(cls, trace: Trace, rate_rps: float, decode_tokens_per_s: float) -> Answers:
        """Those of ``trace`` at ``rate_rps``, shortened so that they take DECODE_SHARE of what the decode server
        carries.
        """
        wanted_per_s = rate_rps * float(np.mean([request.output_tokens for request in trace.requests]))
        return cls(min(1.0, DECODE_SHARE * decode_tokens_per_s / wanted_per_s), None, decode_tokens_per_s)

    def of(self, trace: Trace) -> Trace:
        """``trace`` with answers of these lengths, each of at least one token."""
        requests = [
            dataclasses.replace(request, output_tokens=max(1, round(request.output_tokens * self.scale)))
            for request in trace.requests
        ]
        return dataclasses.replace(trace, requests=requests).limited(max_output_tokens=self.max_tokens)

    def text(self, trace: Trace) -> str:
        """What a table says of them; ``trace`` has them."""
        if self.max_tokens is not None:
            kind = f"the workload's, cut at {self.max_tokens} tokens"
        else:
            kind = "the workload's own" if self.scale == 1 else f"{self.scale:.3g} of the workload's"
        lengths = _lengths(trace)
        return f"answers: {kind}, median {np.median(lengths):.0f} tokens, mean {np.mean(lengths):.1f}"

    def to_dict(self, trace: Trace) -> dict[str, Any]:
        """What a report says of them; ``trace`` has them."""
        lengths = _lengths(trace)
        return dataclasses.asdict(self) | {"median": float(np.median(lengths)), "mean": float(np.mean(lengths))}


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


def _lengths(trace: Trace) -> list[int]:
    return [request.output_tokens for request in trace.requests]
