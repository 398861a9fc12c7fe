"""Predictions as a server makes them: by a profile of its first start, corrected and refitted while it serves."""

from __future__ import annotations

import math
import random
from typing import Final

import numpy as np

from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.profiling import make_design
from sgl_flowprefill.ttft.boosted import fit_rows
from sgl_flowprefill.ttft.features import feature_matrix
from sgl_flowprefill.ttft.learning import RefittedTTFT, refit
from sgl_flowprefill.ttft.reservoir import Reservoir, rows_of_profile

LONGEST_TOKENS: Final = 4096
"""Longest prompt of the profile, as the first start on a CPU has it."""
LATER: Final = 8
"""A refit comes no earlier than after this part of all tasks since the last one, which keeps long runs short."""


class LearnedTTFT(RefittedTTFT):
    """The model of a simulated server. Refits take no time, and are adopted at once."""

    def __init__(self, cost: CostModel, error: float, quantile: float = 0.75, seed: int = 0) -> None:
        """The profile's forward passes take what ``cost`` says, off by ``error`` (lognormal)."""
        rng = random.Random(seed)
        design = make_design(LONGEST_TOKENS)
        seconds = np.array([cost.predict_s(shape) * math.exp(rng.gauss(0.0, error)) for shape in design])
        matrix = feature_matrix(design)
        super().__init__(fit_rows(matrix, seconds), quantile, Reservoir.of(rows_of_profile(matrix, seconds)))
        self._trained_through = 0

    def may_refit(self, tasks: int) -> bool:
        return tasks >= self.journal.number // LATER

    def ask_for_refit(self) -> None:
        found = refit(self.journal.reservoir.rows, self.model, self._trained_through)
        if found is not None and found.is_better:
            self._trained_through = found.trained_through
            self.take_over(found.challenger)
