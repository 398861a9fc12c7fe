"""What the hub, the simulator and the tests ask of a policy, and what policies share. No torch, no SGLang, no clock."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import count, islice
from typing import Any, Final, Generic, Protocol, TypeVar

from sgl_flowprefill.pace import AS_PREDICTED, Pace
from sgl_flowprefill.policy.decode import DecodeLoad

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")  # a waiting request
K = TypeVar("K")  # a task: a batch of requests that has started

BATCH_SHARE: Final = 0.25
"""Share of the time that a member of a batch has left which the batch may take."""
TOO_LARGE: Final = 32
"""Requests that do not fit a batch any more, after which no smaller ones are looked for."""
_NEXT_NUMBER: Final[Callable[[], int]] = count().__next__


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """Something that can be run: a waiting request, or a task that has started (a batch of requests).

    ``item`` is the caller's own object. ``work_s`` is the predicted execution time that is left, before ``pace``; it
    stands still while the job is not running. The caller takes the job out of the policy to update it, puts it back
    when the job stops running, and never changes its deadline.
    """

    item: T
    arrival_s: float
    deadline_s: float
    work_s: float
    requests: int = 1
    """Requests that end with the job: the batch."""
    number: int = field(default_factory=_NEXT_NUMBER)
    """Counts requests. A task has the number of the request that it was started for."""
    pace: Pace = AS_PREDICTED
    started: bool = False
    """Whether the job is a task that has started."""
    weight: float = 1.0
    """How much it counts to meet one of the requests, beside those of other jobs: the mean of a batch."""
    turns_infeasible_s: float = field(default=math.nan, init=False, repr=False)
    """The policy's own note: ``latest_start_s`` as it was when the job came, or -inf for an infeasible job."""
    counted: Any = field(default=None, init=False, repr=False)
    """The policy's own note: as what the job counts among what arrives, if it does."""

    @property
    def remaining_s(self) -> float:
        """Predicted execution time that is left, at the present pace."""
        return self.work_s * self.pace.factor

    @remaining_s.setter
    def remaining_s(self, remaining_s: float) -> None:
        self.work_s = remaining_s / self.pace.factor

    @property
    def latest_start_s(self) -> float:
        """When the job must run without a pause to meet its deadline: it is infeasible after that."""
        return self.deadline_s - self.work_s * self.pace.factor

    def slack_s(self, now_s: float) -> float:
        """Time to spare before the job must run without a pause to meet its deadline (paper, section 4.2)."""
        return self.latest_start_s - now_s


@dataclass(frozen=True)
class Limits:
    """What a policy may not exceed."""

    max_suspended: int
    """Tasks that may be suspended at a time; each holds its KV cache and activations."""
    max_batch_tokens: int
    """New tokens of a batch of several requests. A request with more runs alone."""
    max_batch_requests: int = 64


@dataclass(slots=True)
class Candidate(Generic[T]):
    """The best of the waiting or of the started jobs, with its rank: the smaller rank runs first."""

    tier: float
    """A job of a smaller tier goes before."""
    key: float
    """Orders the jobs of one tier."""
    job: Job[T]


class Standing(StrEnum):
    """Why a job has its place in the order."""

    STARVED = "starved"
    """It is too late for its deadline, and has waited so long that it is its turn."""
    KEPT = "kept"
    """It belongs to the jobs that can all meet their deadlines, which run by deadline."""
    LEFT_OUT = "left out"
    """It could meet its deadline by itself, but not beside the jobs that are kept."""
    FEASIBLE = "feasible"
    """It can meet its deadline by itself: jobs that can run by deadline."""
    INFEASIBLE = "infeasible"
    """It misses its deadline even if it runs now: it waits for all jobs that need not."""
    IN_LINE = "in line"
    """The order does not ask whether a deadline can be met."""


class Jobs(Protocol[T_co]):
    """Jobs that a policy holds."""

    def __iter__(self) -> Iterator[T_co]: ...

    def __len__(self) -> int: ...


def _one_rank(request: object) -> int:
    """The rank that computes all requests, if not said otherwise."""
    return 0


