"""Which batches a profile measures: what serving meets, from one short prompt to many with cached prefixes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import log
from operator import itemgetter
from typing import Final, TypeVar

from sgl_flowprefill.ttft.base import PrefillShape

T = TypeVar("T")

Shape = tuple[PrefillShape, ...]
"""A batch; its requests in the order in which they are admitted."""

SHORTEST_TOKENS: Final = 16
CACHED_SHARES: Final = (0.25, 0.5, 0.8, 0.95)
BATCH_SIZES: Final = (2, 3, 4, 6, 8, 12, 16)
MAX_BATCH_TOKENS: Final = 8192
"""Longer batches of several requests are not measured: throughput stops growing well before."""
LEAST_LONGEST_TOKENS: Final = 1024
REFERENCE_TOKENS: Final = (256, 1024)
"""Lengths of the references: short enough to be measured often, long enough for their times to be steady."""
SEED: Final = 20260216


def make_design(longest_tokens: int) -> list[Shape]:
    """Distinct shapes of up to ``longest_tokens`` per request: single prompts, cached prefixes, and batches, in an
    order in which any beginning has some of each kind, spread over all sizes.
    """
    rng = random.Random(SEED)
    prefixes: list[Shape] = []
    for total in _ladder(4 * SHORTEST_TOKENS, longest_tokens, 2.0):
        for share in CACHED_SHARES:
            cached = int(total * share)
            prefixes.append((PrefillShape(total - cached, cached),))
    batches: list[Shape] = []
    for requests in BATCH_SIZES:
        totals = _ladder(2 * requests * SHORTEST_TOKENS, min(longest_tokens, MAX_BATCH_TOKENS), 2.0)
        for index, total in enumerate(totals):
            if total < requests * SHORTEST_TOKENS:
                continue
            lengths = _split(total, requests, rng)
            if index % 2:
                batches.append(tuple(_with_prefix(tokens, longest_tokens, rng) for tokens in lengths))
            else:
                batches.append(tuple(PrefillShape(tokens) for tokens in lengths))
    kinds = [_spread(shapes) for shapes in (single_prompts(longest_tokens), prefixes, batches)]
    return list(dict.fromkeys(interleaved(*kinds)))


def single_prompts(longest_tokens: int) -> list[Shape]:
    """The design's single prompts with nothing cached, the shortest first."""
    return [(PrefillShape(tokens),) for tokens in _ladder(SHORTEST_TOKENS, longest_tokens, 2**0.5)]


def looked_into(longest_tokens: int) -> list[Shape]:
    """The single prompts whose operators are timed: every other one, and the longest."""
    return _spread(single_prompts(longest_tokens)[::-2][::-1])


def references(longest_tokens: int) -> list[Shape]:
    """The single prompts that are measured again and again, to tell the machine's speed over time."""
    prompts = single_prompts(longest_tokens)
    nearest = (min(prompts, key=lambda shape: abs(log(shape[0].new_tokens / tokens))) for tokens in REFERENCE_TOKENS)
    return list(dict.fromkeys(nearest))


def choose_longest(limit_tokens: int, round_s: float, estimate_s: Callable[[Shape], float]) -> int:
    """Longest prompt (a power of two, or the limit) for which measuring each shape once takes about ``round_s``."""
    chosen = min(LEAST_LONGEST_TOKENS, limit_tokens)
    while chosen < limit_tokens:
        longer = min(2 * chosen, limit_tokens)
        if sum(map(estimate_s, make_design(longer))) > round_s:
            break
        chosen = longer
    return chosen


def interleaved(*parts: Sequence[T]) -> list[T]:
    """All of ``parts``, each in its order and evenly spread over the whole."""
    places = [((index + 0.5) / len(part), one) for part in parts for index, one in enumerate(part)]
    return [one for _, one in sorted(places, key=itemgetter(0))]


def _spread(shapes: list[Shape]) -> list[Shape]:
    """``shapes``, which go from small to large, so that any beginning of them is spread over all: both ends, and then
    the reversed bits of an index say its place.
    """
    bits = max(1, (len(shapes) - 1).bit_length())
    order = [int(f"{index:0{bits}b}"[::-1], 2) for index in range(1 << bits)]
    return [shapes[index] for index in dict.fromkeys((0, len(shapes) - 1, *order)) if index < len(shapes)]


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
