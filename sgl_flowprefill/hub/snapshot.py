"""What a hub does now, as those who watch see it: made of the policy's own objects, between two turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.live.state import MOST_RIDS, MOST_WAITING, State, Task, Waiting
from sgl_flowprefill.policy import Standing


def snapshot(
    work: Work,
    policy: str,
    now_s: float,
    *,
    decodes: bool = False,
    is_paused: bool = False,
    kv_is_short: bool = False,
    not_ready: int = 0,
    most_waiting: int = MOST_WAITING,
) -> State:
    """The state of a hub whose ``work`` is ordered by ``policy``. It costs no more when more than ``most_waiting``
    requests wait, and touches neither device nor ranks.
    """
    order, tasks, colocated = work.policy, work.tasks, work.colocated
    waiting = order.first_waiting(now_s, most_waiting)
    live = sorted(tasks.live, key=lambda task: task is not tasks.running)
    standings = order.standings([*waiting, *(task.job for task in live)], now_s)
    step_by_s = colocated.step_by_s
    return State(
        policy=policy,
        decodes=decodes,
        is_paused=is_paused,
        kv_is_short=kv_is_short,
        correction=work.ttft.correction,
        tasks=_tasks(work, live, standings[len(waiting) :], now_s),
        waiting=[
            Waiting(
                job.item.req.rid,
                job.item.shape.new_tokens,
                job.item.shape.cached_tokens,
                now_s - job.arrival_s,
                job.remaining_s,
                job.deadline_s - now_s,
                standing,
            )
            for job, standing in zip(waiting, standings, strict=False)
        ],
        waiting_requests=len(work.waiting),
        not_ready=not_ready,
        streams=colocated.streams.requests,
        step_runs=any(isinstance(done, DecodeStep) for done in tasks.finishing),
        step_due_s=step_by_s - now_s if step_by_s < math.inf and colocated.may_step else None,
    )


def _tasks(work: Work, live: Sequence[PrefillTask], standings: Sequence[Standing], now_s: float) -> list[Task]:
    found = []
    for task, standing in zip(live, standings, strict=True):
        left_s = work.remaining_s(task) if task is work.tasks.running else task.job.remaining_s
        found.append(
            Task(
                task.id,
                task.rids[:MOST_RIDS],
                len(task.members),
                task.new_tokens,
                sum(shape.cached_tokens for shape in task.shapes),
                task is work.tasks.running,
                1.0 - left_s / task.predicted_s if task.predicted_s > 0 else 0.0,
                left_s,
                task.deadline_s - now_s,
                standing,
            )
        )
    return found
