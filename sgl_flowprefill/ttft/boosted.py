"""The TTFT model: physics for the course of the curve, gradient-boosted trees (LightGBM) for what physics leaves.

``seconds = physics(batch) * exp(trees(batch))``. Both factors are non-decreasing in every feature of a batch, so the
product is; the trees see features clamped to the measured range, so that beyond it the physics extrapolates alone.

How far the trees are to be believed is measured: each fold of the rows is predicted by physics and trees that have not
seen it, and the trees count by the share of what physics leaves that they foresee there. With few rows that share is
small or nothing, and the model is the physics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median
from typing import Any, Final

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import COUNT, Array, feature_matrix, features, single_matrix
from sgl_flowprefill.ttft.kinds import kind
from sgl_flowprefill.ttft.physics import KNOTS_PAIRS, KNOTS_TOKENS, TERMS, Physics
from sgl_flowprefill.ttft.trees import Trees

Batch = Sequence[PrefillShape]

BOOSTING_ROUNDS: Final = 40
OUTLIER_SPREADS: Final = 4.0
"""Deviations from the physics count for no more than this many times their median."""
LEAST_SHAPES: Final = 3
"""Fewer distinct shapes do not determine the physics."""
LEAST_S: Final = 1e-9
"""A batch takes no less, also where too few rows leave the physics nothing to say."""
DISTURBED: Final = 1.3
"""A repeat of a shape that takes more than this multiple of the faster half was disturbed: nothing makes it faster."""
FOLDS: Final = 5
"""Parts of the rows, of which each is predicted by a model of the others."""
PARAMETERS: Final[dict[str, Any]] = {
    "objective": "regression",
    "monotone_constraints": [1] * COUNT,
    "monotone_constraints_method": "advanced",
    "learning_rate": 0.1,
    "max_depth": 3,
    "num_leaves": 8,
    "min_data_in_leaf": 5,
    "lambda_l2": 3.0,
    "min_data_in_bin": 1,
    "seed": 0,
    "deterministic": True,
    "num_threads": 1,
    "verbosity": -1,
}


@dataclass(frozen=True)
class BoostedTTFT:
    """A fitted model. Its first call compiles the kernels when no earlier process of this machine has."""

    physics: Physics
    trees: Trees
    low: Array
    high: Array
    """[COUNT] least and greatest measured value of each feature."""

    @classmethod
    def fit(cls, batches: Sequence[Batch], times_s: Sequence[float]) -> BoostedTTFT:
        """Fit measured ``times_s`` of ``batches``. See ``shape_medians`` for repeats.

        Raises ValueError with too few distinct shapes.
        """
        shapes = shape_medians(batches, times_s)
        return fit_rows(feature_matrix(list(shapes)), np.array(list(shapes.values()))).model

    def __reduce__(self) -> tuple[Any, ...]:
        """Without what the compiled kernels are given: another process compiles its own."""
        return BoostedTTFT, (self.physics, self.trees, self.low, self.high)

    def is_sound(self) -> bool:
        """Whether the arrays are of a model that ``fit`` could have made: finite, and non-decreasing in all features.

        What has come from a file or another process is asked this before it is used.
        """
        shapes = (self.physics.weights.shape, self.low.shape, self.high.shape)
        return bool(
            shapes == ((TERMS,), (COUNT,), (COUNT,))
            and np.isfinite(np.concatenate([self.physics.weights, self.low, self.high])).all()
            and (self.physics.weights >= 0).all()
            and self.physics.weights.any()
            and self.trees.is_monotone(COUNT)
        )

    def predict_rows_s(self, matrix: Array) -> Array:
        """Seconds of the batches whose features are the rows of ``matrix``, without the compiled kernels: for
        processes that predict seldom.
        """
        clamped = np.clip(matrix, self.low, self.high)
        return np.asarray(self.physics.predict_s(matrix) * np.exp(self.trees.predict(clamped)))

    def predict_s(self, batch: Batch) -> float:
        one, _, tables = self._compiled
        return float(one(*features(batch), *tables))

    def predict_each_s(self, requests: Sequence[PrefillShape]) -> Array:
        """Seconds of each of ``requests`` when it runs alone."""
        return self.predict_matrix_s(single_matrix(requests))

    def predict_all_s(self, batches: Sequence[Batch]) -> Array:
        """Seconds of each of ``batches``."""
        return self.predict_matrix_s(feature_matrix(batches))

    def predict_matrix_s(self, matrix: Array) -> Array:
        """What ``predict_rows_s`` returns, by the compiled kernels."""
        _, many, tables = self._compiled
        return np.asarray(many(matrix, *tables))

    @cached_property
    def _compiled(self) -> tuple[Any, Any, tuple[Any, ...]]:
        from sgl_flowprefill.ttft.kernels import compiled

        one, many = compiled()
        parameters = np.concatenate([self.physics.weights, self.low, self.high])
        knots = np.array(KNOTS_TOKENS), np.array(KNOTS_PAIRS)
        return one, many, (parameters, *knots, self.trees.feature, self.trees.threshold, self.trees.leaf)


@dataclass(frozen=True)
class Fitted:
    """A model with what it is worth."""

    model: BoostedTTFT
    residuals: Array
    """[rows] log of measured over predicted seconds, each predicted by a model that has not seen the row's fold."""
    kinds: list[int]
    """[rows] the kind of each (``ttft.kinds``)."""
    trust: float
    """From 0 to 1: how far the trees count."""

    def parts(self) -> tuple[BoostedTTFT, list[float], list[int]]:
        """The model, the residuals and the kinds, as ``AdaptiveTTFT`` takes them."""
        return self.model, self.residuals.tolist(), self.kinds


