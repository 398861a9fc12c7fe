"""What the runtime, the simulator and the tests ask of a policy. No torch, no SGLang, no clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Final, Generic, Protocol, TypeVar

from sgl_flowprefill.pace import AS_PREDICTED, Pace

T = TypeVar("T")

_NEXT_NUMBER: Final[Callable[[], int]] = count().__next__


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """Something that can be run: a waiting request, or a task that has started (a batch of requests).

    ``item`` is the caller's own object. ``work_s`` is the predicted execution time that is left, before ``pace``; it
    stands still while the job is not running. The caller takes the job out of its queue to update it, puts it back
    when the job stops running, and never changes its deadline.
    """

    item: T
    arrival_s: float
    deadline_s: float
    work_s: float
    requests: int = 1
    """Requests that end with it: those of the batch."""
    number: int = field(default_factory=_NEXT_NUMBER)
    """Counts requests. A task has the number of the request that it was started for."""
    pace: Pace = AS_PREDICTED
    turns_hopeless_s: float = field(default=math.nan, init=False, repr=False)
    """For the queue that it is in: ``latest_start_s`` as it was when it came, or -inf if it is among the hopeless."""

    @property
    def remaining_s(self) -> float:
        """Predicted execution time that is left, at the present pace."""
        return self.work_s * self.pace.factor

    @remaining_s.setter
    def remaining_s(self, remaining_s: float) -> None:
        self.work_s = remaining_s / self.pace.factor

    @property
    def latest_start_s(self) -> float:
        """When the job must run without a pause to meet its deadline: it is hopeless after that."""
        return self.deadline_s - self.work_s * self.pace.factor

    def slack_s(self, now_s: float) -> float:
        """Time to spare before the job must run without a pause to meet its deadline (paper, section 4.2)."""
        return self.latest_start_s - now_s


Rank = tuple[float, ...]
"""Smaller runs first. Comparable between the queues of one policy at one instant."""


class Queue(Protocol[T]):
    """An order over jobs that changes with time only as slack does. Every operation is O(log n)."""

    def add(self, job: Job[T]) -> None:
        """Put ``job`` in; one job is in a queue at most once."""
        ...

    def remove(self, job: Job[T]) -> None:
        """Take ``job`` out. Removing a job that is not there is an error of the caller's."""
        ...

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        """The job to run first at ``now_s`` with its rank, or None when the queue is empty. It stays in the queue."""
        ...

    def in_order(self, now_s: float) -> Iterator[Job[T]]:
        """All jobs in the order in which they would run at ``now_s``, found one by one as they are asked for."""
        ...

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        """The first jobs of that order, ``most`` of them at most."""
        return list(islice(self.in_order(now_s), most))

    def repaced(self) -> None:
        """Paces of jobs have changed."""
        ...

    def __len__(self) -> int: ...
