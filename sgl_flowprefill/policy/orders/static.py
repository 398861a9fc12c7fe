"""Orders by a number that does not change with time: EDF by the deadline, FCFS by the arrival."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any, TypeVar

from sgl_flowprefill.policy.base import Candidate, Job, Jobs, Limits, Policy
from sgl_flowprefill.policy.joblist import JobList
from sgl_flowprefill.policy.registry import register

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")


class StaticOrder(Policy[R, K]):
    """Waiting requests and started tasks by one key, the smallest first."""

    def __init__(self, limits: Limits, key: Callable[[Job[Any]], float]) -> None:
        super().__init__(limits)
        self._key = key
        self._waiting: JobList[Any] = JobList(key)
        self._started: JobList[Any] = JobList(key)

    def add(self, job: Job[R] | Job[K]) -> None:
        (self._started if job.started else self._waiting).add(job)

    def remove(self, job: Job[R] | Job[K]) -> None:
        (self._started if job.started else self._waiting).remove(job)

    def repaced(self) -> None:
        pass

    @property
    def waiting(self) -> Jobs[Job[R]]:
        return self._waiting

    @property
    def started(self) -> Jobs[Job[K]]:
        return self._started

    def in_order(self, now_s: float) -> Iterator[Job[R]]:
        return iter(self._waiting)

    def _best_waiting(self, now_s: float) -> Candidate[R] | None:
        return self._first_of(self._waiting)

    def _best_started(self, now_s: float) -> Candidate[K] | None:
        return self._first_of(self._started)

    def _first_of(self, jobs: JobList[T]) -> Candidate[T] | None:
        first = jobs.first()
        return None if first is None else Candidate(0.0, self._key(first), first)


@register("edf", "earliest deadline first")
def edf(limits: Limits, max_starvation_s: float) -> Policy[Any, Any]:
    return StaticOrder(limits, attrgetter("deadline_s"))


@register("fcfs", "first come, first served")
def fcfs(limits: Limits, max_starvation_s: float) -> Policy[Any, Any]:
    return StaticOrder(limits, attrgetter("arrival_s"))
