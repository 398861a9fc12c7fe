"""Figures of an event log: how busy the server was, with what, and how well it predicted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sgl_flowprefill.bench.metrics.requests import PreemptionSummary, summarise_blocking
from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Decoded,
    Fail,
    Leave,
    Log,
    Points,
    Ready,
    Start,
    Suspend,
)


@dataclass(frozen=True)
class LogSummary:
    """Figures of an event log."""

    span_s: float
    """From the first event of the log to the last."""
    requests: int
    answered: int
    """Requests whose prefill ended."""
    in_time: int
    """Requests whose prefill ended before their deadline; the client has the first token some milliseconds later."""
    aborted: int
    failed: int
    """Requests refused at the door, or lost on the way."""
    without_end: int
    """Requests under way when the log ends, or of a server that was killed, or of one that logged no failures."""
    busy_s: float
    """Time in which some request had arrived and not ended. One without an end counts only if it was running last."""
    forward_s: float
    """Part of ``busy_s`` that went by in forward passes."""
    forwards: int
    new_tokens: int
    between_forwards_p50_s: float | None
    """From the end of a forward to the start of a new one, where a request waited."""
    preemption: PreemptionSummary
    prediction_error_p50: float | None
    """Error of the corrected TTFT model, relative to the time that was measured."""
    prediction_error_p90: float | None
    over_profile: float | None
    """Measured time over the profile's: what the online correction has to make up for. Median."""


def summarise_log(events: Iterable[AnyEvent]) -> LogSummary:
    """Figures of ``events``, in the order of the log."""
    events = [event for event in events if not isinstance(event, Log | Points | Decoded)]
    lost = _lost_arrivals(events)
    deadlines_s: dict[str, float] = {}
    """Deadlines of the requests that wait for their answer."""
    tokens_of_task: dict[int, int] = {}
    forwards: list[Complete] = []
    gaps_s: list[float] = []
    blocking_s: list[float] = []
    without_news = arrived = answered = in_time = aborted = failed = new_tokens = 0
    busy_s = 0.0
    times_s: list[float] = []
    free_since_s: float | None = None
    for number, event in enumerate(events):
        now_s = event.t_s
        if deadlines_s:
            busy_s += now_s - times_s[-1]
        times_s.append(now_s)
        if isinstance(event, Arrival):
            if number not in lost:
                deadlines_s[event.rid] = event.deadline_s
            arrived += 1
            continue
        if isinstance(event, Ready | Leave):
            continue
        if isinstance(event, Start):
            tokens_of_task[event.task] = event.new_tokens
            if free_since_s is not None:
                gaps_s.append(now_s - free_since_s)
        elif isinstance(event, Suspend):
            if event.blocking_s is not None:
                blocking_s.append(event.blocking_s)
            else:
                without_news += 1
        elif isinstance(event, Complete):
            due_s = [deadlines_s.pop(rid) for rid in event.rids if rid in deadlines_s]
            if due_s:  # no health check
                forwards.append(event)
                new_tokens += tokens_of_task.get(event.task, 0)
            answered += len(due_s)
            in_time += sum(now_s <= deadline_s for deadline_s in due_s)
        elif isinstance(event, Abort | Fail):
            left = [rid for rid in event.rids if deadlines_s.pop(rid, None) is not None]
            aborted += len(left) if isinstance(event, Abort) else 0
            failed += len(left) if isinstance(event, Fail) else 0
        free_since_s = now_s if isinstance(event, Complete) and deadlines_s else None
    errors = [abs(end.expected_s / end.forward_s - 1) for end in forwards if end.forward_s > 0]
    over_profile = [end.forward_s / end.profiled_s for end in forwards if end.profiled_s > 0]
    return LogSummary(
        span_s=times_s[-1] - times_s[0] if times_s else 0.0,
        requests=arrived,
        answered=answered,
        in_time=in_time,
        aborted=aborted,
        failed=failed,
        without_end=arrived - answered - aborted - failed,
        busy_s=busy_s,
        forward_s=sum(end.forward_s for end in forwards),
        forwards=len(forwards),
        new_tokens=new_tokens,
        between_forwards_p50_s=_quantile(gaps_s, 50),
        preemption=summarise_blocking(blocking_s, without_news),
        prediction_error_p50=_quantile(errors, 50),
        prediction_error_p90=_quantile(errors, 90),
        over_profile=_quantile(over_profile, 50),
    )


def _lost_arrivals(events: Sequence[AnyEvent]) -> set[int]:
    """Positions of the arrivals that have no end in ``events`` and were not running when these end."""
    under_way: dict[str, int] = {}
    task_of: dict[str, int] = {}
    lost: set[int] = set()
    for number, event in enumerate(events):
        if isinstance(event, Arrival):
            lost.update({under_way[event.rid]} if event.rid in under_way else ())
            under_way[event.rid] = number
        elif isinstance(event, Start):
            # Tasks are counted up: one that is not shows a server that was started again, and its old tasks are gone.
            for rid in [rid for rid, task in task_of.items() if task >= event.task]:
                lost.add(under_way.pop(rid))
                del task_of[rid]
            task_of |= {rid: event.task for rid in event.rids if rid in under_way}
        elif isinstance(event, Complete | Abort | Fail):
            for rid in event.rids:
                under_way.pop(rid, None)
                task_of.pop(rid, None)
    return lost | {number for rid, number in under_way.items() if rid not in task_of}


def _quantile(values: list[float], percentile: float) -> float | None:
    return float(np.percentile(values, percentile)) if values else None
