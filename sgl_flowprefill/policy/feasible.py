"""Feasible-set order: the largest set of jobs that can all meet their deadlines (Moore-Hodgson), with room for what
will arrive, kept up to date from event to event."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable
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


def largest_feasible(by_deadline: Iterable[Entry], now_s: float, forecast: Forecast) -> tuple[list[Entry], float]:
    """What to keep of ``by_deadline``, and a time by which its start can be put off (seconds).

    In order of deadlines, jobs are taken on until one would be late; then the job that takes longest per request is let
    go. Without batches and ``forecast`` what is kept is a largest set of jobs that all finish in time (Moore 1968). The
    work that ``forecast`` expects to be due before a job's deadline is taken off the time until then.
    """
    taken: list[Entry] = []
    longest: list[tuple[float, int, float]] = []
    let_go: set[int] = set()
    end_s, spare_s = now_s, math.inf
    for entry in by_deadline:
        deadline_s, number, job, _ = entry
        taken.append(entry)
        heappush(longest, (-job.remaining_s / job.requests, number, job.remaining_s))
        end_s += job.remaining_s
        free_until_s = deadline_s - forecast.due_s(deadline_s - now_s)
        while longest and end_s > free_until_s:
            _, worst, remaining_s = heappop(longest)
            let_go.add(worst)
            end_s -= remaining_s
        if longest and free_until_s - end_s < spare_s:
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
      plan with this job holds: one more than the most that could be met is the most. If it is, ``kept`` is planned
      anew, which lets one job go where jobs are not batches. Rarely, a shorter one that was let go before would fit in
      its place; it is not looked at until all are planned anew.
    * A job that was let go does not come back while the plan is followed, as a new plan of all would let it go again,
      but for the work that the forecast no longer expects. All jobs are planned anew when the forecast changes, and
      when nothing is kept any more.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.queues: list[FeasibleSetQueue[Any]] = []
        self.kept: list[Entry] = []
        self.numbers = count()
        """Tie-breakers of entries."""
        self._forecast = forecast
        self._now_s = -math.inf
        self._latest_start_s = math.inf
        self._horizon_s = math.inf
        """Jobs with later deadlines wait for the next plan of all: only PLANNED at a time are planned."""
        self._forecast_changed = False
        self._some_have_left = False
        """Of ``kept``, since all jobs were planned."""

    def arrived(self, job: Job[Any]) -> None:
        """``job`` is new: count it among what arrives."""
        if self._forecast.arrived(job.arrival_s, job.remaining_s, job.deadline_s - job.arrival_s):
            self._forecast_changed = True

    def add(self, entry: Entry) -> None:
        """Keep the job of ``entry`` or leave it to its queue."""
        deadline_s, _, job, queue = entry
        since_s = job.arrival_s if job.arrival_s > self._now_s else self._now_s
        alone_s = deadline_s - self._forecast.due_s(deadline_s - since_s) - job.remaining_s
        if alone_s < since_s or deadline_s > self._horizon_s:
            queue.leave_out(entry)
            return
        place = bisect_left(self.kept, entry)
        ahead_s = sum([before[2].remaining_s for before in self.kept[:place]]) if place else 0.0
        self._latest_start_s = min(self._latest_start_s - job.remaining_s, alone_s - ahead_s)
        self.kept.insert(place, entry)
        if len(self.kept) > PLANNED:
            last = self.kept.pop()
            self._horizon_s = last[0]
            last[3].leave_out(last)

    def remove(self, entry: Entry) -> bool:
        """Take ``entry`` out of those kept, if it is there."""
        place = bisect_left(self.kept, entry)
        if self.kept[place : place + 1] != [entry]:
            return False
        del self.kept[place]
        self._some_have_left = True
        if not self.kept:
            self._latest_start_s = math.inf
        elif place == 0:
            self._latest_start_s += entry[2].remaining_s
        return True

    def update(self, now_s: float) -> None:
        """Plan again where the plan does not hold any more, or others might fit."""
        self._now_s = now_s
        if self._forecast_changed or (self._some_have_left and not self.kept):
            self._plan_all()
        elif now_s > self._latest_start_s:
            self._plan(self.kept)

    def _plan_all(self) -> None:
        self._forecast_changed = self._some_have_left = False
        left_out = [entry for queue in self.queues for entry in queue.left_out[: PLANNED + 1]]
        candidates = sorted(self.kept + left_out)
        self._horizon_s = candidates[PLANNED][0] if len(candidates) > PLANNED else math.inf
        self._plan(candidates[:PLANNED])
        numbers = {number for _, number, _, _ in self.kept}
        for entry in left_out:
            if entry[1] in numbers:
                entry[3].take_back(entry)

    def _plan(self, candidates: list[Entry]) -> None:
        before = self.kept
        self.kept, spare_s = largest_feasible(candidates, self._now_s, self._forecast)
        self._latest_start_s = self._now_s + spare_s
        numbers = {number for _, number, _, _ in self.kept}
        for entry in before:
            if entry[1] not in numbers:
                entry[3].leave_out(entry)


class FeasibleSetQueue(Queue[T], Generic[T]):
    """The jobs that the set keeps go first, earliest deadline first. Then, of those that have started, the one with
    least left, whatever its deadline: it holds KV cache and a place among the suspended. Then the requests that can
    still meet their deadline, by deadline, and the hopeless ones, oldest first. A hopeless job that has waited
    ``max_starvation_s`` goes before all, when it is its turn.

    ``started`` says that the jobs are tasks. An event that goes by the plan costs O(log n), and a sum over the kept
    jobs that a new one goes behind. A plan looks at PLANNED jobs at most.
    """

    def __init__(
        self, feasible: FeasibleSet, max_starvation_s: float, turns: StarvationTurns, *, started: bool
    ) -> None:
        self._set = feasible
        feasible.queues.append(self)
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._started = started
        self._entries: dict[int, Entry] = {}
        self.left_out: list[Entry] = []
        """In order of deadlines."""
        self._turns_hopeless: JobHeap[T] = JobHeap(lambda job: job.deadline_s - job.remaining_s)
        """Those left out."""
        self._hopeless: JobHeap[T] = JobHeap(lambda job: job.arrival_s)

    @property
    def kept(self) -> list[Job[T]]:
        """Jobs of this queue that the set keeps, in order of deadlines."""
        return [job for _, _, job, queue in self._set.kept if queue is self]

    def add(self, job: Job[T]) -> None:
        if not self._started:
            self._set.arrived(job)
        entry = self._entries[id(job)] = (job.deadline_s, next(self._set.numbers), job, self)
        self._set.add(entry)

    def remove(self, job: Job[T]) -> None:
        entry = self._entries.pop(id(job))
        if self._set.remove(entry):
            return
        if job in self._hopeless:
            self._hopeless.remove(job)
        else:
            self.take_back(entry)

    def leave_out(self, entry: Entry) -> None:
        """The set does not keep ``entry`` for now."""
        insort(self.left_out, entry)
        self._turns_hopeless.add(entry[2])

    def take_back(self, entry: Entry) -> None:
        """``entry`` is left out no more."""
        del self.left_out[bisect_left(self.left_out, entry)]
        self._turns_hopeless.remove(entry[2])

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._update(now_s)
        if not self._entries:
            return None
        hopeless = self._hopeless.top()
        if hopeless is not None and self._goes_first(hopeless[1], now_s):
            return (STARVED, hopeless[0]), hopeless[1]
        for deadline_s, _, job, queue in self._set.kept:
            if queue is self:
                return (KEPT, deadline_s), job
        return next(iter(self._rest(1)), None)

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        self._update(now_s)
        starved = [job for job in self._hopeless.first(1) if self._goes_first(job, now_s)]
        jobs = [*starved, *self.kept]
        rest = (job for _, job in self._rest(most + len(starved)) if job not in starved)
        return [*jobs, *islice(rest, max(0, most - len(jobs)))][:most]

    def _rest(self, most: int) -> list[tuple[Rank, Job[T]]]:
        """What is not kept, in order: all tasks, or the first ``most`` requests of each kind."""
        if self._started:
            tasks = [*self._turns_hopeless.first(len(self)), *self._hopeless.first(len(self))]
            return sorted((((STARTED, job.remaining_s), job) for job in tasks), key=itemgetter(0))
        return [
            *(((LEFT_OUT, deadline_s), job) for deadline_s, _, job, _ in self.left_out[:most]),
            *(((HOPELESS, job.arrival_s), job) for job in self._hopeless.first(most)),
        ]

    def _goes_first(self, hopeless: Job[T], now_s: float) -> bool:
        starved = hopeless.arrival_s + self._max_starvation_s <= now_s
        return starved and self._turns.is_turn_of(hopeless, now_s)

    def _update(self, now_s: float) -> None:
        self._set.update(now_s)
        while (top := self._turns_hopeless.top()) is not None and top[0] < now_s:
            self.take_back(self._entries[id(top[1])])
            self._hopeless.add(top[1])

    def __len__(self) -> int:
        return len(self._entries)
