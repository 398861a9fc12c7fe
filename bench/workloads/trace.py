"""What a trace is: requests with arrival times, lengths and objectives, and the paper's two ways to scale them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple


class Slo(NamedTuple):
    """Objectives of a class of requests: time to first token, time between tokens."""

    ttft_s: float
    tbt_s: float


QWEN_SLOS: Final[Mapping[str, Slo]] = {
    "text": Slo(0.25, 0.1),
    "image": Slo(0.5, 0.1),
    "search": Slo(4.0, 0.2),
    "file": Slo(6.0, 0.2),
}
"""SLOs that the FlowPrefill paper gives QwenTrace's classes, for Llama-3.1-8B on one A800."""


@dataclass(frozen=True)
class TraceRequest:
    """One request of a trace.

    ``hash_ids`` names the prompt's blocks of ``block_tokens`` tokens, in order: two requests that begin with the same
    ids share that prefix. Without ids the prompt is unique. ``shared_tokens`` is how much of the prompt an earlier
    request of the trace already had.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    request_class: str
    ttft_slo_s: float
    tbt_slo_s: float
    hash_ids: tuple[int, ...] = field(default=(), repr=False)
    block_tokens: int = 16
    shared_tokens: int = 0

    @property
    def new_tokens(self) -> int:
        """Prompt tokens that no earlier request of the trace had."""
        return self.prompt_tokens - self.shared_tokens


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival; the first one may arrive later than 0 s."""

    name: str
    requests: Sequence[TraceRequest]

    @property
    def classes(self) -> list[str]:
        """Classes in order of their TTFT SLO, tightest first."""
        slo_s = {request.request_class: request.ttft_slo_s for request in self.requests}
        return sorted(slo_s, key=lambda name: (slo_s[name], name))

    @property
    def rate_rps(self) -> float:
        """Mean arrival rate from 0 s to the last arrival."""
        span_s = self.requests[-1].arrival_s if self.requests else 0.0
        return len(self.requests) / span_s if span_s > 0 else 0.0

    def positive_rate_rps(self) -> float:
        """``rate_rps``, where something is divided by it. Raises ValueError for a trace that has none."""
        if not self.rate_rps:
            raise ValueError(f"no request of {self.name} arrives after the first, so it has no rate")
        return self.rate_rps

    @property
    def middle_s(self) -> float:
        """Half of the time in which requests arrive."""
        return self.requests[-1].arrival_s / 2 if self.requests else 0.0

    def scaled(self, *, rate_scale: float = 1.0, time_scale: float = 1.0, slo_scale: float = 1.0) -> Trace:
        """The trace at ``rate_scale`` times its rate, for an engine that takes ``time_scale`` times as long.

        As in the paper, the rate divides inter-arrival times and leaves the SLOs alone; a slower engine stretches
        arrivals and SLOs alike, so that an SLO keeps its meaning. ``slo_scale`` multiplies TTFT SLOs alone.
        """
        if min(rate_scale, time_scale, slo_scale) <= 0:
            raise ValueError(f"scales must be positive ({rate_scale=}, {time_scale=}, {slo_scale=})")
        return dataclasses.replace(
            self,
            requests=[
                dataclasses.replace(
                    request,
                    arrival_s=request.arrival_s * time_scale / rate_scale,
                    ttft_slo_s=request.ttft_slo_s * time_scale * slo_scale,
                    tbt_slo_s=request.tbt_slo_s * time_scale,
                )
                for request in self.requests
            ],
        )

    def until(self, end_s: float) -> Trace:
        """The requests that arrive by ``end_s``."""
        return dataclasses.replace(self, requests=[r for r in self.requests if r.arrival_s <= end_s])

    def between(self, start_s: float, end_s: float) -> Trace:
        """The requests that arrive from ``start_s`` on and before ``end_s``, with times that count from ``start_s``."""
        return dataclasses.replace(
            self,
            requests=[
                dataclasses.replace(request, arrival_s=request.arrival_s - start_s)
                for request in self.requests
                if start_s <= request.arrival_s < end_s
            ],
        )

    def limited(
        self,
        *,
        requests: int | None = None,
        max_output_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
    ) -> Trace:
        """The first ``requests`` of the trace, with outputs and prompts cut to the given lengths."""

        def cut(request: TraceRequest) -> TraceRequest:
            prompt_tokens = min(request.prompt_tokens, max_prompt_tokens or request.prompt_tokens)
            return dataclasses.replace(
                request,
                prompt_tokens=prompt_tokens,
                output_tokens=min(request.output_tokens, max_output_tokens or request.output_tokens),
                hash_ids=request.hash_ids[: -(-prompt_tokens // request.block_tokens)],
                shared_tokens=min(request.shared_tokens, prompt_tokens),
            )

        return dataclasses.replace(self, requests=[cut(request) for request in self.requests[:requests]])


def share_prefixes(requests: Sequence[TraceRequest]) -> list[TraceRequest]:
    """Fill in ``shared_tokens`` from the hash ids: the longest run of leading blocks that earlier requests had.

    A block counts when it is full and stands at the same place after the same ids, which is what a radix cache of
    unlimited size would keep.
    """
    seen: set[tuple[int, int]] = set()
    filled = []
    for request in requests:
        shared_blocks, parent = 0, 0
        full_blocks = request.prompt_tokens // request.block_tokens
        for position, block in enumerate(request.hash_ids[:full_blocks]):
            key = (parent, block)
            if key in seen and shared_blocks == position:
                shared_blocks += 1
            seen.add(key)
            parent = hash(key)
        filled.append(dataclasses.replace(request, shared_tokens=shared_blocks * request.block_tokens))
    return filled
