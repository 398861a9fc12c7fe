"""The limit: how many requests of a trace any scheduler could serve in time, knowing all arrivals in advance.

An upper bound, not an achievable value: preemption is free, parts of requests count, batches are always full, and
several instances are one that is as fast as all of them. ``docs/simulator.md`` proves it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.requests import SimRequest

ROUNDING_S: Final = 1e-9
MAX_GROUP: Final = 1500
"""Jobs that are bounded together: time and memory grow with the cube and the square of it."""


class Work(NamedTuple):
    """Machine time that must be spent between two instants."""

    release_s: float
    deadline_s: float
    work_s: float


def attainment_limit(
    requests: Sequence[SimRequest], cost: CostModel, max_batch_tokens: int, instances: int = 1
) -> float:
    """Upper bound of the attainment on ``instances`` instances whose forwards have at most ``max_batch_tokens`` new
    tokens or one request alone. It ignores KV cache, transfers and routing, which only cost time."""
    jobs = []
    for request in requests:
        if request.ready_s + cost.predict_s((request.shape,)) <= request.deadline_s + ROUNDING_S:
            work_s = cost.least_s(request.shape, max_batch_tokens) / instances
            jobs.append(Work(request.ready_s, request.deadline_s, work_s))
    return most_on_time(jobs) / max(1, len(requests))


def most_on_time(jobs: Sequence[Work]) -> int:
    """Upper bound of how many of ``jobs`` one machine completes by their deadlines, with preemption."""
    return sum(_bound(group) for busy in _busy_periods(jobs) for group in _groups(busy))


def _busy_periods(jobs: Sequence[Work]) -> Iterator[list[Work]]:
    """``jobs`` split where a machine that never rests has nothing left to do: no split changes the optimum."""
    busy: list[Work] = []
    free_s = -math.inf
    for job in sorted(jobs):
        if busy and job.release_s >= free_s:
            yield busy
            busy = []
        free_s = max(free_s, job.release_s) + job.work_s
        busy.append(job)
    if busy:
        yield busy


def _groups(jobs: list[Work]) -> Iterator[list[Work]]:
    """A long busy period in parts, each of which gets a machine of its own: that can only raise the bound."""
    parts = math.ceil(len(jobs) / MAX_GROUP)
    size = math.ceil(len(jobs) / parts)
    return (jobs[start : start + size] for start in range(0, len(jobs), size))


def _bound(jobs: list[Work]) -> int:
    return len(jobs) if _edf_meets_all(jobs) else math.floor(fractional_optimum(jobs) + 1e-6)


def _edf_meets_all(jobs: list[Work]) -> bool:
    """Whether preemptive earliest deadline first, which meets all deadlines if anything does, meets them."""
    ready: list[list[float]] = []  # [deadline, work left]
    now_s = -math.inf
    for job, next_job in zip(jobs, [*jobs[1:], None], strict=True):
        now_s = max(now_s, job.release_s)
        heapq.heappush(ready, [job.deadline_s, job.work_s])
        until_s = next_job.release_s if next_job else math.inf
        while ready and now_s < until_s:
            first = ready[0]
            ran_s = min(first[1], until_s - now_s)
            now_s += ran_s
            first[1] -= ran_s
            if now_s > first[0] + ROUNDING_S:
                return False
            if first[1] <= ROUNDING_S:
                heapq.heappop(ready)
    return True


def fractional_optimum(jobs: Sequence[Work]) -> float:
    """Most jobs on time when a part of a job counts as that part: greedy, shortest work first, is optimal.

    ``room[a, b]`` is the time between release a and deadline b that jobs with windows inside do not take; each job gets
    as much of its work as the tightest interval around its window has room for.
    """
    releases = np.unique([job.release_s for job in jobs])
    deadlines = np.unique([job.deadline_s for job in jobs])
    room = deadlines[None, :] - releases[:, None]
    room[room <= 0] = math.inf
    firsts = np.searchsorted(releases, [job.release_s for job in jobs])
    lasts = np.searchsorted(deadlines, [job.deadline_s for job in jobs])
    total = 0.0
    for place in np.argsort([job.work_s for job in jobs], kind="stable"):
        around = room[: firsts[place] + 1, lasts[place] :]
        work_s = jobs[place].work_s
        served_s = min(work_s, max(0.0, float(around.min())))
        around -= served_s
        total += served_s / work_s
    return total
