"""What every TTFT model offers to the policy and the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol


class PrefillShape(NamedTuple):
    """What one request of a batch costs: tokens to compute, and cached prefix tokens that they attend to."""

    new_tokens: int
    cached_tokens: int = 0


YARDSTICK: Final = PrefillShape(2048)
"""The prompt whose time says how fast the engine is: long enough for efficient kernels, short for attention."""


class TTFTModel(Protocol):
    """Predicts how long a prefill executes, from what is known before it starts."""

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        """Seconds from the start of the forward pass of ``batch`` to its sampled tokens, undisturbed."""
