"""What a decode step costs on a machine: a fixed part, a part per stream, and a part per token of context.

step(streams, context) = fixed + per_request * streams + per_context * context tokens of all streams
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sgl_flowprefill.bench.simulator.cost import A800_BYTES_PER_S, MODELS, CostModel
from sgl_flowprefill.profiling.steps import LinearSteps, Step

BANDWIDTH_EFFICIENCY: Final = 0.80
"""Share of the data sheet's memory bandwidth that a decode step reaches (assumed)."""


@dataclass(frozen=True)
class StepCost:
    """Execution times of decode steps on one instance; a ``StepModel`` that is exact."""

    fixed_s: float
    per_request_s: float
    per_context_s: float = 0.0
    source: str = ""

    def predict_s(self, requests: int, context_tokens: int) -> float:
        """Seconds of a step over ``requests`` streams with ``context_tokens`` together."""
        return self.fixed_s + self.per_request_s * requests + self.per_context_s * context_tokens


def measured_steps(steps: Sequence[Step]) -> StepCost:
    """The cost of steps that were measured through an endpoint."""
    model = LinearSteps.fit(steps)
    return StepCost(model.fixed_s, model.per_request_s, model.per_token_s, f"{len(steps)} measured steps")


def roofline(cost: CostModel, weight_bytes: float, gpus: int) -> StepCost:
    """A step on A800s: it reads all weights once, and the KV cache of its streams, and computes a token of each."""
    bytes_per_s = A800_BYTES_PER_S * BANDWIDTH_EFFICIENCY * gpus
    return StepCost(
        fixed_s=weight_bytes / bytes_per_s,
        per_request_s=cost.per_token_s,
        per_context_s=cost.kv_bytes_per_token / bytes_per_s,
        source="roofline: data-sheet A800, 80% of its memory bandwidth",
    )


STEP_COSTS: Final[Mapping[str, StepCost]] = {
    name: roofline(MODELS[name], 2 * parameters, gpus)
    for name, parameters, gpus in (
        ("llama-3.1-8b-a800", 8.03e9, 1),
        ("qwen2.5-14b-a800-tp2", 14.8e9, 2),
        ("qwen3-30b-a3b-a800", 30.5e9, 1),
    )
}
"""Costs of decode steps of the models of ``cost.MODELS``. The model with experts reads all of them in each step, also
for few streams.
"""

CPU_ENGINE: Final = StepCost(0.008, 0.0019, source="measured on the embedded model, two cores of an x86 server")
"""For the engine behind a TTFT profile: what steps of a prototype cost on the embedded model."""


def step_cost(cost: CostModel) -> StepCost:
    """What steps cost on the machine of ``cost``."""
    return STEP_COSTS.get(cost.name, CPU_ENGINE)
