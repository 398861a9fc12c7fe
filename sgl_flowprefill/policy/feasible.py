"""Feasible-set order: at every event, the largest set of jobs that can all meet their deadlines (Moore-Hodgson)."""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from itertools import count
from typing import Any, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank
from sgl_flowprefill.policy.queues import JobHeap, StarvationTurns

T = TypeVar("T")

Entry = tuple[float, int, Job[Any], "FeasibleSetQueue[Any]"]
"""Deadline, a tie-breaker, the job, and the queue that it is in."""


class FeasibleSet:
    """The jobs of several queues that compete for one machine.

    In order of deadlines, jobs are taken on until one would be late; then the longest job taken so far is let go. What
    is kept at the end is a largest set of jobs that all finish in time if nothing else arrives (Moore 1968). S-EDF only
    drops what is late by itself, and under overload starts jobs that together cannot all be met.
    """

    def __init__(self) -> None:
        self.queues: list[FeasibleSetQueue[Any]] = []
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
        longest: list[tuple[float, int]] = []
        dropped: set[int] = set()
        end_s = now_s
        for deadline_s, sequence, job, _ in self._by_deadline:
            heappush(longest, (-job.remaining_s, sequence))
            end_s += job.remaining_s
            if end_s > deadline_s:
                remaining_s, worst = heappop(longest)
                end_s += remaining_s
                dropped.add(worst)
        for queue in self.queues:
            queue.kept, queue.dropped = [], []
        for _, sequence, job, queue in self._by_deadline:
            (queue.dropped if sequence in dropped else queue.kept).append(job)


class FeasibleSetQueue(Queue[T], Generic[T]):
    """Jobs of the largest feasible set first, then those that would have to be dropped, each earliest deadline first;
    then the hopeless, oldest first. A hopeless job that has waited ``max_starvation_s`` goes before all.

    An event costs O(n log n) in the jobs that are not hopeless: all queues that share ``feasible`` are looked at.
    """

    def __init__(self, feasible: FeasibleSet, max_starvation_s: float, turns: StarvationTurns | None = None) -> None:
        self._set = feasible
        feasible.queues.append(self)
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._turns_hopeless: JobHeap[T] = JobHeap(lambda job: job.deadline_s - job.remaining_s)
        self._hopeless: JobHeap[T] = JobHeap(lambda job: job.arrival_s)
        self.kept: list[Job[T]] = []
        self.dropped: list[Job[T]] = []

    def add(self, job: Job[T]) -> None:
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
            return (0.0, hopeless[0]), hopeless[1]
        if self.kept:
            return (1.0, self.kept[0].deadline_s), self.kept[0]
        if self.dropped:
            return (2.0, self.dropped[0].deadline_s), self.dropped[0]
        return None if hopeless is None else ((3.0, hopeless[0]), hopeless[1])

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        self._update(now_s)
        hopeless = self._hopeless.first(most)
        starved = [job for job in hopeless if self._goes_first(job, now_s)]
        return (starved + self.kept[:most] + self.dropped[:most] + hopeless[len(starved) :])[:most]

    def _goes_first(self, hopeless: Job[T], now_s: float) -> bool:
        starved = hopeless.arrival_s + self._max_starvation_s <= now_s
        return starved and (self._turns is None or self._turns.is_turn_of(hopeless, now_s))

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
