"""Feasible-set order: the largest set of jobs that can all meet their deadlines (Moore-Hodgson), with room for what
will arrive, kept up to date from event to event."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from heapq import heappop, heappush
from itertools import chain, islice
from operator import attrgetter
from typing import Any, Final, Protocol, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.queues import LOOKS, SlackEdfQueue, StarvationTurns

T = TypeVar("T")

PLANNED: Final = 32
"""Jobs that a plan looks at, those with the earliest deadlines: bounds the cost of an event."""
STARVED, KEPT, STARTED, LEFT_OUT, STARTED_HOPELESS, HOPELESS = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
"""First part of a rank."""

Entry = tuple[float, int, float, Job[Any], Any]
"""Deadline, number, predicted time left, the job, and the queue that it is in."""


class Planned(Protocol):
    """A queue whose jobs a FeasibleSet plans."""

    def feasible(self, now_s: float) -> Iterable[Entry]:
        """The jobs that can meet their deadlines by themselves, by deadline: the first of many."""
        ...


def largest_feasible(by_deadline: Iterable[Entry], now_s: float, forecast: Forecast) -> tuple[list[Entry], float]:
    """What to keep of ``by_deadline``, and a time by which its start can be put off (seconds).

    In order of deadlines, jobs are taken on until one would be late; then the job that takes longest per request is let
    go. Without batches and ``forecast`` what is kept is a largest set of jobs that all finish in time (Moore 1968). The
    work that ``forecast`` expects to be due before a job's deadline is taken off the time until then.
    """
    taken: list[Entry] = []
    longest: list[tuple[float, int, float]] = []
    in_heap = 0
    """Of ``taken``. The others follow when one has to be let go."""
    let_go: set[int] = set()
    end_s, spare_s = now_s, math.inf
    for entry in by_deadline:
        taken.append(entry)
        end_s += entry[2]
        free_until_s = entry[0] - forecast.room_s(entry[0] - now_s)
        if end_s > free_until_s:
            for _, number, remaining_s, job, _ in taken[in_heap:]:
                heappush(longest, (-remaining_s / job.requests, number, remaining_s))
            in_heap = len(taken)
            while longest and end_s > free_until_s:
                _, worst, remaining_s = heappop(longest)
                let_go.add(worst)
                end_s -= remaining_s
        if free_until_s - end_s < spare_s and len(taken) > len(let_go):
            spare_s = free_until_s - end_s
    return [entry for entry in taken if entry[1] not in let_go] if let_go else taken, spare_s


class FeasibleSet:
    """The jobs of several queues that compete for one machine, and which of them to keep.

    S-EDF only drops what is late by itself, and under overload starts jobs that together cannot all be met. Here those
    are ``kept``, in order of deadlines, that can all be met (``largest_feasible``). The others stay with their queues.

    One number tells whether the plan still holds: the latest time at which to start ``kept``, or a bound below it,

        latest start <= deadline - expected work due before it - work of the kept jobs up to it,   for each kept job.

    * While the first job runs, it moves along with the time. The work expected before a deadline only becomes less as
      the deadline comes nearer. So while the plan is followed, it holds, and nothing is planned.
    * A job that comes takes its own work off, or sets it to what its own deadline asks. If it is not past then, the
      plan with this job holds: one more than the most that could be met is the most. If it is, all are planned anew.
    * A job that was let go does not come back while the plan is followed, as a new plan would let it go again, but for
      the work that the forecast no longer expects. All jobs are planned anew when the forecast or the paces change, and
      when nothing is kept any more.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.queues: list[Planned] = []
        self.kept: list[Entry] = []
        self._forecast = forecast
        self._last_arrived = -1
        """Number of the last job that was counted among what arrives."""
        self._now_s = -math.inf
        self._latest_start_s = math.inf
        self._horizon_s = math.inf
        """Jobs with later deadlines wait for the next plan of all: only PLANNED at a time are planned."""
        self._is_old = False
        """The plan: what it goes by has changed."""
        self._some_have_left = False
        """Of ``kept``, since all jobs were planned."""

    def arrived(self, job: Job[Any]) -> None:
        """``job`` waits: count it among what arrives, unless nobody could have met its deadline, or it is put back."""
        if job.number > self._last_arrived and job.latest_start_s >= job.arrival_s:
            self._last_arrived = job.number
            changed = self._forecast.arrived(job.arrival_s, job.remaining_s, job.deadline_s - job.arrival_s)
            self._is_old = self._is_old or changed

    def repaced(self) -> None:
        """Paces of jobs have changed."""
        self._is_old = True

    def add(self, job: Job[Any], queue: Planned) -> None:
        """Keep ``job`` of ``queue``, or leave it out."""
        deadline_s, remaining_s = job.deadline_s, job.remaining_s
        since_s = job.arrival_s if job.arrival_s > self._now_s else self._now_s
        alone_s = deadline_s - self._forecast.room_s(deadline_s - since_s) - remaining_s
        if alone_s < since_s or deadline_s > self._horizon_s:
            return
        place = bisect_left(self.kept, (deadline_s, job.number))
        ahead_s = sum([before[2] for before in self.kept[:place]]) if place else 0.0
        self._latest_start_s = min(self._latest_start_s - remaining_s, alone_s - ahead_s)
        self.kept.insert(place, (deadline_s, job.number, remaining_s, job, queue))
        if len(self.kept) > PLANNED:
            self._horizon_s = self.kept.pop()[0]

    def remove(self, job: Job[Any]) -> None:
        """Take ``job`` out of those kept, if it is there."""
        place = bisect_left(self.kept, (job.deadline_s, job.number))
        if place == len(self.kept) or self.kept[place][3] is not job:
            return
        del self.kept[place]
        self._some_have_left = True
        if not self.kept:
            self._latest_start_s = math.inf
        elif place == 0:
            self._latest_start_s += job.remaining_s

    def first_of(self, queue: Planned) -> Job[Any] | None:
        """The first of the kept jobs of ``queue``."""
        return next((job for _, _, _, job, owner in self.kept if owner is queue), None)

    def kept_of(self, queue: Planned) -> list[Job[Any]]:
        """The kept jobs of ``queue``, in order of deadlines."""
        return [job for _, _, _, job, owner in self.kept if owner is queue]

    def update(self, now_s: float) -> None:
        """Plan again where the plan does not hold any more, or others might fit."""
        self._now_s = now_s
        if self._is_old or now_s > self._latest_start_s or (self._some_have_left and not self.kept):
            self._plan()

    def _plan(self) -> None:
        self._is_old = self._some_have_left = False
        candidates = sorted(chain.from_iterable(queue.feasible(self._now_s) for queue in self.queues))
        self._horizon_s = candidates[PLANNED][0] if len(candidates) > PLANNED else math.inf
        self.kept, spare_s = largest_feasible(candidates[:PLANNED], self._now_s, self._forecast)
        self._latest_start_s = self._now_s + spare_s


