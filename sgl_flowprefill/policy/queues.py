"""The orders: S-EDF (slack-aware earliest deadline first), plain EDF, and first come first served."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, filterfalse, islice, takewhile
from operator import attrgetter
from typing import Any, Final, TypeVar

from sgl_flowprefill.policy.base import Job, Queue, Rank
from sgl_flowprefill.policy.joblist import JobList

T = TypeVar("T")

MOVES: Final = 2
"""Jobs that an event may move between the feasible and the hopeless, on average. Each event brings about one."""
MOVES_AT_ONCE: Final = 50
"""Jobs that one event may move, after others that moved less."""
LOOKS: Final = 64
"""Jobs that could be moved, but were not yet, that an event looks at."""


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

    A job turns hopeless when its slack runs out, at ``deadline - remaining``: one list holds the feasible jobs by
    deadline, another the same jobs by the instant at which they leave it. An event costs O(log n), where sorting every
    job by ``sign(slack)/deadline`` at every event (paper, algorithm 1) costs O(n log n).

    Where many jobs turn hopeless at once, or feasible again because the machine has become faster, an event moves a few
    of them (MOVES) and looks at some more (LOOKS), those that are first in the order before the others. So the first
    feasible job is found by the present time and pace at the next event, unless it is behind more than that. The
    hopeless that were not moved yet count as feasible behind it.

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
        hopeless_order: Callable[[Job[T]], float] = attrgetter("arrival_s"),
    ) -> None:
        self._max_starvation_s = max_starvation_s
        self._turns = turns
        self._hopeless_order = hopeless_order
        self._feasible: JobList[T] = JobList(attrgetter("deadline_s"))
        self._turns_hopeless: JobList[T] = JobList(attrgetter("turns_hopeless_s"))
        """The feasible again."""
        self._hopeless: JobList[T] = JobList(hopeless_order)
        self._now_s = -math.inf
        self._moves_left = MOVES_AT_ONCE
        self._to_reconsider: tuple[float, float] | None = None
        """Hopeless jobs before this key and number may be feasible at their new pace."""

    def add(self, job: Job[T]) -> None:
        self._put(job)

    def remove(self, job: Job[T]) -> None:
        self._take(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        self._settle(now_s)
        if (starved := next(self._starved(now_s), None)) is not None:
            return (0.0, self._hopeless_order(starved)), starved
        if (feasible := self._first_feasible(now_s)) is not None:
            return (1.0, feasible.deadline_s), feasible
        hopeless = self._feasible.first() or self._hopeless.first()
        return None if hopeless is None else ((2.0, self._hopeless_order(hopeless)), hopeless)

    def in_order(self, now_s: float) -> Iterator[Job[T]]:
        self._settle(now_s)
        ahead = dict.fromkeys(job for job in self._ahead(now_s) if job is not None)
        return chain(ahead, filterfalse(ahead.__contains__, chain(self._feasible, self._hopeless)))

    def repaced(self) -> None:
        self._to_reconsider = (math.inf, math.inf)

    def _starved(self, now_s: float) -> Iterator[Job[T]]:
        """The first of the hopeless, those that have waited too long and whose turn it is."""

        def goes_first(job: Job[T]) -> bool:
            starved = job.arrival_s + self._max_starvation_s <= now_s
            return starved and (self._turns is None or self._turns.is_turn_of(job, now_s))

        return takewhile(goes_first, self._hopeless)

    def _ahead(self, now_s: float) -> Iterable[Job[T] | None]:
        """The jobs that go before what is left of the feasible."""
        return *self._starved(now_s), self._first_feasible(now_s)

    def _first_feasible(self, now_s: float) -> Job[T] | None:
        first = self._feasible.first()
        if first is None or first.latest_start_s >= now_s:
            return first
        looked_at = islice(self._feasible.from_key(now_s), LOOKS)
        return next((job for job in looked_at if job.latest_start_s >= now_s), None)

    def _settle(self, now_s: float) -> None:
        """Move jobs that have turned hopeless or feasible, as many as this event may."""
        if now_s != self._now_s:
            self._now_s = now_s
            self._moves_left = min(MOVES_AT_ONCE, self._moves_left + MOVES)
        if self._to_reconsider is not None:
            self._reconsider(*self._to_reconsider)
        while self._moves_left and (job := self._turns_hopeless.first_before(now_s)) is not None:
            self._move(job)
        while self._moves_left and (job := self._feasible.first()) is not None and job.latest_start_s < now_s:
            self._move(job)

    def _reconsider(self, key: float, number: float) -> None:
        """Move the next of the hopeless jobs, the last one first, that are feasible at their new pace."""
        self._to_reconsider = None
        for job in list(islice(self._hopeless.before(key, number), LOOKS)):
            self._to_reconsider = (self._hopeless_order(job), job.number)
            if job.latest_start_s >= self._now_s:
                self._move(job)
                if not self._moves_left:
                    return

    def _move(self, job: Job[T]) -> None:
        self._moves_left -= 1
        self._take(job)
        self._put(job)

    def _put(self, job: Job[T]) -> None:
        latest_start_s = job.latest_start_s
        if latest_start_s < self._now_s or latest_start_s < job.arrival_s:
            job.turns_hopeless_s = -math.inf
            self._hopeless.add(job)
        else:
            job.turns_hopeless_s = latest_start_s
            self._feasible.add(job)
            self._turns_hopeless.add(job)

    def _take(self, job: Job[T]) -> None:
        if job.turns_hopeless_s == -math.inf:
            self._hopeless.remove(job)
        else:
            self._feasible.remove(job)
            self._turns_hopeless.remove(job)

    def __len__(self) -> int:
        return len(self._feasible) + len(self._hopeless)


class StaticQueue(Queue[T]):
    """An order by a key that does not change with time: EDF with the deadline, FCFS with the arrival."""

    def __init__(self, key: Callable[[Job[T]], float]) -> None:
        self._key = key
        self._jobs: JobList[T] = JobList(key)

    def add(self, job: Job[T]) -> None:
        self._jobs.add(job)

    def remove(self, job: Job[T]) -> None:
        self._jobs.remove(job)

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        first = self._jobs.first()
        return None if first is None else ((self._key(first),), first)

    def in_order(self, now_s: float) -> Iterator[Job[T]]:
        return iter(self._jobs)

    def repaced(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self._jobs)
