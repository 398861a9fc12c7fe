"""What happened on a server, put together from its event log: the course of each request and of each task, or, of a
decode server, of each request.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, islice
from operator import itemgetter
from typing import Final, NamedTuple

from msgspec import UNSET

from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Decoded,
    Fail,
    GiveBack,
    Leave,
    Log,
    Points,
    Ready,
    Resume,
    Shed,
    Start,
    Step,
    Suspend,
)
from sgl_flowprefill.misses import Course, Verdict, judge
from sgl_flowprefill.outcomes import Outcomes

RUNNING: Final = "running"
SUSPENDED: Final = "suspended"
BESIDE_STEP: Final = "decode step"
"""What a task does: a decode step leaves it where it is."""

ON_THE_WAY: Final = "on the way to the scheduler"
WITHOUT_PLACE: Final = "waiting for the decode server"
NOT_READY: Final = "not ready"
WAITING: Final = "waiting"
SENDING: Final = "KV cache is sent"
FOR_PLACE: Final = "waiting for a place"
FOR_KV: Final = "waiting for its KV cache"
DECODING: Final = "decoding"
"""What a request does, besides what its task does."""


class Part(NamedTuple):
    """A stretch of time of a task or of a request."""

    what: str
    begin_s: float
    end_s: float
    event: Suspend | None = None
    """What began it, for a suspension."""


@dataclass(eq=False)
class Task:
    """A prefill of one request or of several."""

    start: Start
    parts: list[Part] = field(default_factory=list)
    """In order; where two do not touch, its result was on the way from the device."""
    points: list[tuple[float, str]] = field(default_factory=list)
    """The interruption points that it passed, in order: when, and the module that each follows; an empty name for a
    tile of the module that is named next. Empty where nobody asked for them."""
    end: Complete | Abort | Fail | GiveBack | None = None
    """None for one that was under way when the log ended, or its server."""
    end_s: float = 0.0

    @property
    def ran_s(self) -> float:
        return sum(part.end_s - part.begin_s for part in self.parts if part.what == RUNNING)

    @property
    def suspensions(self) -> int:
        return sum(part.what == SUSPENDED for part in self.parts)

    def modules(self, part: Part) -> Iterator[tuple[str, list[float]]]:
        """The modules that ran in a ``part`` of the task, and when each of their tiles was over, the whole last. One
        that was suspended between two tiles is in two parts.
        """
        first, behind = (bisect_right(self.points, at_s, key=itemgetter(0)) for at_s in (part.begin_s, part.end_s))
        ends_s: list[float] = []
        for at_s, name in self.points[first:behind]:
            ends_s.append(at_s)
            if name:
                yield name, ends_s
                ends_s = []
        if ends_s:  # of a module that ends behind the part, or never
            cut = next((name for _, name in islice(self.points, behind, None) if name), None)
            if cut is not None:
                yield cut, ends_s


@dataclass(eq=False)
class Request:
    """A request, from its arrival to its end."""

    arrival: Arrival
    decodes: bool
    """Whether its server decodes as well as it prefills."""
    ready: Ready | None = None
    tasks: list[Task] = field(default_factory=list)
    """Several where the first ones gave back their KV cache, or where it was computed again: it was a stream that was
    retracted."""
    leave: Leave | None = None
    end: Abort | Fail | None = None
    course: Course = field(init=False)
    """When what happened to it, by the end of the log."""
    verdict: Verdict = field(default=Verdict(None))
    others_s: float = 0.0
    """How long other prefills ran between the time when it could be run and its end."""
    steps_s: float = 0.0
    """How long decode steps ran in this time."""
    parts: list[Part] = field(default_factory=list)
    """What it did, in order."""
    lost_s: float | None = None
    """When its server was started again, without it."""

    @property
    def rid(self) -> str:
        return self.arrival.rid

    @property
    def end_s(self) -> float:
        """Until when something is known of it."""
        return self.parts[-1].end_s if self.parts else self.arrival.t_s

    @property
    def first_token_s(self) -> float | None:
        """When its first token was where the client is answered from."""
        return self.course.first_token_s

    @property
    def suspensions(self) -> int:
        """How often its prefill was suspended, as its answer says it: none of them as a stream."""
        return sum(part.what == SUSPENDED for part in self.parts)

    @property
    def late_s(self) -> float | None:
        """How long after its deadline its first token came; negative for one that was in time."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival.deadline_s


