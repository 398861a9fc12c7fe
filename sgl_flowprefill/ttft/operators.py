"""How the time of a prefill divides over its operators: attention's share of a layer, and what a row of each costs.

The profile's first round looks inside single prompts (``profiling.file``). What it finds decides how long inputs are
tiled, and how much of a suspended prefill is left after a given operator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import Array, feature_matrix, features
from sgl_flowprefill.ttft.physics import non_negative

LEAST_REST: Final = 1e-3
"""Least share of a forward pass that counts as neither attention nor MLPs, whatever the clock says."""
LEAST_PAIRS: Final = 0.25
"""Least share of attention's time in the longest prompt that its pairs of tokens are charged with, whatever a fit to
noisy times says: tiles of attention would not be bounded without."""


@dataclass(frozen=True)
class OperatorTimes:
    """Seconds in all attention modules, in all MLP modules, and in the rest of one forward pass; they grow with the
    batch."""

    attention: Array
    """[3] seconds per forward, per new token, and per pair of a token with one that it attends to."""
    mlp: Array
    """[2] seconds per forward and per new token."""
    rest: Array
    """[2] seconds per forward and per new token: norms, logits and sampling; where the host computes, also what is
    in front of the first layer."""

    @classmethod
    def fit(cls, measured: Iterable[tuple[Sequence[PrefillShape], float, float, float]]) -> OperatorTimes | None:
        """Fit batches with their seconds in all, in attention and in MLPs; None without two different batches. Of a
        batch that was measured several times, the least of each counts: what disturbs only adds.
        """
        looks: dict[tuple[PrefillShape, ...], Array] = {}
        for batch, forward_s, attention_s, mlp_s in measured:
            rest_s = max(forward_s - attention_s - mlp_s, LEAST_REST * forward_s)
            look = np.array([attention_s, mlp_s, rest_s])
            looks[tuple(batch)] = np.minimum(looks.get(tuple(batch), look), look)
        if len(looks) < 2:
            return None
        matrix = feature_matrix(list(looks))
        columns = np.stack([np.ones(len(looks)), matrix[:, 1], matrix[:, 3]], axis=1)
        attention, mlp, rest = np.array(list(looks.values())).T
        of_attention, longest = _fit(columns, attention), int(matrix[:, 3].argmax())
        of_attention[2] = max(of_attention[2], LEAST_PAIRS * attention[longest] / matrix[longest, 3])
        return cls(of_attention, _fit(columns[:, :2], mlp), _fit(columns[:, :2], rest))

    def forward_s(self, batch: Sequence[PrefillShape]) -> float:
        """Seconds of a forward pass of ``batch``, as far as its operators were timed one by one."""
        _, new_tokens, _, pairs = features(batch)
        linear = self.attention[:2] + self.mlp + self.rest
        return float(linear @ (1.0, new_tokens) + self.attention[2] * pairs)

    def attention_share(self, batch: Sequence[PrefillShape]) -> float:
        """Attention's part of the time of attention and MLP together, from 0 to 1."""
        _, new_tokens, _, pairs = features(batch)
        attention_s = float(self.attention @ (1.0, new_tokens, pairs))
        mlp_s = float(self.mlp @ (1.0, new_tokens))
        return attention_s / (attention_s + mlp_s) if attention_s + mlp_s > 0 else 0.5

    @property
    def attention_s_per_pair(self) -> float:
        """Seconds of a token and one that it attends to in all attention modules of the model."""
        return float(self.attention[2])

    @property
    def attention_s_per_token(self) -> float:
        """Seconds of a row in the linear layers of all attention modules of the model, whatever it attends to."""
        return float(self.attention[1])

    @property
    def rest_s_per_token(self) -> float:
        """Seconds of a row outside of attention and MLPs, which bound the norms."""
        return float(self.rest[1])

    @property
    def mlp_s_per_token(self) -> float:
        """Seconds of a row in all MLP modules of the model."""
        return float(self.mlp[1])


def _fit(columns: Array, seconds: Array) -> Array:
    """Non-negative least squares of relative errors."""
    return non_negative(columns / seconds[:, None], np.ones(len(seconds)))
