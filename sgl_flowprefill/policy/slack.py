"""Jobs by slack: feasible jobs apart from infeasible ones, and how long the infeasible ones starve."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, filterfalse, islice, takewhile
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job
from sgl_flowprefill.policy.joblist import JobList

T = TypeVar("T")

STARVED_SHARE: Final = 0.02
"""Share of the time in which starved jobs may go before feasible ones."""
MOVES: Final = 2
"""Jobs that an event may move between the feasible and the infeasible, on average. Each event brings about one."""
MOVES_AT_ONCE: Final = 50
"""Jobs that one event may move, after others that moved less."""
LOOKS: Final = 64
"""Jobs that could be moved, but were not yet, that an event looks at."""


class StarvationTurns:
    """Lets starved jobs, which cannot meet their deadline any more, go first one after the other, in ``share`` of the
    time at most. A turn counts with the time of the task that is started in it. A job that could not start in its turn,
    for want of KV cache, lets others go first for as long as that was.

    Under lasting overload every infeasible job is starved sooner or later, and without a share the order of a policy
    would become first come first served. One policy has one object for its waiting and started jobs.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.are_unlimited = math.isinf(share)
        """Whether all starved jobs go first, one after the other."""
        self._turn_of: int | None = None
        self._next_turn_s = self._now_s = -math.inf

    def is_turn_of(self, job: Job[Any], now_s: float) -> bool:
        """Whether it is the turn of ``job``, known by its number. A turn lasts until the next one begins."""
        self._now_s = now_s
        if self.are_unlimited:
            return True
        if job.number != self._turn_of:
            if now_s < self._next_turn_s:
                return False
            self._turn_of = job.number
            self._next_turn_s = now_s + job.remaining_s / self._share
        elif not job.started and now_s >= self._next_turn_s:
            self._turn_of = None
            self._next_turn_s = now_s + job.remaining_s / self._share
            return False
        return True

    def ends_s(self, job: Job[Any]) -> float:
        """When the turn of ``job``, which waits, ends if it does not start; infinity if it is not its turn."""
        return self._next_turn_s if job.number == self._turn_of else math.inf

    def charge(self, task: Job[Any]) -> None:
        """``task`` has started, or goes on: if it is its turn, all that it computes counts, its joiners with it."""
        if task.number == self._turn_of:
            self._next_turn_s = max(self._next_turn_s, self._now_s + task.remaining_s / self._share)


