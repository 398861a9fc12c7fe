"""The model of the running engine's decode steps: from steps that were measured for it, or that are measured now."""

from __future__ import annotations

import logging
import statistics
import time
from pathlib import Path
from typing import Final

from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.profiling.steps import LinearSteps, Step, StepProfile
from sgl_flowprefill.runtime.profile import current_setting, kept_for_the_next_start, profile_path
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole

logger = logging.getLogger(__name__)

SHAPES: Final = ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64), (32, 64), (1, 3072), (4, 1024), (8, 512))
"""Requests of the steps that are measured, and the tokens of the prompt of each."""
REPEATS: Final = 7
"""Steps that are measured of each shape; their median counts."""


def load_or_measure_steps(role: SchedulerRole) -> LinearSteps:
    """The model of the steps of ``role``'s engine. They are measured at the first start, and cached."""
    setting = current_setting(role.scheduler)
    path = steps_path(profile_path(setting))
    ranks = role.scheduler.tp_group
    is_first = ranks.rank_in_group == 0
    profile = ranks.broadcast_object(StepProfile.read(path, setting) if is_first else None)
    if profile is None:
        profile = ranks.broadcast_object(StepProfile(setting=setting, steps=_measure(role)))
        if is_first:
            with kept_for_the_next_start("the times of decode steps"):
                profile.write(path)
    model = LinearSteps.fit(profile.steps)
    logger.info("FlowPrefill: a decode step takes %s", model)
    return model


def steps_path(profile: Path) -> Path:
    """Where the steps of the server with the TTFT profile at ``profile`` are kept."""
    return profile.with_name(f"{profile.stem}-steps.json")


def _measure(role: SchedulerRole) -> tuple[Step, ...]:
    engine = SchedulerEngine(role)
    started_s, steps = time.monotonic(), []
    for requests, tokens in SHAPES:
        requests = min(requests, int(role.scheduler.max_running_requests))
        tokens = max(1, min(tokens, engine.limit_tokens // requests - REPEATS))
        batch, times_s = engine.time_steps(requests, tokens, REPEATS + 1)
        # The first one finds nothing as it will be in the next.
        steps.append(Step(requests=batch, context_tokens=batch * tokens, time_s=statistics.median(times_s[1:])))
    logger.info("FlowPrefill measured %d decode steps in %.1f s", len(steps) * REPEATS, time.monotonic() - started_s)
    return tuple(steps)
