"""Feasible-set order: at every event, the largest set of jobs that can all meet their deadlines (Moore-Hodgson), with
room for what will arrive."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count, islice
from operator import itemgetter
from typing import Any, Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.queues import JobHeap, StarvationTurns

T = TypeVar("T")

PLANNED: Final = 256
"""Jobs that a plan looks at, those with the earliest deadlines: bounds the cost of an event."""
STARVED, KEPT, STARTED, LEFT_OUT, HOPELESS = 0.0, 1.0, 2.0, 3.0, 4.0
"""First part of a rank."""

Entry = tuple[float, int, Job[Any], "FeasibleSetQueue[Any]"]
"""Deadline, a tie-breaker, the job, and the queue that it is in."""


class FeasibleSet:
    """The jobs of several queues that compete for one machine, and which of them to keep.

    In order of deadlines, jobs are taken on until one would be late; then the job that takes longest per request is let
    go. Without batches and ``forecast`` what is kept is a largest set of jobs that all finish in time if nothing else
    arrives (Moore 1968). S-EDF only drops what is late by itself, and under overload starts jobs that together cannot
    all be met. But more does arrive, some of it more urgent than what waits: the time that ``forecast`` expects that to
    need before a deadline is taken off, so that long jobs are let go before they have cost anything.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.queues: list[FeasibleSetQueue[Any]] = []
        self.forecast = forecast
        self._sequence = count()
        self._by_deadline: list[Entry] = []
        self._entries: dict[int, Entry] = {}
        self._changed = False

    def add(self, job: Job[Any], queue: FeasibleSetQueue[Any]) -> None:
        """Take ``job`` into account, on behalf of ``queue``."""
        entry = (job.deadline_s, next(self._sequence), job, queue)
        self._entries[id(job)] = entry
        insort(self._by_deadline, entry)
        self._changed = True

    def remove(self, job: Job[Any]) -> None:
        """Leave ``job`` out from now on."""
        entry = self._entries.pop(id(job))
        del self._by_deadline[bisect_left(self._by_deadline, entry)]
        self._changed = True

    def update(self, now_s: float) -> None:
        """Choose anew, if any job has come or gone, and tell the queues."""
        if not self._changed:
            return
        self._changed = False
        planned = self._by_deadline[:PLANNED]
        longest: list[tuple[float, int, Job[Any]]] = []
        dropped: set[int] = set()
        end_s = now_s
        for deadline_s, sequence, job, _ in planned:
            heappush(longest, (-job.remaining_s / job.requests, sequence, job))
            end_s += job.remaining_s
            free_until_s = deadline_s - self.forecast.due_s(deadline_s - now_s)
            while longest and end_s > free_until_s:
                _, worst, let_go = heappop(longest)
                end_s -= let_go.remaining_s
                dropped.add(worst)
        for queue in self.queues:
            queue.kept, queue.dropped = [], []
        for _, sequence, job, queue in planned:
            (queue.dropped if sequence in dropped else queue.kept).append(job)

    def unplanned(self, queue: FeasibleSetQueue[T]) -> Iterator[Job[T]]:
        """Jobs of ``queue`` with deadlines later than those that were looked at, earliest first."""
        return (job for _, _, job, owner in islice(self._by_deadline, PLANNED, None) if owner is queue)


class FeasibleSetQueue(Queue[T], Generic[T]):
    """The jobs that the set keeps go first, earliest deadline first. Then, of those that have started, the one with
    least left, whatever its deadline: it holds KV cache and a place among the suspended. Then the requests that can
    still meet their deadline, by deadline, and the hopeless ones, oldest first. A hopeless job that has waited
    ``max_starvation_s`` goes before all, when it is its turn.

    An event costs O(log n) and a plan of PLANNED jobs at most. ``started`` says that the jobs are tasks.
    """

    def __init__(
        self, feasible: FeasibleSet, max_starvation_s: float, turns: StarvationTurns, *, started: bool
    ) -> None:
        self._set = feasible
        feasible.queues.append(self)
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._started = started
        self._turns_hopeless: JobHeap[T] = JobHeap(lambda job: job.deadline_s - job.remaining_s)
        self._hopeless: JobHeap[T] = JobHeap(lambda job: job.arrival_s)
        self.kept: list[Job[T]] = []
        self.dropped: list[Job[T]] = []

    def add(self, job: Job[T]) -> None:
        if not self._started:
            self._set.forecast.arrived(job.arrival_s, job.remaining_s, job.deadline_s - job.arrival_s)
        self._set.add(job, self)
        self._turns_hopeless.add(job)

    def remove(self, job: Job[T]) -> None:
        if job in self._hopeless:
            self._hopeless.remove(job)
        else:
            self._leave_set(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._update(now_s)
        hopeless = self._hopeless.top()
        if hopeless is not None and self._goes_first(hopeless[1], now_s):
            return (STARVED, hopeless[0]), hopeless[1]
        if self.kept:
            return (KEPT, self.kept[0].deadline_s), self.kept[0]
        return next(iter(self._rest(1)), None)

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        self._update(now_s)
        starved = [job for job in self._hopeless.first(most) if self._goes_first(job, now_s)]
        jobs = [*starved, *self.kept[:most]]
        rest = (job for _, job in self._rest(most + len(starved)) if job not in starved)
        return [*jobs, *islice(rest, max(0, most - len(jobs)))][:most]

    def _rest(self, most: int) -> list[tuple[Rank, Job[T]]]:
        """What is not kept, in order: all tasks, or the first ``most`` requests of each kind."""
        if self._started:
            tasks = [*self._turns_hopeless.first(len(self)), *self._hopeless.first(len(self))]
            rest = [((STARTED, job.remaining_s), job) for job in tasks if job not in self.kept]
            return sorted(rest, key=itemgetter(0))
        left_out = [*self.dropped[:most], *islice(self._set.unplanned(self), max(0, most - len(self.dropped)))]
        return [
            *(((LEFT_OUT, job.deadline_s), job) for job in left_out),
            *(((HOPELESS, job.arrival_s), job) for job in self._hopeless.first(most)),
        ]

    def _goes_first(self, hopeless: Job[T], now_s: float) -> bool:
        starved = hopeless.arrival_s + self._max_starvation_s <= now_s
        return starved and self._turns.is_turn_of(hopeless, now_s)

    def _update(self, now_s: float) -> None:
        while (top := self._turns_hopeless.top()) is not None and top[0] < now_s:
            self._leave_set(top[1])
            self._hopeless.add(top[1])
        self._set.update(now_s)

    def _leave_set(self, job: Job[T]) -> None:
        self._turns_hopeless.remove(job)
        self._set.remove(job)

    def __len__(self) -> int:
        return len(self._turns_hopeless) + len(self._hopeless)
