"""The TTFT model that a profile determines."""

from __future__ import annotations

import logging
import math

from sgl_flowprefill.profiling.file import Profile
from sgl_flowprefill.ttft import BoostedTTFT, CubicTTFT, TTFTModel

logger = logging.getLogger(__name__)


def fit(profile: Profile) -> tuple[TTFTModel, list[float]]:
    """The model of ``profile``, and the log ratios of measured to predicted time of its rows.

    A profile of single prompts alone determines a cubic over their tokens; a full one, the model of batches. Raises
    ValueError with too few shapes.
    """
    batches, times_s = profile.timings()
    model: TTFTModel
    if any(len(batch) > 1 for batch in batches):
        boosted = BoostedTTFT.fit(batches, times_s)
        logger.info("FlowPrefill predicts TTFT from %d measured batches", len(batches))
        model, predicted_s = boosted, boosted.predict_all_s(batches).tolist()
    else:
        model = CubicTTFT.fit([batch[0].new_tokens for batch in batches], times_s)
        predicted_s = [model.predict_s(batch) for batch in batches]
    return model, [math.log(time_s / p) for time_s, p in zip(times_s, predicted_s, strict=True)]