@dataclass(frozen=True, eq=False)
class DecodedRequest:
    """A request at a decode server."""

    event: Decoded

    @cached_property
    def parts(self) -> Sequence[Part]:
        """What it did, in order."""
        event = self.event
        turns = (
            (ON_THE_WAY, event.received_s),
            (FOR_PLACE, event.queued_s),
            (FOR_KV, event.place_s),
            (WAITING, event.kv_s),
            (DECODING, event.first_token_s),
        )
        begins = [(what, at_s) for what, at_s in turns if at_s is not None]
        ends_s = [*(at_s for _, at_s in begins[1:]), event.t_s]
        return [
            Part(what, begin_s, end_s) for (what, begin_s), end_s in zip(begins, ends_s, strict=True) if end_s > begin_s
        ]


@dataclass(eq=False)
class Preemption:
    """A running task waits for another, because of news."""

    suspend: Suspend
    loser: Task
    winner: Request | None
    """The request that wins: of a batch, the one that could be run last. None for a health check."""
    winner_task: Task | None = None


@dataclass(frozen=True)
class History:
    """What happened on a server."""

    requests: Sequence[Request]
    """In the order of their arrivals."""
    tasks: Sequence[Task]
    """In the order of their starts."""
    steps: Sequence[Step]
    preemptions: Sequence[Preemption]
    end_s: float
    """The last event of the log."""
    decoded: Sequence[DecodedRequest] = ()
    """Those of a decode server, in the order of their ends."""
    boot: str = ""
    """The machine whose clock the times are by; empty where the log does not say."""

    @classmethod
    def of(cls, events: Iterable[AnyEvent]) -> History:
        """The history that a log tells, whose ``events`` are in order. Where its first line is missing, a server that
        tells of decode steps is taken for one that decodes, and any other for a prefill server.
        """
        told = list(events)
        has_steps = any(isinstance(event, Step) for event in told)
        reader = _Reader(next((event.decodes for event in told if isinstance(event, Log)), has_steps))
        for event in told:
            reader.read(event)
        return reader.history()

    def since(self, time_s: float) -> History:
        """What was under way at ``time_s`` or came later, each request and task as a whole."""
        return History(
            [request for request in self.requests if request.end_s >= time_s],
            [task for task in self.tasks if task.end_s >= time_s],
            [step for step in self.steps if step.t_s >= time_s],
            [preemption for preemption in self.preemptions if preemption.suspend.t_s >= time_s],
            self.end_s,
            [one for one in self.decoded if one.event.t_s >= time_s],
            self.boot,
        )


