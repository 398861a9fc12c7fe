"""Compiled evaluation of a TTFT model. Compiled once a machine (numba keeps it on disk), in about ten seconds.

What numba keeps goes by this file and by the types of arguments. So the kernels are given all numbers that other
modules define: a kernel that was kept is right whatever has become of these.

Imported only where a model is evaluated: numba takes a second to import.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import numpy as np
from numba import extending, njit  # type: ignore[import-untyped]

from sgl_flowprefill.ttft.features import COUNT
from sgl_flowprefill.ttft.physics import TERMS

logger = logging.getLogger(__name__)


@cache
def compiled() -> tuple[Any, Any]:
    """``predict_one`` and ``predict_many``, compiled for what a ``BoostedTTFT`` gives them. Where numba cannot keep
    them, or cannot read what it has kept, this process compiles them for itself.
    """
    try:
        return _compiled(kept=True)
    except Exception as error:  # a full disk, no directory that it may write to, a damaged file
        logger.warning(
            "FlowPrefill compiles its TTFT kernels at each start, as numba cannot use its cache (%s: %s): clear it, or "
            "name another directory with NUMBA_CACHE_DIR",
            type(error).__name__,
            error,
        )
        return _compiled(kept=False)


def _compiled(kept: bool) -> tuple[Any, Any]:
    one, many = (njit(cache=kept)(function) for function in (predict_one, predict_many))
    knots, of_nodes = np.ones(1), np.zeros((1, 1))
    tables = np.zeros(TERMS + 2 * COUNT), knots, knots, of_nodes.astype(np.int64), of_nodes, np.zeros((1, 2))
    # Compile both now, or the first scheduling event that needs the other one waits for it.
    one(*[0.0] * COUNT, *tables)
    many(np.zeros((1, COUNT)), *tables)
    return one, many


def seconds(  # type: ignore[no-untyped-def]
    requests, new_tokens, cached_tokens, pairs, parameters, knots_tokens, knots_pairs, feature, threshold, leaf
) -> Any:
    """Seconds of one batch. ``parameters``: weights of the physics, then lowest and highest profiled features."""
    physics_s = parameters[0] + parameters[1] * requests + parameters[2] * new_tokens
    physics_s += parameters[3] * cached_tokens + parameters[4] * pairs
    term = 5
    for knot in knots_tokens:
        physics_s += parameters[term] * min(new_tokens, knot) + parameters[term + 1] * max(new_tokens - knot, 0.0)
        term += 2
    for knot in knots_pairs:
        physics_s += parameters[term] * min(pairs, knot) + parameters[term + 1] * max(pairs - knot, 0.0)
        term += 2
    row = np.empty(4)
    row[0], row[1], row[2], row[3] = requests, new_tokens, cached_tokens, pairs
    low, high = len(parameters) - 2 * len(row), len(parameters) - len(row)
    for column in range(len(row)):
        row[column] = min(max(row[column], parameters[low + column]), parameters[high + column])
    log_ratio = 0.0
    splits = feature.shape[1]
    for tree in range(feature.shape[0]):
        node = 0
        while node < splits:
            node = 2 * node + 1 + (row[feature[tree, node]] > threshold[tree, node])
        log_ratio += leaf[tree, node - splits]
    return physics_s * math.exp(log_ratio)


extending.register_jitable(seconds)


def predict_one(  # type: ignore[no-untyped-def]
    requests, new_tokens, cached_tokens, pairs, parameters, knots_tokens, knots_pairs, feature, threshold, leaf
) -> Any:
    """Seconds of one batch, as ``seconds``."""
    return seconds(
        requests, new_tokens, cached_tokens, pairs, parameters, knots_tokens, knots_pairs, feature, threshold, leaf
    )


def predict_many(  # type: ignore[no-untyped-def]
    matrix, parameters, knots_tokens, knots_pairs, feature, threshold, leaf
) -> Any:
    """Seconds of many batches, one in each row of ``matrix``."""
    out = np.empty(len(matrix))
    for i in range(len(matrix)):
        requests, new_tokens, cached_tokens, pairs = matrix[i, 0], matrix[i, 1], matrix[i, 2], matrix[i, 3]
        out[i] = seconds(
            requests, new_tokens, cached_tokens, pairs, parameters, knots_tokens, knots_pairs, feature, threshold, leaf
        )
    return out
