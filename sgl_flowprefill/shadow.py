"""What would have become of requests that were shed: a gate that guesses wrong refuses too much.

A shed request is followed until its deadline. Time in which the server did nothing, or ran prefills that are due later
or were late anyway, would have been the request's; once that is as much as its prefill was predicted to take, it would
have been met after all. Requests that are due later and would have been late for it are not told apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from msgspec import UNSET

from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Fail,
    GiveBack,
    Resume,
    Shed,
    Start,
    Step,
    Suspend,
)

MOST_FOLLOWED: Final = 64
"""Requests that are followed at a time: bounds the cost of an event."""


@dataclass(slots=True, eq=False)
class _Shadow:
    """A request that was shed."""

    deadline_s: float
    lacks_s: float
    """How much of its prefill would still have to run."""


class Shadows:
    """Reads the events of a server that sheds, in their order, and counts."""

    def __init__(self) -> None:
        self.shed = 0
        self.met_after_all = 0
        """Requests that would have been met."""
        self.late_anyway = 0
        """Requests that would not have been met."""
        self.not_followed = 0
        """Requests that were shed while too many others were followed."""
        self._shadows: list[_Shadow] = []
        self._deadlines_s: dict[str, float] = {}
        """Deadlines of requests whose prefill has not ended."""
        self._due_s: dict[int, float] = {}
        """When live tasks are due."""
        self._running: int | None = None
        self._now_s = -math.inf

    def state(self) -> dict[str, int]:
        """What ``/server_info`` shows."""
        return {
            "shed": self.shed,
            "met_after_all": self.met_after_all,
            "late_anyway": self.late_anyway,
            "not_followed": self.not_followed,
            "followed": len(self._shadows),
        }

    def read(self, event: AnyEvent) -> None:
        """Take in ``event``, which is not earlier than the one before."""
        if isinstance(event, Step):
            self._pass(event.begin_s)  # nobody's prefill runs during a step
            self._now_s = max(self._now_s, event.t_s)
            return
        self._pass(event.t_s)
        if isinstance(event, Arrival):
            self._deadlines_s[event.rid] = event.deadline_s
        elif isinstance(event, Shed):
            self._follow(event)
        elif isinstance(event, Start):
            self._due_s[event.task] = min(
                (self._deadlines_s.get(rid, math.inf) for rid in event.rids), default=math.inf
            )
            self._running = event.task
        elif isinstance(event, Resume):
            self._running = event.task
        elif isinstance(event, Suspend):
            self._running = None
        elif isinstance(event, Complete | Abort | Fail | GiveBack):
            self._end(event)

    def _follow(self, event: Shed) -> None:
        self.shed += 1
        deadline_s = self._deadlines_s.get(event.rid)
        if deadline_s is None or len(self._shadows) >= MOST_FOLLOWED:
            self.not_followed += 1
        else:
            self._shadows.append(_Shadow(deadline_s, event.predicted_s))

    def _end(self, event: Complete | Abort | Fail | GiveBack) -> None:
        if event.task is not UNSET:
            self._due_s.pop(event.task, None)
            if self._running == event.task:
                self._running = None
        if not isinstance(event, GiveBack):
            for rid in event.rids:
                self._deadlines_s.pop(rid, None)

    def _pass(self, now_s: float) -> None:
        """It was until ``now_s`` as it was since the last event."""
        since_s, self._now_s = self._now_s, max(self._now_s, now_s)
        if not self._shadows:
            return
        due_s = math.inf if self._running is None else self._due_s.get(self._running, math.inf)
        for shadow in self._shadows:
            if due_s > shadow.deadline_s or due_s < since_s:
                shadow.lacks_s -= max(0.0, min(now_s, shadow.deadline_s) - since_s)
        met = sum(shadow.lacks_s <= 0.0 for shadow in self._shadows)
        left = [shadow for shadow in self._shadows if shadow.lacks_s > 0.0 and shadow.deadline_s > now_s]
        self.met_after_all += met
        self.late_anyway += len(self._shadows) - met - len(left)
        self._shadows = left