class FeasibleRequests(SlackEdfQueue[T]):
    """Waiting requests: those that the set keeps, earliest deadline first, then the others as S-EDF orders them."""

    def __init__(self, feasible: FeasibleSet, max_starvation_s: float, turns: StarvationTurns) -> None:
        super().__init__(max_starvation_s, turns)
        self._set = feasible
        feasible.queues.append(self)

    def add(self, job: Job[T]) -> None:
        self._put(job)
        self._set.arrived(job)
        self._set.add(job, self)

    def remove(self, job: Job[T]) -> None:
        self._take(job)
        self._set.remove(job)

    @property
    def kept(self) -> list[Job[T]]:
        """Jobs of this queue that the set keeps, in order of deadlines."""
        return self._set.kept_of(self)

    def feasible(self, now_s: float) -> list[Entry]:
        found: list[Entry] = []
        for job in islice(self._feasible, PLANNED + LOOKS):
            deadline_s, remaining_s = job.deadline_s, job.work_s * job.pace.factor
            if deadline_s - remaining_s >= now_s:
                found.append((deadline_s, job.number, remaining_s, job, self))
                if len(found) > PLANNED:
                    break
        return found

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._settle(now_s)
        if (starved := next(self._starved(now_s), None)) is not None:
            return (STARVED, starved.arrival_s), starved
        if (kept := self._set.first_of(self)) is not None:
            return (KEPT, kept.deadline_s), kept
        if (feasible := self._first_feasible(now_s)) is not None:
            return (LEFT_OUT, feasible.deadline_s), feasible
        hopeless = self._feasible.first() or self._hopeless.first()
        return None if hopeless is None else ((HOPELESS, hopeless.arrival_s), hopeless)

    def repaced(self) -> None:
        super().repaced()
        self._set.repaced()

    def _settle(self, now_s: float) -> None:
        super()._settle(now_s)
        self._set.update(now_s)

    def _move(self, job: Job[T]) -> None:
        was_hopeless = job.turns_hopeless_s == -math.inf
        super()._move(job)
        if job.turns_hopeless_s == -math.inf:
            self._set.remove(job)
        elif was_hopeless:
            self._set.add(job, self)

    def _ahead(self, now_s: float) -> Iterable[Job[T] | None]:
        return *self._starved(now_s), *self.kept, self._first_feasible(now_s)


