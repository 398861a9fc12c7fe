"""TTFT as a cubic in the number of new tokens, fitted by least squares (paper, section 4.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial

from sgl_flowprefill.ttft.base import PrefillShape


@dataclass(frozen=True)
class CubicTTFT:
    """``predict_s`` is the fitted cubic within the profiled range and its tangent beyond it.

    Tabulated at a fixed step, made non-decreasing, and interpolated: one prediction is two list look-ups.
    """

    table_s: tuple[float, ...]
    step_tokens: int
    slope_s: float
    """Seconds a token beyond the table: a cubic's own tail may even fall."""

    @classmethod
    def fit(cls, tokens: Sequence[int], times_s: Sequence[float], step_tokens: int = 16) -> CubicTTFT:
        """Fit measured ``times_s`` over ``tokens``. Relative residuals count, so that short prompts are fitted too.

        Raises ValueError with fewer than four distinct sizes, which do not determine a cubic.
        """
        x, y = np.asarray(tokens, dtype=float), np.asarray(times_s, dtype=float)
        if len(np.unique(x)) < 4:
            raise ValueError(f"a cubic needs at least 4 prompt lengths, got {sorted(set(tokens))}")
        curve = Polynomial.fit(x, y, deg=3, w=1.0 / np.maximum(y, 1e-6))
        longest = float(x.max())
        steps = int(np.ceil(longest / step_tokens))
        grid = np.minimum(np.arange(steps + 1) * step_tokens, longest)
        # Below the shortest profiled prompt the cubic is not constrained: its value there is the best floor known.
        values = np.maximum.accumulate(np.maximum(curve(np.maximum(grid, x.min())), 1e-6))
        # Attention makes the cost of a token grow with length: the last tenth of the curve bounds it from below.
        slope = max(float(curve.deriv()(longest)), float(values[-1] / longest))
        return cls(table_s=tuple(values.tolist()), step_tokens=step_tokens, slope_s=slope)

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        tokens = sum(shape.new_tokens for shape in batch)
        index, rest = divmod(tokens, self.step_tokens)
        last = len(self.table_s) - 1
        if index >= last:
            return self.table_s[last] + (tokens - last * self.step_tokens) * self.slope_s
        low, high = self.table_s[index], self.table_s[index + 1]
        return low + (high - low) * rest / self.step_tokens
