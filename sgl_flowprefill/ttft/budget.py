"""How many tokens a batch can use: beyond that, a bigger one only makes its members wait for each other."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.ttft.base import PrefillShape, TTFTModel

SMALLEST_TOKENS: Final = 64
LONGEST_TOKENS: Final = 8192
LITTLE: Final = 0.02
"""Share of the time that a batch twice as big must save."""


def throughput_budget_tokens(model: TTFTModel, longest_tokens: int = LONGEST_TOKENS) -> int:
    """Fewest new tokens of which two prefills take hardly longer one by one than together, at most ``longest_tokens``.

    Two prefills take longer by what every forward pass costs whatever it computes: launches, reading the weights.
    """
    tokens = SMALLEST_TOKENS
    while tokens * 2 <= longest_tokens:
        prompt = PrefillShape(tokens)
        apart_s, together_s = 2 * model.predict_s([prompt]), model.predict_s([prompt, prompt])
        if apart_s - together_s <= LITTLE * apart_s:
            break
        tokens *= 2
    return tokens
