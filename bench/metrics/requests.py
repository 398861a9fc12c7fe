"""Figures of a run: attainment, goodput, TTFT, from the requests; preemptions and blocking, from the event log."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from sgl_flowprefill.bench.loadgen.replay import RequestResult
from sgl_flowprefill.events import AnyEvent, GiveBack, Step, Suspend, read_events

SLO_SCALES: Final = tuple(round(0.4 + 0.2 * step, 1) for step in range(9))
"""SLO scales of the paper: 0.4 to 2.0 in steps of 0.2."""
ATTAINMENTS: Final = (0.9, 0.99)
"""Shares of requests in time for which highest rates are told, where nobody asks for others."""


@dataclass(frozen=True)
class ClassSummary:
    """Figures of all requests of a run, or of one class. A request that failed is a miss; it has no TTFT."""

    requests: int
    completed: int
    ttft_attainment: float
    tbt_attainment_of_requests: float
    """Share of requests that had every token in time."""
    goodput_rps: float
    """Requests within their TTFT SLO, over the run's duration."""
    ttft_p50_s: float | None
    ttft_p99_s: float | None


@dataclass(frozen=True)
class RunSummary(ClassSummary):
    """Figures of a run and of its classes."""

    classes: Mapping[str, ClassSummary]
    attainment_by_slo_scale: Mapping[str, float]


class Suspension(NamedTuple):
    """One switch from a running task to another, as the event log has it. None for one that no news led to: nobody was
    blocked.
    """

    blocking_s: float | None
    """Until the request that won started."""
    stop_wait_s: float | None
    """The part of it until the running task stopped, without the hub's; 0 where it had stopped before the request could
    be read."""


@dataclass(frozen=True)
class StepSummary:
    """Decode steps of a run, and what became of prefills because of them."""

    decode_steps: int
    decode_share: float
    """Share of the run's time in steps."""
    streams_p50: float | None
    """Streams of a step, median."""
    step_lateness_p99_s: float | None
    """For the steps that had to begin, how much later they did."""
    give_backs: int


@dataclass(frozen=True)
class PreemptionSummary:
    """Preemptions of a run and how long the requests that won were blocked."""

    preemptions: int
    blocking_p50_s: float | None
    blocking_p99_s: float | None
    blocking_max_s: float | None
    blocking_mean_s: float | None
    switches_without_news: int = 0
    """Beside the preemptions: the policy changed its mind with nothing new to be run, say by corrected predictions."""


def summarise(results: Sequence[RequestResult], duration_s: float, classes: Sequence[str]) -> RunSummary:
    """Figures of a run that took ``duration_s``; ``classes`` gives the order."""
    by_class = {name: [result for result in results if result.request_class == name] for name in classes}
    return RunSummary(
        **dataclasses.asdict(_figures(results, duration_s)),
        classes={name: _figures(members, duration_s) for name, members in by_class.items()},
        attainment_by_slo_scale={f"{scale:.1f}": attainment(results, scale) for scale in SLO_SCALES},
    )


def attainment(results: Sequence[RequestResult], slo_scale: float = 1.0) -> float:
    """Share of requests that met ``slo_scale`` times their TTFT SLO; 0 if there is none."""
    return sum(result.meets_ttft(slo_scale) for result in results) / max(1, len(results))


def retractions(results: Sequence[RequestResult]) -> int | None:
    """How often answers lost their KV cache to others and were computed again; None where a server does not say."""
    streamed = [result for result in results if result.ttft_s is not None]
    told = [result.retractions for result in streamed if result.retractions is not None]
    return sum(told) if len(told) == len(streamed) else None


def tokens_per_s(results: Sequence[RequestResult], duration_s: float) -> float:
    """Tokens of answers per second of runs that took ``duration_s`` together."""
    return sum(result.output_tokens for result in results) / duration_s


def events_within(event_log: Path, spans_s: Sequence[tuple[float, float]]) -> list[AnyEvent]:
    """The events within spans of ``time.monotonic()``, in order; none without a log. Raises EventLogError."""
    events = read_events(event_log) if event_log.exists() else ()
    return [event for event in events if any(start_s <= event.t_s <= end_s for start_s, end_s in spans_s)]


def suspensions(events: Sequence[AnyEvent]) -> list[Suspension]:
    """The suspensions among ``events``, in order."""
    return [
        Suspension(event.blocking_s, max(0.0, event.stopped_s - event.readable_s))
        if event.blocking_s is not None and event.readable_s is not None
        else Suspension(None, None)
        for event in events
        if isinstance(event, Suspend)
    ]


def blocking_times_s(events: Sequence[AnyEvent]) -> list[float]:
    """Blocking time of each preemption among ``events``, in order."""
    return [one.blocking_s for one in suspensions(events) if one.blocking_s is not None]


def summarise_steps(events: Sequence[AnyEvent], duration_s: float) -> StepSummary | None:
    """Figures of the decode steps among the ``events`` of a run of ``duration_s``; None without any."""
    steps = [event for event in events if isinstance(event, Step)]
    if not steps:
        return None
    late_s = [step.begin_s - step.due_s for step in steps if step.due_s is not None]
    return StepSummary(
        decode_steps=len(steps),
        decode_share=sum(step.t_s - step.begin_s for step in steps) / duration_s,
        streams_p50=float(np.median([step.streams for step in steps])),
        step_lateness_p99_s=float(np.percentile(late_s, 99)) if late_s else None,
        give_backs=sum(isinstance(event, GiveBack) for event in events),
    )


def summarise_blocking(blocking_s: Sequence[float], without_news: int = 0) -> PreemptionSummary:
    """Figures of the preemptions of a run; None where there was none."""
    if not blocking_s:
        return PreemptionSummary(0, None, None, None, None, without_news)
    p50_s, p99_s = (float(value) for value in np.percentile(blocking_s, [50, 99]))
    mean_s = float(np.mean(blocking_s))
    return PreemptionSummary(len(blocking_s), p50_s, p99_s, max(blocking_s), mean_s, without_news)


def _figures(results: Sequence[RequestResult], duration_s: float) -> ClassSummary:
    ttft_s = [result.ttft_s for result in results if result.completed and result.ttft_s is not None]
    p50_s, p99_s = (float(value) for value in np.percentile(ttft_s, [50, 99])) if ttft_s else (None, None)
    return ClassSummary(
        requests=len(results),
        completed=sum(result.completed for result in results),
        ttft_attainment=attainment(results),
        tbt_attainment_of_requests=sum(result.meets_tbt() for result in results) / max(1, len(results)),
        goodput_rps=sum(result.meets_ttft() for result in results) / duration_s,
        ttft_p50_s=p50_s,
        ttft_p99_s=p99_s,
    )
