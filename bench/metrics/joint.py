"""TTFT and TBT judged together: whether a request's first token came in time, and the further ones after it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from sgl_flowprefill.bench.loadgen.replay import RequestResult
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.ttft.features import Array

LATE_SHARE: Final = 0.01
"""Share of the gaps of a request that may be longer than its TBT objective."""
ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Answered:
    """A request: whether its first token came in time, and the times between its tokens."""

    meets_ttft: bool
    tbt_slo_s: float
    tbt_s: Array

    @property
    def late_gaps(self) -> int:
        """Gaps longer than the objective."""
        return int(np.count_nonzero(self.tbt_s > self.tbt_slo_s * (1 + ROUNDING)))

    @property
    def meets_both(self) -> bool:
        """TTFT met, and at most LATE_SHARE of the gaps late."""
        return self.meets_ttft and self.late_gaps <= LATE_SHARE * len(self.tbt_s)

    @property
    def meets_both_by_mean(self) -> bool:
        """TTFT met, and the mean gap within the objective."""
        if not self.meets_ttft or not len(self.tbt_s):
            return self.meets_ttft
        return float(self.tbt_s.mean()) <= self.tbt_slo_s * (1 + ROUNDING)


def answered(result: RequestResult) -> Answered:
    """What is judged of a replayed request; one that failed has missed its first token."""
    return Answered(result.meets_ttft(), result.tbt_slo_s, np.array(result.tbt_s))


def meets(result: RequestResult, judge: Judge) -> bool:
    """Whether a replayed request was served as ``judge`` wants it."""
    if judge == "ttft":
        return result.meets_ttft()
    answer = answered(result)
    return answer.meets_both if judge == "gaps" else answer.meets_both_by_mean


@dataclass(frozen=True)
class JointSummary:
    """Figures of a run in which answers stream."""

    joint_attainment: float
    joint_attainment_mean_tpot: float
    tbt_attainment: float
    """Share of all gaps within their objectives."""
    tbt_p50_s: float | None
    tbt_p99_s: float | None
    tbt_max_s: float | None


def summarise_joint(answers: Sequence[Answered]) -> JointSummary:
    """Figures of all requests of a run; one that never ran is a miss."""
    gaps_s = np.concatenate([answer.tbt_s for answer in answers]) if answers else np.empty(0)
    p50_s, p99_s, max_s = (
        (float(value) for value in np.percentile(gaps_s, [50, 99, 100])) if len(gaps_s) else [None] * 3
    )
    return JointSummary(
        joint_attainment=share(answer.meets_both for answer in answers),
        joint_attainment_mean_tpot=share(answer.meets_both_by_mean for answer in answers),
        tbt_attainment=1 - sum(answer.late_gaps for answer in answers) / max(1, len(gaps_s)),
        tbt_p50_s=p50_s,
        tbt_p99_s=p99_s,
        tbt_max_s=max_s,
    )


def share(met: Iterable[bool]) -> float:
    """Share of what is true; 0 of nothing."""
    values = list(met)
    return sum(values) / max(1, len(values))
