"""What became of each request: put together from the events of a server, one after the other, while it serves or later.

An event costs the same however many requests there are, and what is kept is of requests whose outcome is not known yet.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from msgspec import UNSET, Struct

from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Fail,
    GiveBack,
    Leave,
    Log,
    Ready,
    Resume,
    Start,
    Suspend,
)
from sgl_flowprefill.misses import Cause, Course, Verdict, is_clients_mistake, judge

RECENT_OVERRUNS: Final = 64
"""Prefills that took longer than predicted and may have ended between the time when a request could be run and the
scheduler's reading of it."""
NONE_ENDED: Final[Sequence[Outcome]] = ()


class Outcome(Struct, frozen=True):
    """What became of a request. Times are seconds of the clock of its events."""

    arrival: Arrival
    course: Course
    verdict: Verdict
    slack_at_admission_s: float | None
    """Time until its deadline when it could first be run, less what its prefill was predicted to take; None for a
    request that could never be run."""
    suspensions: int
    suspended_s: float
    blocked_s: float
    """How long it was blocked: from when it could be known that it had to run to when it ran in another's place."""
    reason: str | None
    """Why it failed; None for one that did not."""

    @property
    def rid(self) -> str:
        return self.arrival.rid

    @property
    def met(self) -> bool | None:
        """Whether it met its objective; None for one that was aborted before it was due, or that was not valid."""
        return self.verdict.met

    @property
    def cause(self) -> Cause | None:
        """Why it missed its objective, or has none to miss."""
        return self.verdict.cause

    @property
    def ttft_s(self) -> float | None:
        """From its receipt until its first token was where the client is answered from; None without a first token."""
        first_token_s = self.course.first_token_s
        return None if first_token_s is None else first_token_s - self.course.received_s

    @property
    def predicted_s(self) -> float | None:
        """How long its prefill was predicted to take by itself, with margin."""
        return self.course.alone_s

    @property
    def waited_s(self) -> float | None:
        """From when it could be run until its prefill began; None for one whose prefill did not begin."""
        course = self.course
        if course.started_s is None or course.ready_s is None:
            return None
        return max(0.0, course.started_s - course.ready_s)


@dataclass(slots=True, eq=False)
class _Task:
    """A prefill that is under way, or that a request refers to."""

    start: Start
    suspensions: int = 0
    suspended_s: float = 0.0
    suspended_since_s: float | None = None
    forward_s: float | None = None
    """How long it ran; None until it is over."""

    def go_on(self, t_s: float) -> None:
        """It runs again, or has ended."""
        if self.suspended_since_s is not None:
            self.suspended_s += max(0.0, t_s - self.suspended_since_s)
            self.suspended_since_s = None


@dataclass(slots=True, eq=False)
class _Request:
    """A request whose outcome is not known yet."""

    arrival: Arrival
    decodes: bool
    """Whether its server decodes."""
    ready_s: float | None = None
    admitted_s: float | None = None
    """When the scheduler first knew that it could be run."""
    alone_s: float | None = None
    overrun_before_s: float = 0.0
    """By how much all prefills that ended before ``ready_s`` took longer than predicted."""
    tasks: list[_Task] = field(default_factory=list)
    blocked_s: float = 0.0
    computed_s: float | None = None
    overrun_s: float = 0.0