def fit_rows(matrix: Array, seconds: Array) -> Fitted:
    """Fit ``seconds`` of batches whose features are the rows of ``matrix``.

    Raises ValueError with too few rows.
    """
    if len(matrix) < LEAST_SHAPES:
        raise ValueError(f"a TTFT model needs at least {LEAST_SHAPES} different batches, got {len(matrix)}")
    # Neighbours in size are in different folds, whatever the order of the rows.
    fold = np.empty(len(matrix), dtype=np.int64)
    fold[np.lexsort(matrix.T)] = np.arange(len(matrix)) % FOLDS
    left, foreseen = np.zeros(len(matrix)), np.zeros(len(matrix))
    for index in range(min(FOLDS, len(matrix))):
        unseen = fold == index
        physics, trees = _fit_parts(matrix[~unseen], seconds[~unseen])
        left[unseen] = np.log(seconds[unseen] / np.maximum(physics.predict_s(matrix[unseen]), LEAST_S))
        seen = matrix[~unseen]
        foreseen[unseen] = trees.predict(np.clip(matrix[unseen], seen.min(axis=0), seen.max(axis=0)))
    bound = OUTLIER_SPREADS * float(np.median(np.abs(left)))
    moved = float(foreseen @ foreseen)
    trust = min(max(float(foreseen @ np.clip(left, -bound, bound)) / moved, 0.0), 1.0) if moved else 0.0
    physics, trees = _fit_parts(matrix, seconds)
    model = BoostedTTFT(physics, trees.scaled(trust), matrix.min(axis=0), matrix.max(axis=0))
    kinds = [kind(*row[:3]) for row in matrix.tolist()]
    return Fitted(model, left - trust * foreseen, kinds, trust)


def _fit_parts(matrix: Array, seconds: Array) -> tuple[Physics, Trees]:
    physics = Physics.fit(matrix, seconds)
    log_ratios = np.log(seconds / np.maximum(physics.predict_s(matrix), LEAST_S))
    bound = OUTLIER_SPREADS * float(np.median(np.abs(log_ratios)))
    return physics, Trees.of(train(matrix, np.clip(log_ratios, -bound, bound)))


def train(matrix: Array, log_ratios: Array, parameters: dict[str, Any] | None = None) -> Any:
    """A ``lightgbm.Booster`` of ``log_ratios`` over features, non-decreasing in each."""
    import lightgbm

    data = lightgbm.Dataset(matrix, log_ratios)
    return lightgbm.train(PARAMETERS | (parameters or {}), data, num_boost_round=BOOSTING_ROUNDS)


def shape_medians(batches: Sequence[Batch], times_s: Sequence[float]) -> dict[tuple[PrefillShape, ...], float]:
    """Seconds of each distinct batch: the median of its repeats, without those that were disturbed (DISTURBED). Of a
    shape that is measured often the median is no smaller than of others; the fastest repeat would be. That holds where
    repeats scatter by up to 10% (standard deviation of the logarithm): with more, some count as disturbed that were
    not, and at 15% a shape that is measured often passes for 3% faster.
    """
    repeats: dict[tuple[PrefillShape, ...], list[float]] = {}
    for batch, time_s in zip(batches, times_s, strict=True):
        repeats.setdefault(tuple(batch), []).append(time_s)
    return {batch: _undisturbed(times) for batch, times in repeats.items()}


def _undisturbed(times_s: Sequence[float]) -> float:
    faster_half = sorted(times_s)[: (len(times_s) + 1) // 2]
    most_s = DISTURBED * fmean(faster_half)
    return median(time_s for time_s in times_s if time_s <= most_s)