class SlackOrder(Generic[T]):
    """The feasible jobs, which can still meet their deadline, by deadline; and the infeasible ones, the oldest first.

    A job turns infeasible when its slack runs out, at ``deadline - remaining``: one list holds the feasible jobs by
    deadline, another the same jobs by the instant at which they leave it. An event costs O(log n), where sorting every
    job by ``sign(slack)/deadline`` at every event (paper, algorithm 1) costs O(n log n).

    Where many jobs turn infeasible at once, or feasible again because the machine has become faster, an event moves a
    few of them (MOVES) and looks at some more (LOOKS), those that are first in the order before the others. So the
    first feasible job is found by the present time and pace at the next event, unless it is behind more than that. The
    infeasible jobs that were not moved yet count as feasible behind it.

    An infeasible job that has waited ``max_starvation_s`` is starved when it is its turn.
    """

    def __init__(
        self,
        max_starvation_s: float,
        turns: StarvationTurns,
        infeasible_order: Callable[[Job[T]], float] = attrgetter("arrival_s"),
    ) -> None:
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self.infeasible_order = infeasible_order
        self.feasible: JobList[T] = JobList(attrgetter("deadline_s"))
        self._turns_infeasible: JobList[T] = JobList(attrgetter("turns_infeasible_s"))
        """The feasible jobs again."""
        self._infeasible: JobList[T] = JobList(infeasible_order)
        self._now_s = -math.inf
        self._moves_left = MOVES_AT_ONCE
        self._length = 0
        self._to_reconsider: tuple[float, float] | None = None
        """Infeasible jobs before this key and number may be feasible at their new pace."""
        self._has_looked = False
        """Whether the next of them have been looked at by the present time."""

    def add(self, job: Job[T]) -> None:
        """Put ``job`` where it belongs at the time of the last event."""
        self._length += 1
        latest_start_s = job.latest_start_s
        if latest_start_s < self._now_s or latest_start_s < job.arrival_s:
            job.turns_infeasible_s = -math.inf
            self._infeasible.add(job)
        else:
            job.turns_infeasible_s = latest_start_s
            self.feasible.add(job)
            self._turns_infeasible.add(job)

    def remove(self, job: Job[T]) -> None:
        """Take ``job`` out."""
        self._length -= 1
        if is_infeasible(job):
            self._infeasible.remove(job)
        else:
            self.feasible.remove(job)
            self._turns_infeasible.remove(job)

    def repaced(self) -> None:
        """Paces of jobs have changed."""
        self._to_reconsider = (math.inf, math.inf)
        self._has_looked = False

    def reclassify(self, now_s: float) -> Sequence[Job[T]]:
        """Move the jobs that are infeasible or feasible by ``now_s`` and were not before, as many as this event may,
        and return them."""
        if now_s != self._now_s:
            self._now_s = now_s
            self._has_looked = False
            if self._moves_left < MOVES_AT_ONCE:
                self._moves_left = min(MOVES_AT_ONCE, self._moves_left + MOVES)
        if not self._length:
            self._to_reconsider = None
            return ()
        moved: list[Job[T]] = []
        if self._moves_left and self._to_reconsider is not None and not self._has_looked:
            self._has_looked = True
            self._reconsider(*self._to_reconsider, moved)
        while self._moves_left and (job := self._turns_infeasible.first_before(now_s)) is not None:
            self._move(job, moved)
        while self._moves_left and (job := self.feasible.first()) is not None and job.latest_start_s < now_s:
            self._move(job, moved)
        return moved

    def first_starved(self, now_s: float) -> Job[T] | None:
        """The first of the infeasible jobs, if it is starved: the next one's turn comes when it has gone."""
        first = self._infeasible.first()
        return first if first is not None and self._is_starved(first, now_s) else None

    def starved(self, now_s: float) -> Iterator[Job[T]]:
        """The infeasible jobs that are starved: the first, and the others behind it where turns are not limited. Asking
        again at the same instant gives the same.
        """
        if self._turns.are_unlimited:
            return takewhile(lambda job: self._is_starved(job, now_s), self._infeasible)
        first = self.first_starved(now_s)
        return iter(() if first is None else (first,))

    def first_feasible(self, now_s: float) -> Job[T] | None:
        """The job with the earliest deadline that can still be met."""
        first = self.feasible.first()
        if first is None or first.latest_start_s >= now_s:
            return first
        for job in islice(self.feasible.from_key(now_s), LOOKS):
            if job.deadline_s - job.work_s * job.pace.factor >= now_s:
                return job
        return None

    def first_infeasible(self) -> Job[T] | None:
        """The first job where no job is feasible."""
        return self.feasible.first() or self._infeasible.first()

    @property
    def infeasible(self) -> int:
        """How many jobs are infeasible, as of the last event."""
        return len(self._infeasible)

    def behind(self, ahead: Iterable[Job[T] | None]) -> Iterator[Job[T]]:
        """The jobs of ``ahead``, each once, and then all other jobs."""
        first = dict.fromkeys(filter(None, ahead))
        return chain(first, filterfalse(first.__contains__, self))

    def _is_starved(self, job: Job[T], now_s: float) -> bool:
        return job.arrival_s + self._max_starvation_s <= now_s and self._turns.is_turn_of(job, now_s)

    def _reconsider(self, key: float, number: float, moved: list[Job[T]]) -> None:
        """Move the next of the infeasible jobs, the last one first, that are feasible at their new pace."""
        now_s = self._now_s
        last: Job[T] | None = None
        for last in list(islice(self._infeasible.before(key, number), LOOKS)):
            # Most deadlines have passed: that is seen from one number of a job that is seldom in the cache.
            if last.deadline_s >= now_s and last.deadline_s - last.work_s * last.pace.factor >= now_s:
                self._move(last, moved)
                if not self._moves_left:
                    break
        self._to_reconsider = None if last is None else (self.infeasible_order(last), last.number)

    def _move(self, job: Job[T], moved: list[Job[T]]) -> None:
        self._moves_left -= 1
        was_infeasible = is_infeasible(job)
        self.remove(job)
        self.add(job)
        if is_infeasible(job) != was_infeasible:
            moved.append(job)

    def __iter__(self) -> Iterator[Job[T]]:
        return chain(self.feasible, self._infeasible)

    def __len__(self) -> int:
        return self._length


def is_infeasible(job: Job[Any]) -> bool:
    """Whether the order that ``job`` is in has found that the job cannot meet its deadline any more."""
    return job.turns_infeasible_s == -math.inf
