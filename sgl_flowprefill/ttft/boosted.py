"""The TTFT model: physics for the course of the curve, gradient-boosted trees (LightGBM) for what physics leaves.

``seconds = physics(batch) * exp(trees(batch))``. Both factors are non-decreasing in every feature of a batch, so the
product is; the trees see features clamped to the profiled range, so that beyond it the physics extrapolates alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import COUNT, Array, feature_matrix, features, single_matrix
from sgl_flowprefill.ttft.physics import Physics
from sgl_flowprefill.ttft.trees import Trees

Batch = Sequence[PrefillShape]

BOOSTING_ROUNDS: Final = 40
OUTLIER_SPREADS: Final = 4.0
"""Deviations from the physics count for no more than this many times their median."""
LEAST_SHAPES: Final = 12
"""Fewer distinct shapes do not determine a model."""
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
    """[COUNT] least and greatest profiled value of each feature."""

    @classmethod
    def fit(cls, batches: Sequence[Batch], times_s: Sequence[float]) -> BoostedTTFT:
        """Fit measured ``times_s`` of ``batches``. See ``undisturbed`` for repeats.

        Raises ValueError with too few distinct shapes.
        """
        shapes = undisturbed(batches, times_s)
        matrix, seconds = feature_matrix(list(shapes)), np.array(list(shapes.values()))
        if len(matrix) < LEAST_SHAPES:
            raise ValueError(f"a TTFT model needs at least {LEAST_SHAPES} different batches, got {len(matrix)}")
        physics = Physics.fit(matrix, seconds)
        log_ratios = np.log(seconds / physics.predict_s(matrix))
        bound = OUTLIER_SPREADS * float(np.median(np.abs(log_ratios)))
        booster = train(matrix, np.clip(log_ratios, -bound, bound))
        return cls(physics, Trees.of(booster), matrix.min(axis=0), matrix.max(axis=0))

    def predict_s(self, batch: Batch) -> float:
        one, _, tables = self._compiled
        return float(one(*features(batch), *tables))

    def predict_each_s(self, requests: Sequence[PrefillShape]) -> Array:
        """Seconds of each of ``requests`` when it runs alone."""
        return self._predict_many(single_matrix(requests))

    def predict_all_s(self, batches: Sequence[Batch]) -> Array:
        """Seconds of each of ``batches``."""
        return self._predict_many(feature_matrix(batches))

    def _predict_many(self, matrix: Array) -> Array:
        _, many, tables = self._compiled
        return np.asarray(many(matrix, *tables))

    @cached_property
    def _compiled(self) -> tuple[Any, Any, tuple[Any, ...]]:
        from sgl_flowprefill.ttft.kernels import predict_many, predict_one

        parameters = np.concatenate([self.physics.weights, self.low, self.high])
        tables = (parameters, self.trees.feature, self.trees.threshold, self.trees.leaf)
        # Compile both now, or the first scheduling event that needs the other one waits for it.
        predict_one(*features([PrefillShape(1)]), *tables)
        predict_many(single_matrix([PrefillShape(1)]), *tables)
        return predict_one, predict_many, tables


def train(matrix: Array, log_ratios: Array, parameters: dict[str, Any] | None = None) -> Any:
    """A ``lightgbm.Booster`` of ``log_ratios`` over features, non-decreasing in each."""
    import lightgbm

    data = lightgbm.Dataset(matrix, log_ratios)
    return lightgbm.train(PARAMETERS | (parameters or {}), data, num_boost_round=BOOSTING_ROUNDS)


def undisturbed(batches: Sequence[Batch], times_s: Sequence[float]) -> dict[tuple[PrefillShape, ...], float]:
    """Seconds of each distinct batch: the mean of the faster half of its repeats, since what disturbs only adds."""
    repeats: dict[tuple[PrefillShape, ...], list[float]] = {}
    for batch, time_s in zip(batches, times_s, strict=True):
        repeats.setdefault(tuple(batch), []).append(time_s)
    return {batch: float(np.mean(sorted(times)[: (len(times) + 1) // 2])) for batch, times in repeats.items()}
