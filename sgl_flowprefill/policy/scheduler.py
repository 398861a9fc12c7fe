"""The whole policy: what runs now, among the tasks that have started and the requests that wait."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Queue
from sgl_flowprefill.policy.feasible import FeasibleRequests, FeasibleSet, FeasibleTasks
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.queues import SlackEdfQueue, StarvationTurns, StaticQueue

R = TypeVar("R")  # a waiting request
K = TypeVar("K")  # a task: a batch of requests that has started

POLICIES: Final = ("feasible", "s-edf", "s-edf-paper", "edf", "fcfs")
STARVED_SHARE: Final = 0.02
"""Share of the time in which starved jobs may go before those that can still meet their deadline."""
BATCH_SHARE: Final = 0.25
"""Of the time that a member of a batch has left, how much the batch may take."""
TOO_LARGE: Final = 32
"""Requests that do not fit a batch any more, after which no smaller ones are looked for."""
FORECAST_WINDOW_S: Final = 60.0
"""Past by which the policy "feasible" judges what will arrive."""


@dataclass(frozen=True)
class Limits:
    """What the policy may not exceed."""

    max_suspended: int
    """Tasks that may be suspended at a time; each holds its KV cache and activations."""
    max_batch_tokens: int
    """New tokens of a batch of several requests. A request with more runs alone."""
    max_batch_requests: int = 64


class PrefillPolicy(Generic[R, K]):
    """Picks by slack, bounded in the number of suspended tasks, and never deadlocks on KV cache.

    ``requests`` and ``tasks`` are queues of the same kind, so that their ranks compare. A task that holds KV may always
    run to its end: whatever else is refused (a suspension too many, a request whose KV does not fit), tasks are picked.
    """

    def __init__(self, requests: Queue[R], tasks: Queue[K], limits: Limits, batch_share: float = BATCH_SHARE) -> None:
        self.requests = requests
        self.tasks = tasks
        self.limits = limits
        self._batch_share = batch_share

    def pick(self, now_s: float, running: Job[K] | None, admit: bool = True) -> Job[R] | Job[K] | None:
        """The job to run at ``now_s``: a task (maybe ``running`` itself), a waiting request to start, or None.

        ``running`` is the task that executes now, if any; it is in ``tasks`` like the suspended ones. With ``admit``
        false no request is started (its KV did not fit, and nothing has been freed since).
        """
        task = self.tasks.best(now_s)
        request = self.requests.best(now_s) if admit and self._may_start(running) else None
        if request is None:
            return None if task is None else task[1]
        if task is None or request[0] < task[0]:
            return request[1]
        return task[1]

    def batch(
        self,
        winner: Job[R],
        now_s: float,
        new_tokens: Callable[[R], int],
        predict_s: Callable[[Sequence[R]], float],
    ) -> list[Job[R]]:
        """``winner`` and the waiting requests that join it, in order of priority.

        A request joins while the batch stays within the limits and is predicted to take no more than ``batch_share`` of
        the time that any member has until its deadline, if it can still meet it (SLO-aware batching; paper, section
        4.2, where a batch may take all of that time: what arrives later and goes first then costs all members their
        deadlines at once). Nothing joins a batch that has started.
        """
        tokens = new_tokens(winner.item)
        if tokens >= self.limits.max_batch_tokens:
            return [winner]
        members, time_left_s, too_large = [winner], [_time_left_s(winner, now_s)], 0
        for job in islice(self.requests.in_order(now_s), 2 * self.limits.max_batch_requests):
            if job is winner:
                continue
            of_job = new_tokens(job.item)
            if tokens + of_job > self.limits.max_batch_tokens:
                too_large += 1
                if too_large == TOO_LARGE:
                    break
                continue
            members.append(job)
            tokens += of_job
            time_left_s.append(min(time_left_s[-1], _time_left_s(job, now_s)))
        items = [member.item for member in members]

        def takes_too_long(requests: int) -> bool:
            return predict_s(items[:requests]) > self._batch_share * time_left_s[requests - 1]

        # The more requests, the longer they take and the less time they have.
        return members[: bisect_left(range(2, len(members) + 1), True, key=takes_too_long) + 1]

    def repaced(self) -> None:
        """Paces of jobs have changed: whoever changes them says so afterwards."""
        self.requests.repaced()
        self.tasks.repaced()

    def _may_start(self, running: Job[K] | None) -> bool:
        """Whether a new task may start: the running one would be suspended for it."""
        return running is None or len(self.tasks) <= self.limits.max_suspended


def _time_left_s(job: Job[R], now_s: float) -> float:
    """Time until the job's deadline; unbounded for a job that misses it anyway."""
    return job.deadline_s - now_s if job.latest_start_s >= now_s else math.inf


def make_policy(kind: str, limits: Limits, max_starvation_s: float) -> PrefillPolicy[R, K]:
    """The policy called ``kind``, one of POLICIES."""
    turns = StarvationTurns(STARVED_SHARE)
    if kind == "s-edf":
        return PrefillPolicy(SlackEdfQueue(max_starvation_s, turns), SlackEdfQueue(max_starvation_s, turns), limits)
    if kind == "s-edf-paper":
        return PrefillPolicy(SlackEdfQueue.as_published(), SlackEdfQueue.as_published(), limits, batch_share=1.0)
    if kind == "feasible":
        jobs = FeasibleSet(Forecast(FORECAST_WINDOW_S))
        return PrefillPolicy(
            FeasibleRequests(jobs, max_starvation_s, turns),
            FeasibleTasks(jobs, max_starvation_s, turns),
            limits,
        )
    if kind == "edf":
        return PrefillPolicy(StaticQueue(lambda job: job.deadline_s), StaticQueue(lambda job: job.deadline_s), limits)
    if kind == "fcfs":
        return PrefillPolicy(StaticQueue(lambda job: job.arrival_s), StaticQueue(lambda job: job.arrival_s), limits)
    raise ValueError(f"no policy is called {kind!r}; there are {', '.join(POLICIES)}")
