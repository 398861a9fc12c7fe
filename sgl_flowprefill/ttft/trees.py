"""LightGBM's trees as arrays that a scheduling event can afford to evaluate, and the kernels that do.

Every tree is padded to a complete one, so that a walk has the same number of steps on every path and no branches: a
node's children are found by arithmetic, and a leaf that ends early is repeated below. ``Booster.predict`` takes about
50 us for a row; this takes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sgl_flowprefill.ttft.features import Array


@dataclass(frozen=True)
class Trees:
    """``trees`` complete binary trees of ``depth`` levels of splits, one after another in each array."""

    depth: int
    feature: NDArray[np.int64]
    """[trees, 2**depth - 1] feature that a node compares."""
    threshold: Array
    """[trees, 2**depth - 1] a row goes left where its feature is at most this."""
    leaf: Array
    """[trees, 2**depth] value of each leaf; a prediction is the sum over the trees."""

    @classmethod
    def of(cls, booster: Any) -> Trees:
        """Flatten a ``lightgbm.Booster`` of numerical splits, trained on rows without missing values."""
        roots = [tree["tree_structure"] for tree in booster.dump_model()["tree_info"]]
        depth = max(map(_depth, roots), default=0)
        feature = np.zeros((len(roots), 2**depth - 1), dtype=np.int64)
        threshold = np.full((len(roots), 2**depth - 1), np.inf)
        leaf = np.zeros((len(roots), 2**depth))
        for tree, root in enumerate(roots):
            _fill(root, 0, 0, depth, feature[tree], threshold[tree], leaf[tree])
        return cls(depth, feature, threshold, leaf)

    def predict(self, matrix: Array) -> Array:
        """Sum over the trees for each row of ``matrix``, [rows, features]."""
        trees, splits = self.feature.shape
        node = np.zeros((len(matrix), trees), dtype=np.int64)
        every, row = np.arange(trees), np.arange(len(matrix))[:, None]
        for _ in range(self.depth):
            right = matrix[row, self.feature[every, node]] > self.threshold[every, node]
            node = 2 * node + 1 + right
        return np.asarray(self.leaf[every, node - splits].sum(axis=1))

    def scaled(self, factor: float) -> Trees:
        """The trees with every leaf multiplied by ``factor``."""
        return Trees(self.depth, self.feature, self.threshold, factor * self.leaf)

    def is_monotone(self, features: int) -> bool:
        """Whether these are whole trees over so many ``features``, and no prediction falls where a feature grows.

        A leaf holds where each feature is above its low and at most its high bound. No tree may have a leaf that can
        be left for a smaller one by growing.
        """
        splits = 2**self.depth - 1
        trees = len(self.leaf)
        if self.feature.shape != (trees, splits) or self.threshold.shape != (trees, splits):
            return False
        if self.leaf.shape != (trees, splits + 1) or not np.isfinite(self.leaf).all():
            return False
        if splits and not ((self.feature >= 0) & (self.feature < features)).all():
            return False
        low = np.full((trees, 2 * splits + 1, features), -np.inf)
        high = np.full((trees, 2 * splits + 1, features), np.inf)
        every = np.arange(trees)
        for node in range(splits):
            of, at = self.feature[:, node], self.threshold[:, node]
            for child in (2 * node + 1, 2 * node + 2):
                low[:, child], high[:, child] = low[:, node], high[:, node]
            high[every, 2 * node + 1, of] = np.minimum(high[every, node, of], at)
            low[every, 2 * node + 2, of] = np.maximum(low[every, node, of], at)
        low, high = low[:, splits:], high[:, splits:]
        is_there = np.asarray((low < high).all(axis=2))
        grows = (low[:, :, None, :] < high[:, None, :, :]).all(axis=3)  # from a leaf to another
        falls = self.leaf[:, :, None] > self.leaf[:, None, :] + 1e-12
        return not (grows & falls & is_there[:, :, None] & is_there[:, None, :]).any()


def _depth(node: dict[str, Any]) -> int:
    if "split_feature" not in node:
        return 0
    return 1 + max(_depth(node["left_child"]), _depth(node["right_child"]))


def _fill(
    node: dict[str, Any], index: int, level: int, depth: int, feature: NDArray[np.int64], threshold: Array, leaf: Array
) -> None:
    """Write ``node`` at heap position ``index``; a leaf fills everything below its position."""
    if level == depth:
        leaf[index - (2**depth - 1)] = node["leaf_value"]
        return
    left = right = node
    if "split_feature" in node:
        assert node["decision_type"] == "<=", "categorical splits are not used"
        feature[index], threshold[index] = node["split_feature"], node["threshold"]
        left, right = node["left_child"], node["right_child"]
    _fill(left, 2 * index + 1, level + 1, depth, feature, threshold, leaf)
    _fill(right, 2 * index + 2, level + 1, depth, feature, threshold, leaf)