class _Reader:
    """Follows a log event by event."""

    def __init__(self, decodes: bool) -> None:
        """Whether the server of the log ``decodes``, until a line of it says what server begins."""
        self._decodes = decodes
        self._outcomes = Outcomes(decodes)
        self._courses: dict[Request, Course] = {}
        """The courses that are known by now."""
        self._requests: list[Request] = []
        self._tasks: list[Task] = []
        self._steps: list[Step] = []
        self._preemptions: list[Preemption] = []
        self._decoded: list[DecodedRequest] = []
        self._boot = ""
        self._open: dict[str, Request] = {}
        """The requests that have not left, by rid."""
        self._live: dict[int, Task] = {}
        self._running: Task | None = None
        self._doing: dict[Task, tuple[str, float, Suspend | None]] = {}
        """What each live task does, since when, and what began it."""
        self._now_s = 0.0

    def read(self, event: AnyEvent) -> None:
        self._now_s = event.t_s
        if isinstance(event, Arrival) and (before := self._open.get(event.rid)) is not None:
            self._note_course(before)
        for outcome in self._outcomes.read(event):
            if (ended := self._open.get(outcome.rid)) is not None:
                self._courses[ended] = outcome.course
        if isinstance(event, Log):
            self._begin(event)
        elif isinstance(event, Arrival):
            self._requests.append(Request(event, self._decodes))
            self._open[event.rid] = self._requests[-1]
        elif isinstance(event, Ready):
            if (request := self._open.get(event.rid)) and request.ready is None:
                request.ready = event
        elif isinstance(event, Start):
            self._start(event)
        elif isinstance(event, Suspend):
            self._suspend(event)
        elif isinstance(event, Points):
            if (task := self._live.get(event.task)) is not None:
                task.points += zip(event.passed_s, event.after, strict=True)
        elif isinstance(event, Resume):
            self._run(event.task)
        elif isinstance(event, Step):
            self._step(event)
        elif isinstance(event, Leave):
            if event.rid in self._open:
                self._open.pop(event.rid).leave = event
        elif isinstance(event, Decoded):
            self._decoded.append(DecodedRequest(event))
        elif not isinstance(event, Shed):  # its end follows
            self._end(event)

    def history(self) -> History:
        """What the events tell that were read so far."""
        for task in list(self._live.values()):
            self._close(task, None)
        self._judge()
        return History(
            self._requests, self._tasks, self._steps, self._preemptions, self._now_s, self._decoded, self._boot
        )

    # ---- tasks ----------------------------------------------------------------------------------------------------

    def _start(self, event: Start) -> None:
        task = self._live[event.task] = Task(event)
        self._tasks.append(task)
        for rid in event.rids:
            if request := self._open.get(rid):
                request.tasks.append(task)
        self._run(event.task)

    def _begin(self, event: Log) -> None:
        """The server was started again, and nothing of before is left."""
        self._decodes, self._boot = event.decodes, event.boot
        for task in list(self._live.values()):
            self._close(task, None)
        for request in self._open.values():
            request.lost_s = self._now_s
            self._note_course(request)
        self._open.clear()

    def _run(self, number: int) -> None:
        """The task runs from now on. One that ran until now without being suspended is done: its result is on its way
        from the device."""
        if self._running is not None and self._running is not self._live.get(number):
            self._cut(self._running, self._now_s)
        self._turn(number, RUNNING, self._now_s)
        self._running = self._live.get(number)
        if self._preemptions and self._preemptions[-1].suspend.t_s == self._now_s:
            self._preemptions[-1].winner_task = self._running

    def _suspend(self, event: Suspend) -> None:
        self._turn(event.task, SUSPENDED, min(event.stopped_s, event.t_s), event)
        self._running = None
        loser = self._live.get(event.task)
        if loser is not None and event.readable_s is not None:
            winners = [self._open[rid] for rid in event.for_rids if rid in self._open]
            winner = max(winners, key=lambda one: one.ready.readable_s if one.ready else one.arrival.t_s, default=None)
            self._preemptions.append(Preemption(event, loser, winner))

    def _turn(self, number: int, what: str, at_s: float, event: Suspend | None = None) -> None:
        task = self._live.get(number)
        if task is not None:
            self._cut(task, at_s)
            self._doing[task] = what, at_s, event

    def _cut(self, task: Task, at_s: float) -> None:
        """What the task does ends."""
        if task in self._doing:
            what, since_s, event = self._doing.pop(task)
            if at_s > since_s:
                task.parts.append(Part(what, since_s, at_s, event))

    def _step(self, event: Step) -> None:
        self._steps.append(event)
        task = self._running
        if task is not None and task in self._doing:
            begin_s = max(event.begin_s, self._doing[task][1])
            self._cut(task, begin_s)
            if event.t_s > begin_s:
                task.parts.append(Part(BESIDE_STEP, begin_s, event.t_s))
            self._doing[task] = RUNNING, event.t_s, None

    def _close(self, task: Task, end: Complete | Abort | Fail | GiveBack | None) -> None:
        self._cut(task, self._now_s)
        task.end, task.end_s = end, self._now_s
        del self._live[task.start.task]
        if self._running is task:
            self._running = None

    # ---- requests -------------------------------------------------------------------------------------------------

    def _end(self, event: Complete | Abort | Fail | GiveBack) -> None:
        task = None if event.task is UNSET else self._live.get(event.task)
        if task is not None:
            self._close(task, event)
        if isinstance(event, Abort | Fail):
            for rid in event.rids:
                if rid in self._open:
                    self._open.pop(rid).end = event

    def _judge(self) -> None:
        """Say of each request what it did, and whether it met its objective."""
        ran = _Busy((part.begin_s, part.end_s) for task in self._tasks for part in task.parts if part.what == RUNNING)
        stepped = _Busy((step.begin_s, step.t_s) for step in self._steps)
        for request in self._requests:
            self._note_course(request)
            course, leave = self._courses[request], request.leave
            request.course = course
            ready_s, computed_s = course.ready_s, course.computed_s
            request.verdict = judge(course, self._now_s)
            if ready_s is not None:
                until_s = _first(computed_s, course.ended_s, self._now_s)
                own_s = sum(task.ran_s for task in request.tasks if task.start.t_s < until_s)  # none of it as a stream
                request.others_s = max(0.0, ran.between(ready_s, until_s) - own_s)
                request.steps_s = stepped.between(ready_s, until_s)
            request.parts = list(_parts(request, ready_s, self._now_s, NOT_READY if request.decodes else WITHOUT_PLACE))
            if computed_s is not None:
                left_s = _first(None if leave is None else leave.t_s, request.lost_s, self._now_s)
                request.parts += _stretch(DECODING if request.decodes else SENDING, computed_s, left_s)

    def _note_course(self, request: Request) -> None:
        """The course of ``request`` is what is known by now, where its outcome is not."""
        if request not in self._courses and (course := self._outcomes.course(request.rid, self._now_s)) is not None:
            self._courses[request] = course


