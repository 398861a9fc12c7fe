"""The model of the running engine's decode steps: from steps that were measured for it, or that are measured now."""

from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final

from sgl_flowprefill.profiling import Setting
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.profiling.steps import LearnedSteps, Step, StepProfile
from sgl_flowprefill.runtime.profile import current_setting, kept_for_the_next_start, profile_path
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole

logger = logging.getLogger(__name__)

SHAPES: Final = ((1, 64), (2, 64), (4, 64), (8, 64), (16, 64), (32, 64), (1, 3072), (4, 1024), (8, 512))
"""Requests of the steps that are measured, and the tokens of the prompt of each."""
WIDE: Final = ((64, 64), (128, 64), (256, 64))
"""More of them where many streams are served at a time: on a GPU."""
REPEATS: Final = 7
"""Steps that are measured of each shape; their median counts."""


def load_or_measure_steps(role: SchedulerRole, learns: bool = False) -> LearnedSteps:
    """The model of the steps of ``role``'s engine. They are measured at the first start, and cached; what is learned
    from those that run takes their place there.
    """
    setting = current_setting(role.scheduler)
    path = steps_path(profile_path(setting))
    ranks = role.scheduler.tp_group
    is_first = ranks.rank_in_group == 0
    profile = ranks.broadcast_object(StepProfile.read(path, setting) if is_first else None)
    is_new = profile is None
    if is_new:
        profile = ranks.broadcast_object(StepProfile(setting=setting, steps=measure(role)))
    kept = Kept(path, setting)
    if is_new and is_first:
        kept.write(profile.steps)
    model = LearnedSteps(profile.steps, learns and is_first, kept.write_aside)  # the first rank alone predicts
    logger.info("FlowPrefill: a decode step takes %s", model.model)
    return model


class Kept:
    """The file for the next start. A thread writes it while the server serves: a slow volume holds up no step."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self._path = path
        self._setting = setting
        self._can_write = True
        self._newest: deque[tuple[Step, ...]] = deque(maxlen=1)
        """Steps that are to be written: of several, the last ones."""
        self._is_there = threading.Event()
        self._thread: threading.Thread | None = None

    def write(self, steps: tuple[Step, ...]) -> None:
        """Replace it, unless that was in vain before."""
        if self._can_write:
            self._can_write = False
            with kept_for_the_next_start("the times of decode steps"):
                StepProfile(setting=self._setting, steps=steps).write(self._path)
                self._can_write = True

    def write_aside(self, steps: tuple[Step, ...]) -> None:
        """Have the thread replace it. Returns at once."""
        self._newest.append(steps)
        self._is_there.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_newest, name="flowprefill-steps", daemon=True)
            self._thread.start()

    def _write_newest(self) -> None:
        while True:
            self._is_there.wait()
            self._is_there.clear()  # before the look: what comes behind it is there again
            if self._newest:
                self.write(self._newest.pop())


def steps_path(profile: Path) -> Path:
    """Where the steps of the server with the TTFT profile at ``profile`` are kept."""
    return profile.with_name(f"{profile.stem}-steps.json")


def measure(role: SchedulerRole) -> tuple[Step, ...]:
    """Times of decode steps on the server's own engine."""
    engine, scheduler = SchedulerEngine(role), role.scheduler
    started_s, steps = time.monotonic(), []
    most = int(scheduler.max_running_requests)
    shapes = (*SHAPES, *WIDE) if scheduler.device == "cuda" else SHAPES
    for requests, tokens in dict.fromkeys((min(requests, most), tokens) for requests, tokens in shapes):
        tokens = max(1, min(tokens, engine.limit_tokens // requests - REPEATS))
        batch, times_s = engine.time_steps(requests, tokens, REPEATS + 1)
        # The first one finds nothing as it will be in the next.
        steps.append(Step(requests=batch, context_tokens=batch * tokens, time_s=statistics.median(times_s[1:])))
    logger.info("FlowPrefill measured %d decode steps in %.1f s", len(steps) * REPEATS, time.monotonic() - started_s)
    return tuple(steps)
