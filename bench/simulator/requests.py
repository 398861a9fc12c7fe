"""Requests as the simulator sees them, and how a trace becomes many."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sgl_flowprefill.bench.loadgen.replay import RequestResult
from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.features import Array


@dataclass(slots=True, eq=False)
class SimRequest:
    """One request of a simulated run; ``first_token_s`` is filled in by the run."""

    index: int
    arrival_s: float
    """When the client sent it."""
    ready_s: float
    """When a prefill instance can start it."""
    deadline_s: float
    shape: PrefillShape
    predicted_s: float
    """What the policy believes that it takes alone."""
    first_token_s: float = math.inf
    sent_tokens: int = 0
    """Tokens of its KV that have been sent, also while its prefill goes on."""
    output_tokens: int = 1
    tbt_slo_s: float = math.inf
    came_tokens: int = 0
    """Tokens of its answer that have come, on a unified instance."""
    gaps_s: list[Array] = field(default_factory=list)
    """Times between its tokens, on a unified instance, in parts."""

    @property
    def met(self) -> bool:
        """Whether its first token came in time."""
        return self.first_token_s <= self.deadline_s

    @property
    def last_token_s(self) -> float:
        """When its answer was complete; 0 for one that never ran."""
        return self.first_token_s + float(self.tbt_s.sum()) if self.first_token_s < math.inf else 0.0

    @property
    def tbt_s(self) -> Array:
        """Times between its tokens."""
        return np.concatenate(self.gaps_s) if self.gaps_s else np.empty(0)


@dataclass(frozen=True)
class Conditions:
    """What surrounds the prefill instances."""

    bootstrap_s: float = 0.0
    """From the arrival to the instant at which a request can start, besides the cost model's ``serving_s``."""
    prefix_cache: bool = True
    """Whether prefixes that earlier requests had are cached (without limit); else every prompt is computed whole."""
    prediction_error: float = 0.0
    """Standard deviation of the log of the policy's predictions around the true times."""
    prediction_bias: float = 1.0
    """Factor of the policy's predictions; the runtime's online correction, which would find it, is not simulated."""
    seed: int = 0


def prepare(trace: Trace, cost: CostModel, conditions: Conditions) -> list[SimRequest]:
    """Fresh requests for one run of ``trace``."""
    rng = np.random.default_rng(conditions.seed)
    spread = rng.standard_normal(len(trace.requests))
    errors = conditions.prediction_bias * np.exp(conditions.prediction_error * spread)
    delay_s = cost.serving_s + conditions.bootstrap_s
    prepared = []
    for index, request in enumerate(trace.requests):
        cached_tokens = min(request.shared_tokens, request.prompt_tokens - 1) if conditions.prefix_cache else 0
        shape = PrefillShape(request.prompt_tokens - cached_tokens, cached_tokens)
        prepared.append(
            SimRequest(
                index=index,
                arrival_s=request.arrival_s,
                ready_s=request.arrival_s + delay_s,
                deadline_s=request.arrival_s + request.ttft_slo_s,
                shape=shape,
                predicted_s=cost.predict_s((shape,)) * float(errors[index]),
                output_tokens=request.output_tokens,
                tbt_slo_s=request.tbt_slo_s,
            )
        )
    return prepared


def resampled(trace: Trace, requests: int, rate_rps: float, seed: int) -> Trace:
    """``requests`` drawn from ``trace`` with replacement, arriving at random (Poisson) at ``rate_rps``."""
    rng = np.random.default_rng(seed)
    arrivals_s = np.cumsum(rng.exponential(1 / rate_rps, requests)).tolist()
    places = rng.integers(len(trace.requests), size=requests).tolist()
    drawn = [_at(trace.requests[place], arrival_s) for place, arrival_s in zip(places, arrivals_s, strict=True)]
    return dataclasses.replace(trace, requests=drawn)


def _at(request: TraceRequest, arrival_s: float) -> TraceRequest:
    return dataclasses.replace(request, arrival_s=arrival_s, hash_ids=())


def results(trace: Trace, requests: Sequence[SimRequest]) -> list[RequestResult]:
    """The run in the form of a replay's results, for ``bench.metrics``. A request that never ran has no TTFT."""
    return [
        RequestResult(
            index=request.index,
            request_class=traced.request_class,
            prompt_tokens=traced.prompt_tokens,
            output_tokens=1 + len(request.tbt_s),
            shared_tokens=traced.shared_tokens,
            ttft_slo_s=traced.ttft_slo_s,
            tbt_slo_s=traced.tbt_slo_s,
            scheduled_s=traced.arrival_s,
            lateness_s=0.0,
            ttft_s=request.first_token_s - request.arrival_s if request.first_token_s < math.inf else None,
            e2e_s=request.first_token_s - request.arrival_s if request.first_token_s < math.inf else 0.0,
            tbt_s=tuple(request.tbt_s.tolist()),
            cached_tokens=request.shape.cached_tokens,
            error=None if request.first_token_s < math.inf else "its prompt does not fit the KV cache",
        )
        for traced, request in zip(trace.requests, requests, strict=True)
    ]
