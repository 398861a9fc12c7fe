"""S-EDF that, when more work arrives than the machine can do, puts off the longest requests before any other."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import deque
from itertools import accumulate
from typing import Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank
from sgl_flowprefill.policy.queues import SlackEdfQueue, StarvationTurns

T = TypeVar("T")

UPDATES_PER_WINDOW: Final = 64
ROUNDING_S: Final = 1e-6
"""Kept sums of times may be off by this much."""


class RecentLoad:
    """The work that arrived in the last ``window_s``, and the longest request for which there is time.

    ``longest_s`` is the largest length such that the requests no longer than it took ``capacity`` of the window at
    most: of a set of requests that cannot all be served, the shortest are the most. Infinite without overload.
    """

    def __init__(self, window_s: float, capacity: float = 1.0) -> None:
        self._window_s = window_s
        self._budget_s = capacity * window_s
        self._recent: deque[tuple[float, float]] = deque()
        self._lengths_s: list[float] = []
        self._total_s = 0.0
        self._next_update_s = 0.0
        self.longest_s = float("inf")

    def arrived(self, now_s: float, work_s: float) -> None:
        """A request of ``work_s`` has arrived."""
        self._recent.append((now_s, work_s))
        insort(self._lengths_s, work_s)
        self._total_s += work_s
        while self._recent[0][0] < now_s - self._window_s:
            _, gone_s = self._recent.popleft()
            del self._lengths_s[bisect_left(self._lengths_s, gone_s)]
            self._total_s -= gone_s
        if now_s >= self._next_update_s:
            self._next_update_s = now_s + self._window_s / UPDATES_PER_WINDOW
            self.longest_s = self._longest_s()

    def _longest_s(self) -> float:
        if self._total_s <= self._budget_s + ROUNDING_S:
            return float("inf")
        too_long = self._lengths_s[
            min(len(self._lengths_s) - 1, bisect_right(list(accumulate(self._lengths_s)), self._budget_s))
        ]
        shorter = bisect_left(self._lengths_s, too_long)
        return self._lengths_s[shorter - 1] if shorter else too_long


class SheddingQueue(Queue[T], Generic[T]):
    """S-EDF over the jobs for which there is time by the recent load; the longer ones come after those that can meet
    their deadline and before the hopeless."""

    def __init__(self, load: RecentLoad, max_starvation_s: float, turns: StarvationTurns, *, arrivals: bool) -> None:
        self._load = load
        self._arrivals = arrivals
        self._fitting: SlackEdfQueue[T] = SlackEdfQueue(max_starvation_s, turns)
        self._excess: SlackEdfQueue[T] = SlackEdfQueue(max_starvation_s, turns)
        self._in_excess: set[int] = set()

    def add(self, job: Job[T]) -> None:
        if self._arrivals:
            self._load.arrived(job.arrival_s, job.remaining_s)
        if job.remaining_s > self._load.longest_s:
            self._in_excess.add(id(job))
            self._excess.add(job)
        else:
            self._fitting.add(job)

    def remove(self, job: Job[T]) -> None:
        if id(job) in self._in_excess:
            self._in_excess.remove(id(job))
            self._excess.remove(job)
        else:
            self._fitting.remove(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        fitting, excess = self._fitting.best(now_s), self._excess.best(now_s)
        if excess is None:
            return fitting
        rank = excess[0]
        if rank[0] == 1.0:
            excess = (1.5, rank[1]), excess[1]
        return excess if fitting is None or excess[0] < fitting[0] else fitting

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        return (self._fitting.first(now_s, most) + self._excess.first(now_s, most))[:most]

    def __len__(self) -> int:
        return len(self._fitting) + len(self._excess)
