"""How long answers are: the workload's own lengths, all shortened by one factor to what the servers carry, or cut.

On a small machine the decode server shares its core with the gateway and the client, or a unified server with its own
prefills, and the answers of a workload that was recorded on GPUs would need many times what there is. Shortened by one
factor they keep their relative lengths.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sgl_flowprefill.bench.workloads.trace import Trace

DECODE_SHARE: Final = 0.5
"""Share of what the decode server carries that answers may take."""
UNIFIED_DECODE_SHARE: Final = 0.25
"""Share of what a unified server carries, which has to prefill as well, that answers may take."""


@dataclass(frozen=True)
class Answers:
    """What is done to the lengths of a workload's answers."""

    scale: float = 1.0
    max_tokens: int | None = None
    decode_tokens_per_s: float | None = None
    """What the servers were measured to carry, where ``scale`` comes from that."""

    @classmethod
    def carried(cls, trace: Trace, rate_rps: float, decode_tokens_per_s: float, share: float = DECODE_SHARE) -> Answers:
        """The answers of ``trace``, shortened so that at ``rate_rps`` they take ``share`` of the tokens that are
        carried when nothing else is to be done.
        """
        wanted_per_s = rate_rps * float(np.mean([request.output_tokens for request in trace.requests]))
        return cls(min(1.0, share * decode_tokens_per_s / wanted_per_s), None, decode_tokens_per_s)

    def of(self, trace: Trace) -> Trace:
        """``trace`` with answers of these lengths, each of at least one token."""
        requests = [
            dataclasses.replace(request, output_tokens=max(1, round(request.output_tokens * self.scale)))
            for request in trace.requests
        ]
        return dataclasses.replace(trace, requests=requests).limited(max_output_tokens=self.max_tokens)

    def text(self, trace: Trace) -> str:
        """What a table says of the answers of ``trace``, which have these lengths."""
        if self.max_tokens is not None:
            kind = f"the workload's, cut at {self.max_tokens} tokens"
        else:
            kind = "the workload's own" if self.scale == 1 else f"{self.scale:.3g} of the workload's"
        lengths = _lengths(trace)
        return f"answers: {kind}, median {np.median(lengths):.0f} tokens, mean {np.mean(lengths):.1f}"

    def to_dict(self, trace: Trace) -> dict[str, Any]:
        """What a report says of the answers of ``trace``, which have these lengths."""
        lengths = _lengths(trace)
        return dataclasses.asdict(self) | {"median": float(np.median(lengths)), "mean": float(np.mean(lengths))}


def _lengths(trace: Trace) -> list[int]:
    return [request.output_tokens for request in trace.requests]
