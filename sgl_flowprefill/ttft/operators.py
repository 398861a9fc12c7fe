"""How the time of a prefill divides over its operators: attention's share of a layer, and what a row of an MLP costs.

The profile's first round looks inside single prompts (``profiling.file``). What it finds decides how long inputs are
tiled, and how much of a suspended prefill is left after a given operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import Array, feature_matrix, features
from sgl_flowprefill.ttft.physics import non_negative


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds in all attention and in all MLP modules of one forward pass; both grow with the batch."""

    attention: Array
    """[3] seconds per forward, per new token, and per pair of a token with one that it attends to."""
    mlp: Array
    """[2] seconds per forward and per new token."""

    @classmethod
    def fit(cls, measured: Iterable[tuple[Sequence[PrefillShape], float, float]]) -> OperatorTimes | None:
        """From batches with their attention and MLP seconds; None without at least two different ones."""
        rows = list(measured)
        matrix = feature_matrix([batch for batch, _, _ in rows])
        if len(np.unique(matrix, axis=0)) < 2:
            return None
        columns = np.stack([np.ones(len(rows)), matrix[:, 1], matrix[:, 3]], axis=1)
        attention_s, mlp_s = (np.array([row[i] for row in rows]) for i in (1, 2))
        return cls(_fit(columns, attention_s), _fit(columns[:, :2], mlp_s))

    def attention_share(self, batch: Sequence[PrefillShape]) -> float:
        """Of the time of attention and MLP together, the part that is attention's, from 0 to 1."""
        _, new_tokens, _, pairs = features(batch)
        attention_s = float(self.attention @ (1.0, new_tokens, pairs))
        mlp_s = float(self.mlp @ (1.0, new_tokens))
        return attention_s / (attention_s + mlp_s) if attention_s + mlp_s > 0 else 0.5

    @property
    def attention_s_per_pair(self) -> float:
        """Seconds of a token and one that it attends to in all attention modules of the model."""
        return float(self.attention[2])

    @property
    def mlp_s_per_token(self) -> float:
        """Seconds of a row in all MLP modules of the model."""
        return float(self.mlp[1])


def _fit(columns: Array, seconds: Array) -> Array:
    """Non-negative least squares of relative errors."""
    return non_negative(columns / seconds[:, None], np.ones(len(seconds)))
