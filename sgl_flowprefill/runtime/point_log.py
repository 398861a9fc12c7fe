"""Each operator and each tile of prefills, told to the event log where somebody asks for them."""

from __future__ import annotations

import time
from typing import Final

from sgl_flowprefill.events import EventLog, Points
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask

MOST_POINTS: Final = 128
"""Interruption points of one event, which is written at the last of them: no event costs more than so many."""


class PointLog:
    """Collects the interruption points that the running task passes, and writes them as events."""

    def __init__(self, log: EventLog, progress: Progress) -> None:
        """``progress`` names the modules."""
        self._log = log
        self._progress = progress
        self._after: list[str] = []
        self._passed_s: list[float] = []

    def passed(self, task: PrefillTask) -> None:
        """``task`` is behind an operator, or behind a tile of one."""
        if task.id == NO_TASK:  # an exploration
            return
        self._after.append("" if task.tiles_passed else self._progress.behind(task.operators_passed))
        self._passed_s.append(round(time.monotonic(), 6))
        if len(self._after) == MOST_POINTS:
            self.stopped(task)

    def stopped(self, task: PrefillTask) -> None:
        """Write what ``task`` has passed since the last time."""
        if self._after:
            self._log.write(Points, time.monotonic(), task=task.id, after=self._after, passed_s=self._passed_s)
            self._after, self._passed_s = [], []
