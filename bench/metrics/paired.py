"""Two ways to serve the same traces: by how much attainment differs, trace by trace, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Difference:
    """Attainment of one way less that of another, in percentage points."""

    points: float
    """Mean over the traces."""
    half_width_points: float
    """Half of its 95% interval, by Student's t over the traces; infinite for one trace."""
    by_trace_points: Sequence[float]

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Difference:
        """The difference of attainments, from 0 to 1, on the same traces in the same order."""
        by_trace_points = [100 * (one - other) for one, other in zip(ours, theirs, strict=True)]
        count = len(by_trace_points)
        half_width = math.inf
        if count > 1:
            half_width = float(stats.t.ppf(0.975, count - 1) * np.std(by_trace_points, ddof=1) / math.sqrt(count))
        return cls(float(np.mean(by_trace_points)), half_width, by_trace_points)

    def __str__(self) -> str:
        sure = (
            f" (95%: {self.low_points:+.2f} to {self.high_points:+.2f})"
            if math.isfinite(self.half_width_points)
            else ""
        )
        return f"{self.points:+.2f}{sure}"

    @property
    def low_points(self) -> float:
        """Lower end of the interval."""
        return self.points - self.half_width_points

    @property
    def high_points(self) -> float:
        """Upper end of the interval."""
        return self.points + self.half_width_points

    def to_dict(self) -> dict[str, Any]:
        """For results: without an interval where there is none."""
        ci95 = [self.low_points, self.high_points] if math.isfinite(self.half_width_points) else None
        return {"difference_points": self.points, "ci95_points": ci95, "by_trace_points": list(self.by_trace_points)}
