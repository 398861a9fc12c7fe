"""Compiled evaluation of a TTFT model. Compiled once a machine (numba keeps it on disk), in about ten seconds.

Imported only where a model is evaluated: numba takes a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]

from sgl_flowprefill.ttft.features import COUNT
from sgl_flowprefill.ttft.physics import KNOTS_PAIRS, KNOTS_TOKENS, TERMS

LOW = TERMS
HIGH = TERMS + COUNT


def compiled(function: Callable[..., Any]) -> Any:
    """``function``, to be compiled at its first call. Kept where numba finds a directory that it may write to; without
    any, each process compiles it.
    """
    try:
        return njit(cache=True)(function)
    except RuntimeError:
        return njit(function)


@compiled
def predict_one(  # type: ignore[no-untyped-def]
    requests, new_tokens, cached_tokens, pairs, parameters, feature, threshold, leaf
) -> Any:
    """Seconds of one batch. ``parameters``: weights of the physics, then lowest and highest profiled features."""
    physics_s = parameters[0] + parameters[1] * requests + parameters[2] * new_tokens
    physics_s += parameters[3] * cached_tokens + parameters[4] * pairs
    term = 5
    for knot in KNOTS_TOKENS:
        physics_s += parameters[term] * min(new_tokens, knot) + parameters[term + 1] * max(new_tokens - knot, 0.0)
        term += 2
    for knot in KNOTS_PAIRS:
        physics_s += parameters[term] * min(pairs, knot) + parameters[term + 1] * max(pairs - knot, 0.0)
        term += 2
    row = np.empty(COUNT)
    row[0], row[1], row[2], row[3] = requests, new_tokens, cached_tokens, pairs
    for column in range(COUNT):
        row[column] = min(max(row[column], parameters[LOW + column]), parameters[HIGH + column])
    log_ratio = 0.0
    splits = feature.shape[1]
    for tree in range(feature.shape[0]):
        node = 0
        while node < splits:
            node = 2 * node + 1 + (row[feature[tree, node]] > threshold[tree, node])
        log_ratio += leaf[tree, node - splits]
    return physics_s * math.exp(log_ratio)


@compiled
def predict_many(matrix, parameters, feature, threshold, leaf):  # type: ignore[no-untyped-def]
    """Seconds of many batches, one in each row of ``matrix``."""
    out = np.empty(len(matrix))
    for i in range(len(matrix)):
        requests, new_tokens, cached_tokens, pairs = matrix[i, 0], matrix[i, 1], matrix[i, 2], matrix[i, 3]
        out[i] = predict_one(requests, new_tokens, cached_tokens, pairs, parameters, feature, threshold, leaf)
    return out