class Policy(ABC, Generic[R, K]):
    """Owns all jobs, those that wait and those that have started, and says what runs.

    It is bounded in the number of suspended tasks and never deadlocks on KV cache: a task that holds KV may always run
    to its end. Whatever else is refused (a suspension too many, a request whose KV does not fit), tasks are picked.

    An order of jobs is a subclass in a file of ``policy/orders``. It changes with time only as slack does, and every
    event costs O(log n).
    """

    batch_share = BATCH_SHARE

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    # ---- what an order says -----------------------------------------------------------------------------------------

    @abstractmethod
    def add(self, job: Job[R] | Job[K]) -> None:
        """Put ``job`` in: a waiting request, or a task where ``job.started``. A job is in a policy at most once."""

    @abstractmethod
    def remove(self, job: Job[R] | Job[K]) -> None:
        """Take ``job`` out. Removing a job that is not there is an error of the caller's."""

    @abstractmethod
    def repaced(self) -> None:
        """Paces of jobs have changed: whoever changes them says so afterwards."""

    @property
    @abstractmethod
    def waiting(self) -> Jobs[Job[R]]:
        """The requests that wait."""

    @property
    @abstractmethod
    def started(self) -> Jobs[Job[K]]:
        """The tasks that have started, the running one among them."""

    @abstractmethod
    def in_order(self, now_s: float) -> Iterator[Job[R]]:
        """The waiting requests in the order in which they would run at ``now_s``, found one by one as they are asked
        for. The policy may not change meanwhile."""

    @abstractmethod
    def _best_waiting(self, now_s: float) -> Candidate[R] | None:
        """The first of the waiting requests at ``now_s``. It stays where it is."""

    @abstractmethod
    def _best_started(self, now_s: float) -> Candidate[K] | None:
        """The first of the started tasks at ``now_s``. It stays where it is."""

    # ---- what an order may say ---------------------------------------------------------------------------------------

    def withdrawn(self, job: Job[R]) -> None:
        """``job``, which waited and was taken out, is not wanted any more: for orders that judge what will arrive by
        what has.
        """

    def charge(self, load: DecodeLoad) -> None:
        """Decode steps take ``load`` from the time of prefills from now on: for orders that plan ahead."""

    @property
    def infeasible_waiting(self) -> int | None:
        """How many of the waiting requests cannot meet their deadlines even by themselves, as of the last event; None
        for orders that do not ask.
        """
        return None

    def standings(self, jobs: Sequence[Job[Any]], now_s: float) -> list[Standing]:
        """Why each of ``jobs``, which are in the policy, has its place at ``now_s``: for people who watch."""
        return [Standing.IN_LINE] * len(jobs)

    def starts_alone(self, winner: Job[R], now_s: float) -> bool:
        """Whether nothing joins ``winner``, which ``pick`` has found at ``now_s``: it goes before jobs that can be met,
        and takes no more of their time than its own.
        """
        return False

    def turn_ends_s(self, job: Job[R]) -> float:
        """Until when the waiting ``job`` goes before jobs that can be met, if it cannot start for want of KV cache;
        infinity where no order of jobs ends.
        """
        return math.inf

    def keeps(self, job: Job[K], now_s: float) -> bool:
        """Whether the started ``job`` is to meet its deadline: jobs that are not are given up first."""
        return job.latest_start_s >= now_s

    def is_late(self, job: Job[R], now_s: float) -> bool:
        """Whether the waiting ``job`` misses its deadline even if it runs right behind those jobs that go before it and
        are to meet theirs.
        """
        return job.latest_start_s < now_s

    # ---- what is made of it -----------------------------------------------------------------------------------------

    def pick(self, now_s: float, running: Job[K] | None, admit: bool = True) -> Job[R] | Job[K] | None:
        """The job to run at ``now_s``: a task (maybe ``running`` itself), a waiting request to start, or None.

        ``running`` is the task that executes now, if any; it is among ``started`` like the suspended ones. With
        ``admit`` false no request is started (its KV did not fit, and nothing has been freed since).
        """
        task = self._best_started(now_s)
        request = self._best_waiting(now_s) if admit and self.may_start(running) else None
        if request is None:
            return None if task is None else task.job
        if task is None or (request.tier, request.key) < (task.tier, task.key):
            return request.job
        return task.job

    def batch(
        self,
        winner: Job[R],
        now_s: float,
        new_tokens: Callable[[R], int],
        predict_s: Callable[[Sequence[R]], float],
        dp_rank: Callable[[R], int] = _one_rank,
    ) -> list[Job[R]]:
        """``winner`` and the waiting requests of its ``dp_rank`` that join it, in order of priority.

        A request joins while the batch stays within the limits and is predicted to take no more than ``batch_share`` of
        the time that any member has until its deadline, if it can still meet it (SLO-aware batching; paper, section
        4.2, where a batch may take all of that time: what arrives later and goes first then costs all members their
        deadlines at once). Nothing joins a batch that has started, nor a winner that ``starts_alone``.
        """
        tokens, max_tokens = new_tokens(winner.item), self.limits.max_batch_tokens
        if tokens >= max_tokens or self.starts_alone(winner, now_s):
            return [winner]
        members, time_left_s, too_large = [winner], [_time_left_s(winner, now_s)], 0
        here = dp_rank(winner.item)

        def takes_too_long(requests: int) -> bool:
            takes_s = predict_s([member.item for member in members[:requests]])
            return takes_s > self.batch_share * time_left_s[requests - 1]

        for job in islice(self.in_order(now_s), 2 * self.limits.max_batch_requests):
            if len(members) == self.limits.max_batch_requests:
                break
            if job is winner or dp_rank(job.item) != here:
                continue
            of_job = new_tokens(job.item)
            if tokens + of_job > max_tokens:
                too_large += 1
                if too_large == TOO_LARGE:
                    break
                continue
            members.append(job)
            tokens += of_job
            time_left_s.append(min(time_left_s[-1], _time_left_s(job, now_s)))
            if len(members) == 2 and takes_too_long(2):
                return [winner]  # the more requests, the longer they take and the less time they have

        return members[: bisect_left(range(3, len(members) + 1), True, key=takes_too_long) + 2]

    def beside(
        self,
        batch: Sequence[Job[R]],
        now_s: float,
        new_tokens: Callable[[R], int],
        predict_s: Callable[[Sequence[R]], float],
        dp_rank: Callable[[R], int],
    ) -> list[Job[R]]:
        """Waiting requests of other ranks than that of ``batch``, in order of priority, that run at the same time as
        it, each rank computing its own. There are no more of both together than the limits say.

        All take as long as the part that takes longest. A request is added while that is no longer than the batch
        takes, or no more than ``batch_share`` of the time that any of them has, and leaves the request as much; beside
        a winner that ``starts_alone``, while it is no longer. A part has no more tokens than the batch or, where those
        are more, the limits.
        """
        max_tokens = max(self.limits.max_batch_tokens, sum(new_tokens(job.item) for job in batch))
        takes_s = predict_s([job.item for job in batch])
        most_s = takes_s
        if not self.starts_alone(batch[0], now_s):
            most_s = max(takes_s, self.batch_share * min(_time_left_s(job, now_s) for job in batch))
        parts: dict[int, list[R]] = {}
        found: list[Job[R]] = []
        misses = 0
        for job in islice(self.in_order(now_s), 2 * self.limits.max_batch_requests):
            if len(batch) + len(found) >= self.limits.max_batch_requests:
                break
            if dp_rank(job.item) == dp_rank(batch[0].item):
                continue
            part = [*parts.get(dp_rank(job.item), ()), job.item]
            with_it_s, share_s = max(takes_s, predict_s(part)), self.batch_share * _time_left_s(job, now_s)
            if sum(map(new_tokens, part)) <= max_tokens and with_it_s <= min(most_s, share_s):
                parts[dp_rank(job.item)] = part
                found.append(job)
                takes_s, most_s = with_it_s, min(most_s, share_s)
            else:
                misses += 1
                if misses == TOO_LARGE:
                    break
        return found

    def first_waiting(self, now_s: float, most: int) -> list[Job[R]]:
        """The first waiting requests of their order, ``most`` of them at most."""
        return list(islice(self.in_order(now_s), most))

    def may_start(self, running: Job[K] | None) -> bool:
        """Whether a new task may start: the running one would be suspended for it."""
        return running is None or len(self.started) <= self.limits.max_suspended


def _time_left_s(job: Job[R], now_s: float) -> float:
    """Time until the job's deadline; unbounded for a job that misses it anyway."""
    return job.deadline_s - now_s if job.latest_start_s >= now_s else math.inf
