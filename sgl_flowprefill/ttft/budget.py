"""How many tokens a batch needs: beyond that, a bigger one only makes its members wait for each other."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.ttft.base import PrefillShape, TTFTModel

SMALLEST_TOKENS: Final = 64
ENOUGH: Final = 0.9
"""Share of the best throughput at which a batch is big enough."""


def throughput_budget_tokens(model: TTFTModel, longest_tokens: int) -> int:
    """Fewest new tokens whose prefill reaches nearly the best throughput of any up to ``longest_tokens``."""
    sizes = [SMALLEST_TOKENS]
    while sizes[-1] * 2 <= longest_tokens:
        sizes.append(sizes[-1] * 2)
    tokens_per_s = [size / model.predict_s([PrefillShape(size)]) for size in sizes]
    best = max(tokens_per_s)
    return next(size for size, speed in zip(sizes, tokens_per_s, strict=True) if speed >= ENOUGH * best)
