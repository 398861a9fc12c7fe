"""The orders: S-EDF (slack-aware earliest deadline first), plain EDF, and first come first served."""

from __future__ import annotations

import math
from collections.abc import Callable
from heapq import heapify, heappop, heappush, nsmallest
from itertools import count, takewhile
from typing import Any, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank

T = TypeVar("T")


class JobHeap(Generic[T]):
    """A heap of jobs by a key that is fixed while the job is in it, and of equal ones by their number. Removal is lazy
    and paid for by later pops."""

    def __init__(self, key: Callable[[Job[T]], float]) -> None:
        self._key = key
        self._order = count()
        self._heap: list[tuple[float, int, int, Job[T]]] = []
        self._live: dict[int, int] = {}  # id(job) -> sequence number of its only valid entry

    def add(self, job: Job[T]) -> None:
        assert id(job) not in self._live, "a job is in a heap at most once"
        sequence = next(self._order)
        self._live[id(job)] = sequence
        heappush(self._heap, (self._key(job), job.number, sequence, job))

    def remove(self, job: Job[T]) -> None:
        del self._live[id(job)]
        if len(self._heap) > 2 * len(self._live) + 16:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapify(self._heap)

    def top(self) -> tuple[float, Job[T]] | None:
        while self._heap:
            if self._is_live(self._heap[0]):
                return self._heap[0][0], self._heap[0][3]
            heappop(self._heap)
        return None

    def first(self, most: int) -> list[Job[T]]:
        return [entry[3] for entry in nsmallest(most, filter(self._is_live, self._heap))]

    def _is_live(self, entry: tuple[float, int, int, Job[T]]) -> bool:
        return self._live.get(id(entry[3])) == entry[2]

    def __contains__(self, job: Job[T]) -> bool:
        return id(job) in self._live

    def __len__(self) -> int:
        return len(self._live)


class StarvationTurns:
    """Lets starved jobs, which cannot meet their deadline any more, go first one after the other, in ``share`` of the
    time at most.

    Under lasting overload every hopeless job is starved sooner or later, and without a share the order of a policy
    would become first come first served. The queues of one policy share one object.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._turn_of: int | None = None
        self._next_turn_s = -math.inf

    def is_turn_of(self, job: Job[Any], now_s: float) -> bool:
        """Whether it is the turn of ``job``, known by its number. A turn lasts until the next one begins."""
        if job.number != self._turn_of:
            if now_s < self._next_turn_s:
                return False
            self._turn_of = job.number
            self._next_turn_s = now_s + job.remaining_s / self._share
        return True


class SlackEdfQueue(Queue[T]):
    """S-EDF: jobs that can still meet their deadline, earliest deadline first; then the hopeless, oldest first.

    A job turns hopeless when its slack runs out, at ``deadline - remaining``, which is known when it is added: one heap
    holds the feasible jobs by deadline, another the same jobs by the instant at which they leave it. An event costs
    O(log n), where sorting every job by ``sign(slack)/deadline`` at every event (paper, algorithm 1) costs O(n log n).

    The paper runs hopeless jobs latest deadline first and lets them wait without bound: ``as_published``. Here the
    oldest goes first, and once it has waited ``max_starvation_s`` it goes before the feasible ones, when it is its turn
    (any time without ``turns``).
    """

    @classmethod
    def as_published(cls) -> SlackEdfQueue[T]:
        """The order of the paper's ``sign(slack)/deadline``, highest first."""
        return cls(math.inf, hopeless_order=lambda job: -job.deadline_s)

    def __init__(
        self,
        max_starvation_s: float,
        turns: StarvationTurns | None = None,
        hopeless_order: Callable[[Job[T]], float] = lambda job: job.arrival_s,
    ) -> None:
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._feasible: JobHeap[T] = JobHeap(lambda job: job.deadline_s)
        self._turns_hopeless: JobHeap[T] = JobHeap(lambda job: job.deadline_s - job.remaining_s)
        self._hopeless: JobHeap[T] = JobHeap(hopeless_order)

    def add(self, job: Job[T]) -> None:
        self._feasible.add(job)
        self._turns_hopeless.add(job)

    def remove(self, job: Job[T]) -> None:
        if job in self._hopeless:
            self._hopeless.remove(job)
        else:
            self._feasible.remove(job)
            self._turns_hopeless.remove(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._update(now_s)
        hopeless = self._hopeless.top()
        if hopeless is not None and self._goes_first(hopeless[1], now_s):
            return (0.0, hopeless[0]), hopeless[1]
        feasible = self._feasible.top()
        if feasible is not None:
            return (1.0, feasible[0]), feasible[1]
        return None if hopeless is None else ((2.0, hopeless[0]), hopeless[1])

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        self._update(now_s)
        hopeless = self._hopeless.first(most)
        starved = list(takewhile(lambda job: self._goes_first(job, now_s), hopeless))
        return (starved + self._feasible.first(most) + hopeless[len(starved) :])[:most]

    def _goes_first(self, hopeless: Job[T], now_s: float) -> bool:
        starved = hopeless.arrival_s + self._max_starvation_s <= now_s
        return starved and (self._turns is None or self._turns.is_turn_of(hopeless, now_s))

    def _update(self, now_s: float) -> None:
        while (top := self._turns_hopeless.top()) is not None and top[0] < now_s:
            self._turns_hopeless.remove(top[1])
            self._feasible.remove(top[1])
            self._hopeless.add(top[1])

    def __len__(self) -> int:
        return len(self._feasible) + len(self._hopeless)


class StaticQueue(Queue[T]):
    """An order by a key that does not change with time: EDF with the deadline, FCFS with the arrival."""

    def __init__(self, key: Callable[[Job[T]], float]) -> None:
        self._heap: JobHeap[T] = JobHeap(key)

    def add(self, job: Job[T]) -> None:
        self._heap.add(job)

    def remove(self, job: Job[T]) -> None:
        self._heap.remove(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        top = self._heap.top()
        return None if top is None else ((top[0],), top[1])

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        return self._heap.first(most)

    def __len__(self) -> int:
        return len(self._heap)
