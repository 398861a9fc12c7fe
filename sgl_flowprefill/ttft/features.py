"""What a batch's time depends on, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sgl_flowprefill.ttft.base import PrefillShape

Array = NDArray[np.float64]


class Features(NamedTuple):
    """Features of one batch. None of them falls when a request gets longer, or when one joins."""

    requests: float
    new_tokens: float
    """Tokens to compute: what every linear operator costs."""
    cached_tokens: float
    """Cached prefix tokens: keys and values to be read."""
    pairs: float
    """Pairs of a token and one that it attends to, ``new * (cached + new / 2)`` of each request: attention's cost."""


COUNT: Final = len(Features._fields)


def features(batch: Sequence[PrefillShape]) -> Features:
    """Features of ``batch``, all of them floats: the compiled kernels have one signature."""
    if len(batch) == 1:
        new, cached = batch[0]
        return Features(1.0, float(new), float(cached), new * (cached + 0.5 * new))
    total = reused = 0
    pairs = 0.0
    for new, cached in batch:
        total += new
        reused += cached
        pairs += new * (cached + 0.5 * new)
    return Features(float(len(batch)), float(total), float(reused), pairs)


def feature_matrix(batches: Sequence[Sequence[PrefillShape]]) -> Array:
    """Features of many batches, [batches, COUNT]."""
    return np.array([features(batch) for batch in batches], dtype=np.float64).reshape(-1, COUNT)


def single_matrix(requests: Sequence[PrefillShape]) -> Array:
    """Features of many batches of one request each, [requests, COUNT]."""
    flat = np.fromiter(chain.from_iterable(requests), dtype=np.float64, count=2 * len(requests))
    matrix = np.empty((len(requests), COUNT))
    new, cached = flat[0::2], flat[1::2]
    matrix[:, 0] = 1.0
    matrix[:, 1] = new
    matrix[:, 2] = cached
    matrix[:, 3] = new * (cached + 0.5 * new)
    return matrix
