"""Which batches a profile measures: what serving meets, from one short prompt to many with cached prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Final

from sgl_flowprefill.ttft.base import PrefillShape

Shape = tuple[PrefillShape, ...]
"""A batch; its requests in the order in which they are admitted."""

SHORTEST_TOKENS: Final = 16
CACHED_SHARES: Final = (0.25, 0.5, 0.8, 0.95)
BATCH_SIZES: Final = (2, 3, 4, 6, 8, 12, 16)
MAX_BATCH_TOKENS: Final = 8192
"""Longer batches of several requests are not measured: throughput stops growing well before."""
LEAST_LONGEST_TOKENS: Final = 1024
SEED: Final = 20260216


def make_design(longest_tokens: int) -> list[Shape]:
    """Distinct shapes of up to ``longest_tokens`` per request: single prompts, cached prefixes, and batches."""
    rng = random.Random(SEED)
    shapes: list[Shape] = [(PrefillShape(tokens),) for tokens in _ladder(SHORTEST_TOKENS, longest_tokens, 2**0.5)]
    for total in _ladder(4 * SHORTEST_TOKENS, longest_tokens, 2.0):
        for share in CACHED_SHARES:
            cached = int(total * share)
            shapes.append((PrefillShape(total - cached, cached),))
    for requests in BATCH_SIZES:
        totals = _ladder(2 * requests * SHORTEST_TOKENS, min(longest_tokens, MAX_BATCH_TOKENS), 2.0)
        for index, total in enumerate(totals):
            lengths = _split(total, requests, rng)
            if index % 2:
                shapes.append(tuple(_with_prefix(tokens, longest_tokens, rng) for tokens in lengths))
            else:
                shapes.append(tuple(PrefillShape(tokens) for tokens in lengths))
    return list(dict.fromkeys(shapes))


def choose_longest(limit_tokens: int, round_s: float, estimate_s: Callable[[Shape], float]) -> int:
    """Longest prompt (a power of two, or the limit) for which measuring each shape once takes about ``round_s``."""
    chosen = min(LEAST_LONGEST_TOKENS, limit_tokens)
    while chosen < limit_tokens:
        longer = min(2 * chosen, limit_tokens)
        if sum(map(estimate_s, make_design(longer))) > round_s:
            break
        chosen = longer
    return chosen


def _ladder(first: int, last: int, factor: float) -> list[int]:
    """Lengths from ``first`` to ``last`` by ``factor``, off the powers of two by a little, as prompts are."""
    lengths: list[int] = []
    length = float(first)
    while length < last * 0.9:
        lengths.append(round(length))
        length *= factor
    return [*lengths, last]


def _split(total: int, parts: int, rng: random.Random) -> list[int]:
    """``total`` tokens in ``parts`` mixed lengths of at least SHORTEST_TOKENS each."""
    spare = total - parts * SHORTEST_TOKENS
    cuts = sorted(rng.randint(0, spare) for _ in range(parts - 1))
    return [SHORTEST_TOKENS + high - low for low, high in pairwise([0, *cuts, spare])]


def _with_prefix(new_tokens: int, longest_tokens: int, rng: random.Random) -> PrefillShape:
    share = rng.choice((0.0, *CACHED_SHARES))
    cached = min(int(new_tokens * share / (1 - share)), longest_tokens - new_tokens)
    return PrefillShape(new_tokens, max(0, cached))
