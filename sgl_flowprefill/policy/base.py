"""What the runtime, the simulator and the tests ask of a policy. No torch, no SGLang, no clock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Final, Generic, Protocol, TypeVar

T = TypeVar("T")

_NEXT_NUMBER: Final[Callable[[], int]] = count().__next__


@dataclass(slots=True, eq=False)
class Job(Generic[T]):
    """Something that can be run: a waiting request, or a task that has started (a batch of requests).

    ``item`` is the caller's own object. ``remaining_s`` is the predicted execution time that is left; it stands still
    while the job is not running, so the caller updates it whenever the job stops running.
    """

    item: T
    arrival_s: float
    deadline_s: float
    remaining_s: float
    requests: int = 1
    """Requests that end with it: those of the batch."""
    number: int = field(default_factory=_NEXT_NUMBER)
    """Counts requests. That of a task is that of the request that it was started for."""

    def slack_s(self, now_s: float) -> float:
        """Time to spare before the job must run without a pause to meet its deadline (paper, section 4.2)."""
        return self.deadline_s - now_s - self.remaining_s


Rank = tuple[float, ...]
"""Smaller runs first. Comparable between the queues of one policy at one instant."""


class Queue(Protocol[T]):
    """An order over jobs that changes with time only as slack does. Every operation is O(log n) amortised."""

    def add(self, job: Job[T]) -> None:
        """Put ``job`` in; one job is in a queue at most once."""
        ...

    def remove(self, job: Job[T]) -> None:
        """Take ``job`` out. Removing a job that is not there is an error of the caller's."""
        ...

    def best(self, now_s: float) -> tuple[Rank, Job[T]] | None:
        """The job to run first at ``now_s`` with its rank, or None when the queue is empty. It stays in the queue."""
        ...

    def first(self, now_s: float, most: int) -> list[Job[T]]:
        """Up to ``most`` jobs in the order in which they would run at ``now_s``."""
        ...

    def __len__(self) -> int: ...
