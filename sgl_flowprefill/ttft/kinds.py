"""Kinds of batches: those whose times are off by about the same, by size, number of requests and cached prefix."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

from sgl_flowprefill.ttft.base import PrefillShape

BANDS_TOKENS: Final = (256, 1024, 4096, 16384)
"""New tokens at which size bands begin, after the first."""
BANDS_REQUESTS: Final = (2, 5)
"""Numbers of requests at which bands of batches begin, after that of one request."""
HALF_CACHED: Final = 0.5
"""Share of cached tokens from which a batch counts as mostly cached."""
SHARES: Final = 3
"""Bands of cached prefixes: none, some, mostly."""
KINDS: Final = (len(BANDS_TOKENS) + 1) * (len(BANDS_REQUESTS) + 1) * SHARES


def kind(requests: float, new_tokens: float, cached_tokens: float) -> int:
    """The kind of a batch, from 0 to KINDS - 1, by its features."""
    batch = bisect_right(BANDS_REQUESTS, requests)
    return (size_band(new_tokens) * (len(BANDS_REQUESTS) + 1) + batch) * SHARES + share_band(new_tokens, cached_tokens)


def kind_of(batch: Sequence[PrefillShape]) -> int:
    """The kind of ``batch``."""
    if len(batch) == 1:
        return kind(1, *batch[0])
    return kind(len(batch), sum(shape.new_tokens for shape in batch), sum(shape.cached_tokens for shape in batch))


def size_band(new_tokens: float) -> int:
    """The size band of a batch of ``new_tokens``."""
    return bisect_right(BANDS_TOKENS, new_tokens)


def share_band(new_tokens: float, cached_tokens: float) -> int:
    """Which of the SHARES a batch is in."""
    return 0 if cached_tokens <= 0 else 1 if cached_tokens < HALF_CACHED * (new_tokens + cached_tokens) else 2


def band_of(kind: int) -> int:
    """The size band of a ``kind``."""
    return kind // ((len(BANDS_REQUESTS) + 1) * SHARES)