class FeasibleTasks(Queue[T]):
    """Tasks: those that the set keeps, earliest deadline first; then the others, the one with least left first, as each
    holds KV cache and a place among the suspended. The hopeless ones wait for every request that can still be met.

    There are as many as may be suspended, and one that runs: each is looked at.
    """

    def __init__(self, feasible: FeasibleSet, max_starvation_s: float, turns: StarvationTurns) -> None:
        self._set = feasible
        feasible.queues.append(self)
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._jobs: list[Job[T]] = []

    def add(self, job: Job[T]) -> None:
        self._jobs.append(job)
        self._set.add(job, self)

    def remove(self, job: Job[T]) -> None:
        self._jobs.remove(job)
        self._set.remove(job)

    @property
    def kept(self) -> list[Job[T]]:
        """Jobs of this queue that the set keeps, in order of deadlines."""
        return self._set.kept_of(self)

    def feasible(self, now_s: float) -> list[Entry]:
        return sorted(
            [
                (job.deadline_s, job.number, job.remaining_s, job, self)
                for job in self._jobs
                if job.latest_start_s >= now_s
            ]
        )

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._set.update(now_s)
        if not self._jobs:
            return None
        rank, _, job = min(self._ranked(now_s))
        return rank, job

    def in_order(self, now_s: float) -> Iterator[Job[T]]:
        self._set.update(now_s)
        return (job for _, _, job in sorted(self._ranked(now_s)))

    def repaced(self) -> None:
        self._set.repaced()

    def _ranked(self, now_s: float) -> Iterator[tuple[Rank, int, Job[T]]]:
        kept, starved = set(self.kept), self._starved(now_s)
        for job in self._jobs:
            if job is starved:
                yield (STARVED, job.arrival_s), job.number, job
            elif job in kept:
                yield (KEPT, job.deadline_s), job.number, job
            else:
                hopeless = job.latest_start_s < now_s
                yield (STARTED_HOPELESS if hopeless else STARTED, job.remaining_s), job.number, job

    def _starved(self, now_s: float) -> Job[T] | None:
        """The oldest hopeless task, if it has waited too long and it is its turn."""
        hopeless = [job for job in self._jobs if job.latest_start_s < now_s]
        oldest = min(hopeless, key=attrgetter("arrival_s", "number"), default=None)
        if oldest is None or oldest.arrival_s + self._max_starvation_s > now_s:
            return None
        return oldest if self._turns.is_turn_of(oldest, now_s) else None

    def __len__(self) -> int:
        return len(self._jobs)
