"""The physics of a prefill: its time as a sum of costs that can only grow, fitted with weights that cannot be negative.

A constant per forward and per request, linear operators (with lower efficiency on few rows), reading cached keys, and
attention. Every term is non-decreasing in every length, and so is the sum; beyond the profiled range it grows as linear
operators and attention do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sgl_flowprefill.ttft.features import Array

KNOTS_TOKENS: Final = (32.0, 128.0, 512.0, 2048.0)
"""Numbers of rows up to which a linear operator may cost extra, and from which a row may cost more (caches spill)."""
KNOTS_PAIRS: Final = (32.0**2, 256.0**2, 2048.0**2)
"""Numbers of pairs up to which attention may cost extra, and from which a pair may cost more."""
ROBUST_ITERATIONS: Final = 5
OUTLIER_SPREADS: Final = 2.0
PLAIN_TERMS: Final = 5
"""A constant, requests, new and cached tokens, pairs; what comes behind them bends the curve at a knot."""
RIDGE: Final = 0.03
"""What bends the curve has to explain more than this part of the rows' times, squared: noise would bend it where the
rows end, and beyond them it would be far off."""
TERMS: Final = PLAIN_TERMS + 2 * (len(KNOTS_TOKENS) + len(KNOTS_PAIRS))


@dataclass(frozen=True)
class Physics:
    """``seconds = terms(features) @ weights``."""

    weights: Array

    @classmethod
    def fit(cls, matrix: Array, times_s: Sequence[float] | Array) -> Physics:
        """Non-negative least squares of relative errors. ``matrix`` holds the features of a batch in each row."""
        seconds = np.asarray(times_s, dtype=np.float64)
        relative = terms(matrix) / seconds[:, None]
        scale = np.maximum(np.linalg.norm(relative, axis=0), 1e-300)
        trust = np.ones(len(seconds))
        ridge = np.sqrt(RIDGE) * np.eye(TERMS)[PLAIN_TERMS:]
        for _ in range(ROBUST_ITERATIONS):
            columns = np.concatenate([relative / scale * trust[:, None], ridge])
            weights = non_negative(columns, np.concatenate([trust, np.zeros(len(ridge))]))
            error = np.abs(np.log(np.maximum(relative @ (weights / scale), 1e-9)))
            # Huber's weights: a batch far off the curve pulls no harder than one a little off it.
            trust = np.sqrt(np.minimum(1.0, OUTLIER_SPREADS * (np.median(error) + 1e-4) / np.maximum(error, 1e-12)))
        return cls(weights / scale)

    def predict_s(self, matrix: Array) -> Array:
        return np.asarray(terms(matrix) @ self.weights)


def terms(matrix: Array) -> Array:
    """[batches, TERMS] costs in arbitrary units."""
    requests, new, cached, pairs = matrix[:, 0], matrix[:, 1], matrix[:, 2], matrix[:, 3]
    columns = [np.ones(len(matrix)), requests, new, cached, pairs]
    for knots, values in ((KNOTS_TOKENS, new), (KNOTS_PAIRS, pairs)):
        for knot in knots:
            columns += [np.minimum(values, knot), np.maximum(values - knot, 0.0)]
    return np.stack(columns, axis=1)


def non_negative(columns: Array, target: Array) -> Array:
    """Weights, none of them negative, for which ``columns @ weights`` is closest to ``target``."""
    from scipy.optimize import nnls  # type: ignore[import-untyped]

    return np.asarray(nnls(columns, target, maxiter=100 * columns.shape[1])[0])
