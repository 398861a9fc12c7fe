"""The TTFT model that a profile determines."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from sgl_flowprefill.profiling.file import Profile
from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.boosted import Fitted, fit_rows, shape_medians
from sgl_flowprefill.ttft.features import Array, feature_matrix

logger = logging.getLogger(__name__)


def fit(profile: Profile) -> Fitted:
    """The model of ``profile``. Raises ValueError with too few shapes."""
    batches, times_s = profile.timings()
    fitted = fit_rows(*shapes(batches, times_s))
    trust = round(100 * fitted.trust)
    logger.info("FlowPrefill predicts TTFT from %d measured batches; trees count by %d%%", len(batches), trust)
    return fitted


def shapes(batches: Sequence[Sequence[PrefillShape]], times_s: Sequence[float]) -> tuple[Array, Array]:
    """Features and seconds of the distinct ones of ``batches``."""
    times = shape_medians(batches, times_s)
    return feature_matrix(list(times)), np.array(list(times.values()))