class _Busy:
    """The time that went by in stretches that do not overlap."""

    def __init__(self, stretches_s: Iterable[tuple[float, float]]) -> None:
        ordered = sorted(stretches_s)
        self._begins_s = [begin_s for begin_s, _ in ordered]
        self._ends_s = [end_s for _, end_s in ordered]
        self._sums_s = [0.0, *accumulate(end_s - begin_s for begin_s, end_s in ordered)]

    def between(self, begin_s: float, end_s: float) -> float:
        return self._until(end_s) - self._until(begin_s)

    def _until(self, time_s: float) -> float:
        begun = bisect_right(self._begins_s, time_s)
        return self._sums_s[begun] - (max(0.0, self._ends_s[begun - 1] - time_s) if begun else 0.0)


def _parts(request: Request, ready_s: float | None, last_s: float, not_ready: str) -> Iterator[Part]:
    """What a request did until its prefill was over; ``not_ready`` is what it did before it could be run."""
    arrived_s = request.arrival.t_s
    end_s = _first(request.course.computed_s, None if request.end is None else request.end.t_s, request.lost_s, last_s)
    yield from _stretch(ON_THE_WAY, request.arrival.received_s, arrived_s)
    since_s = end_s if ready_s is None else min(end_s, max(arrived_s, ready_s))
    yield from _stretch(not_ready, arrived_s, since_s)
    for task in request.tasks:
        yield from _stretch(WAITING, since_s, min(end_s, task.start.t_s))
        for part in task.parts:
            yield from _stretch(part.what, part.begin_s, min(end_s, part.end_s))
        since_s = min(end_s, task.end_s)
    yield from _stretch(WAITING, since_s, end_s)


def _stretch(what: str, begin_s: float, end_s: float) -> Iterator[Part]:
    if end_s > begin_s:
        yield Part(what, begin_s, end_s)


def _first(*times_s: float | None) -> float:
    """The first time that is known."""
    return next(time_s for time_s in times_s if time_s is not None)
