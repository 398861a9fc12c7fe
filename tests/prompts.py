"""Prompts for the embedded model."""

from __future__ import annotations

import random

from sgl_flowprefill.model.embedded import FIRST_WORD_ID, VOCAB_SIZE


def prompt(seed: int, tokens: int, prefix: list[int] | None = None) -> list[int]:
    """``tokens`` token ids, the first of which are ``prefix``; the same for the same arguments."""
    head = prefix or []
    rng = random.Random(seed)
    return head + [rng.randrange(FIRST_WORD_ID, VOCAB_SIZE) for _ in range(tokens - len(head))]