class Outcomes:
    """Reads the events of a server in their order, and says of each request what became of it once this is known: when
    its first token is where the client is answered from, or when it ends without.
    """

    def __init__(self, decodes: bool) -> None:
        """``decodes``: the first token is there when the prefill is over, on a server that decodes; otherwise when the
        KV cache has been sent. A line that says that a server begins says it anew.
        """
        self._decodes = decodes
        self._open: dict[str, _Request] = {}
        self._live: dict[int, _Task] = {}
        self._overrun_s = 0.0
        """By how much all prefills so far took longer than predicted."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT_OVERRUNS)
        """When the last of these prefills ended, and ``_overrun_s`` before it."""
        self._readers: dict[type, Callable[[Any], Sequence[Outcome]]] = {
            Log: self._begin,
            Arrival: self._arrival,
            Ready: self._ready,
            Start: self._start,
            Suspend: self._suspend,
            Resume: self._resume,
            Complete: self._complete,
            GiveBack: self._give_back,
            Leave: self._leave,
            Abort: self._end,
            Fail: self._end,
        }

    def __len__(self) -> int:
        """Requests whose outcome is not known yet."""
        return len(self._open)

    def read(self, event: AnyEvent) -> Sequence[Outcome]:
        """The outcomes that are known by ``event``."""
        reader = self._readers.get(type(event))
        return NONE_ENDED if reader is None else reader(event)

    def course(self, rid: str, now_s: float) -> Course | None:
        """The course until ``now_s`` of a request whose outcome is not known yet; None for any other."""
        request = self._open.get(rid)
        return None if request is None else self._course(request, now_s)

    def if_late(self, rid: str) -> Outcome | None:
        """What becomes of a request whose prefill has run and whose first token is not there yet, if that comes too
        late; None for any other.
        """
        request = self._open.get(rid)
        if request is None or request.computed_s is None:
            return None
        return self._outcome(request, request.computed_s, first_token_s=math.inf)

    # ---- requests that wait -----------------------------------------------------------------------------------------

    def _begin(self, event: Log) -> Sequence[Outcome]:
        """The server was started again, and nothing of before is left."""
        self._decodes = event.decodes
        self._live.clear()
        return NONE_ENDED

    def _arrival(self, event: Arrival) -> Sequence[Outcome]:
        self._open[event.rid] = _Request(event, self._decodes)
        return NONE_ENDED

    def _ready(self, event: Ready) -> Sequence[Outcome]:
        request = self._open.get(event.rid)
        if request is not None and request.alone_s is None:
            request.ready_s, request.admitted_s = event.readable_s, event.t_s
            request.alone_s = event.predicted_s
            request.overrun_before_s = self._overrun_until_s(event.readable_s)
        return NONE_ENDED

    # ---- tasks ------------------------------------------------------------------------------------------------------

    def _start(self, event: Start) -> Sequence[Outcome]:
        task = self._live[event.task] = _Task(event)
        for rid in event.rids:
            if (request := self._open.get(rid)) is not None:
                request.tasks.append(task)
                if request.alone_s is None:
                    request.alone_s = event.predicted_s
        return NONE_ENDED

    def _suspend(self, event: Suspend) -> Sequence[Outcome]:
        task = self._live.get(event.task)
        if task is not None:
            task.suspensions += 1
            task.suspended_since_s = min(event.stopped_s, event.t_s)
        if event.blocking_s is not None:
            for rid in event.for_rids:
                if (request := self._open.get(rid)) is not None:
                    request.blocked_s += event.blocking_s
        return NONE_ENDED

    def _resume(self, event: Resume) -> Sequence[Outcome]:
        task = self._live.get(event.task)
        if task is not None:
            task.go_on(event.t_s)
        return NONE_ENDED

    def _give_back(self, event: GiveBack) -> Sequence[Outcome]:
        self._close(event.task, event.t_s)
        return NONE_ENDED

    def _close(self, number: int, t_s: float) -> _Task | None:
        task = self._live.pop(number, None)
        if task is not None:
            task.go_on(t_s)
        return task

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _complete(self, event: Complete) -> Sequence[Outcome]:
        task = self._close(event.task, event.t_s)
        if task is not None:
            task.forward_s = event.forward_s
            overrun_s = event.forward_s - task.start.predicted_s
            if overrun_s > 0:
                self._recent.append((event.t_s, self._overrun_s))
                self._overrun_s += overrun_s
        outcomes = []
        for rid in event.rids:
            request = self._open.get(rid)
            if request is not None:
                request.computed_s = event.t_s
                request.overrun_s = self._overrun_since_ready_s(request, event.t_s)
                if request.decodes:
                    del self._open[rid]
                    outcomes.append(self._outcome(request, event.t_s, first_token_s=event.t_s))
        return outcomes

    def _leave(self, event: Leave) -> Sequence[Outcome]:
        request = self._open.pop(event.rid, None)
        if request is None:
            return NONE_ENDED
        if event.reason is UNSET:
            return [self._outcome(request, event.t_s, first_token_s=event.t_s)]
        if event.aborted:
            return [self._outcome(request, event.t_s)]
        return [self._outcome(request, event.t_s, failed=True, reason=event.reason)]

    def _end(self, event: Abort | Fail) -> Sequence[Outcome]:
        if event.task is not UNSET:
            self._close(event.task, event.t_s)
        failed = isinstance(event, Fail)
        invalid = isinstance(event, Fail) and is_clients_mistake(event.http_status)
        reason = event.reason if isinstance(event, Fail) else None
        return [
            self._outcome(self._open.pop(rid), event.t_s, failed=failed, invalid=invalid, reason=reason)
            for rid in event.rids
            if rid in self._open
        ]

    # ---- what is made of it -----------------------------------------------------------------------------------------

    def _outcome(
        self,
        request: _Request,
        ended_s: float,
        first_token_s: float | None = None,
        failed: bool = False,
        invalid: bool = False,
        reason: str | None = None,
    ) -> Outcome:
        arrival, tasks = request.arrival, request.tasks
        without_s = None if first_token_s is not None else ended_s
        course = self._course(request, ended_s, first_token_s, without_s, failed, invalid)
        slack_s = None
        if request.admitted_s is not None and request.alone_s is not None:
            slack_s = arrival.deadline_s - request.admitted_s - request.alone_s
        suspensions, suspended_s = 0, 0.0
        for task in tasks:
            suspensions += task.suspensions
            suspended_s += task.suspended_s
        verdict = judge(course, ended_s)
        return Outcome(arrival, course, verdict, slack_s, suspensions, suspended_s, request.blocked_s, reason)

    def _course(
        self,
        request: _Request,
        now_s: float,
        first_token_s: float | None = None,
        ended_s: float | None = None,
        failed: bool = False,
        invalid: bool = False,
    ) -> Course:
        arrival, tasks = request.arrival, request.tasks
        overrun_s = request.overrun_s
        if request.computed_s is None:
            overrun_s = self._overrun_since_ready_s(request, now_s)
        took_s = None
        if len(tasks) == 1 and len(tasks[0].start.rids) == 1:
            took_s = tasks[0].forward_s
        return Course(
            received_s=arrival.received_s,
            deadline_s=arrival.deadline_s,
            arrived_s=arrival.t_s,
            ready_s=request.ready_s,
            started_s=tasks[0].start.t_s if tasks else None,
            alone_s=request.alone_s,
            took_s=took_s,
            computed_s=request.computed_s,
            first_token_s=first_token_s,
            overrun_s=overrun_s,
            ended_s=ended_s,
            failed=failed,
            invalid=invalid,
        )

    def _overrun_since_ready_s(self, request: _Request, now_s: float) -> float:
        return 0.0 if request.ready_s is None else self._overrun_until_s(now_s) - request.overrun_before_s

    def _overrun_until_s(self, t_s: float) -> float:
        """By how much the prefills that ended until ``t_s``, which is a short time ago at most, took longer than
        predicted.
        """
        overrun_s = self._overrun_s
        for ended_s, before_s in reversed(self._recent):
            if ended_s <= t_s:
                break
            overrun_s = before_s
        return overrun_s
