"""The limit: how many requests of a trace any scheduler could serve in time, knowing all arrivals in advance.

An upper bound, not an achievable value: preemption is free, parts of requests count, batches are always full, and
several instances are one that is as fast as all of them. ``docs/simulator.md`` proves it. Where a machine becomes
slower, the time at which it does is known in advance, too.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np

from sgl_flowprefill.bench.metrics.joint import LATE_SHARE
from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.instance import STEADY, Slowdown
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.step_cost import StepCost

ROUNDING_S: Final = 1e-9
MAX_GROUP: Final = 1500
"""Jobs that are bounded together: time and memory grow with the cube and the square of it."""


class Work(NamedTuple):
    """Machine time that must be spent between two instants."""

    release_s: float
    deadline_s: float
    work_s: float


def attainment_limit(
    requests: Sequence[SimRequest],
    cost: CostModel,
    max_batch_tokens: int,
    instances: int = 1,
    slowdown: Slowdown = STEADY,
) -> float:
    """Upper bound of the attainment on ``instances`` instances whose forwards have at most ``max_batch_tokens`` new
    tokens or one request alone. It ignores KV cache, transfers and routing, which only cost time."""

    def work(request: SimRequest) -> Work:
        return Work(request.ready_s, request.deadline_s, cost.least_s(request.shape, max_batch_tokens))

    return _limit(requests, cost, instances, slowdown, work)


def joint_limit(
    requests: Sequence[SimRequest],
    cost: CostModel,
    steps: StepCost,
    max_batch_tokens: int,
    instances: int = 1,
    slowdown: Slowdown = STEADY,
) -> float:
    """Upper bound of the joint attainment of servers that prefill and decode: first tokens in time, and at most
    LATE_SHARE of the gaps late.

    It is the lower one of two bounds, of which ``attainment_limit`` is one. For the other, an answer that may have no
    late gap has ended by its TTFT objective and all its gaps, and until then its prompt and its tokens take their time.
    A token is charged what a step takes for a stream and for its context, and nothing of a step's fixed time. An answer
    of 100 gaps and more may have a late one of any length, and is charged for its prompt alone.
    """
    is_charged = cost.floor_s <= cost.fixed_s + cost.per_token_s * max_batch_tokens  # else tokens may come for nothing

    def work(request: SimRequest) -> Work:
        work_s, gaps = cost.least_s(request.shape, max_batch_tokens), request.output_tokens - 1
        if not gaps or gaps * LATE_SHARE >= 1 or not is_charged:
            return Work(request.ready_s, request.deadline_s, work_s)
        context_tokens = gaps * sum(request.shape) + gaps * (gaps - 1) // 2
        answer_s = steps.per_request_s * gaps + steps.per_context_s * context_tokens
        return Work(request.ready_s, request.deadline_s + gaps * request.tbt_slo_s, work_s + answer_s)

    by_first_token = attainment_limit(requests, cost, max_batch_tokens, instances, slowdown)
    return min(by_first_token, _limit(requests, cost, instances, slowdown, work))


def _limit(
    requests: Sequence[SimRequest],
    cost: CostModel,
    instances: int,
    slowdown: Slowdown,
    work: Callable[[SimRequest], Work],
) -> float:
    """Share of ``requests`` whose ``work`` one machine does in time, as fast as all ``instances``; requests whose first
    tokens are late even alone do not count. Time is counted by what a machine computes in it.
    """
    jobs = []
    for request in requests:
        alone_s = slowdown.end_s(request.ready_s, cost.predict_s((request.shape,)))
        if alone_s <= request.deadline_s + ROUNDING_S:
            release_s, deadline_s, work_s = work(request)
            jobs.append(Work(slowdown.work_s(release_s), slowdown.work_s(deadline_s), work_s / instances))
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
    return len(jobs) if edf_meets_all(jobs) else math.floor(fractional_optimum(jobs) + 1e-6)


def edf_meets_all(jobs: list[Work]) -> bool:
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
