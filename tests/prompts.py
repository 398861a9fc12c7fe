"""Prompts for the embedded model."""

from __future__ import annotations

import random

from sgl_flowprefill.model.embedded import FIRST_WORD_ID, VOCAB_SIZE


def prompt(seed: int, tokens: int, prefix: list[int] | None = None) -> list[int]:
    """``tokens`` token ids, the first of which are ``prefix``; the same for the same arguments."""
    head = prefix or []
    rng = random.Random(seed)
    return head + [rng.randrange(FIRST_WORD_ID, VOCAB_SIZE) for _ in range(tokens - len(head))]


def population(count: int, seed: int = 0, longest_tokens: int = 4000) -> list[list[int]]:
    """Distinct prompts of 1 to ``longest_tokens`` tokens, 600 on average. Three of five start with one of four shared
    prefixes, which extend each other in pairs. Each prompt at an odd place has the shape of the one before: as many
    tokens, behind the same prefix.
    """
    rng = random.Random(seed)
    first, second = prompt(seed + 9001, 200), prompt(seed + 9002, 300)
    prefixes = [first, prompt(seed + 9003, 500, first), second, prompt(seed + 9004, 800, second)]
    prompts: dict[tuple[int, ...], list[int]] = {}
    while len(prompts) < count:
        prefix = rng.choice(prefixes) if rng.random() < 0.6 else []
        tokens = len(prefix) + rng.choice(_TOKENS) if rng.random() < 0.97 else longest_tokens
        twins = [prompt(rng.randrange(1 << 30), tokens, prefix) for _ in range(2)]
        if prompts.keys().isdisjoint(map(tuple, twins)) and twins[0] != twins[1]:
            prompts |= {tuple(twin): twin for twin in twins}
    return list(prompts.values())[:count]


_TOKENS = (1, 2, 7, 16, 40, 64, 65, 100, 130, 200, 256, 300, 330, 400, 500, 600, 700, 900, 1000, 1200)
