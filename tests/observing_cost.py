"""``python -m tests.observing_cost``: what each way of looking at a server adds to a scheduling event, in CPU time of
the scheduler's thread. With the endpoint of an OpenTelemetry collector as its argument, spans of traces, too.

Two recorders are told the same by turns, as the hub of a server that decodes tells its own: one that looks in this way,
and one that does not. Three events are measured, the most expensive ones: a request arrives and takes the place of a
running prefill; a decode step has run; and a prefill ends, its request is answered, and the suspended one goes on.
A timeline is made of the event log, and the live page of events in memory, both outside the scheduler; the answers that
the page asks for are events of their own (``tests/unit/test_live.py`` prints what they take).
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

if __name__ == "__main__":  # before the client library is imported: metrics are in files, as on a server
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp()

from prometheus_client import CollectorRegistry
from sglang.srt.observability.req_time_stats import SchedulerReqTimeStats
from sglang.srt.observability.trace import TraceNullContext, TraceReqContext, process_tracing_init
from sglang.srt.observability.trace_async import TraceReqContextAsync, start_trace_exporter, stop_trace_exporter

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import RecentEvents
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import Job, Limits, make_policy
from sgl_flowprefill.runtime.event_recorder import AnswerReports, EventRecorder
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.point_log import PointLog
from sgl_flowprefill.runtime.request_spans import SpanRecorder
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import Prediction, PrefillShape
from sgl_flowprefill.ttft.online import AdaptiveTTFT

ROUNDS: Final = 1000
WARM_UP: Final = 100
EVENTS: Final = ("arrival and preemption", "decode step", "end and resume")
SUSPENDED: Final = 4
"""Prefills that are suspended besides."""
LAYERS: Final = 32
NAMES: Final = [f"model.layers.{layer}.{module}" for layer in range(LAYERS) for module in ("self_attn", "mlp")]
PROGRESS: Final = Progress([True, False] * LAYERS, NAMES)
OBJECTIVE: Final = Objective(1.0, 0.1)
PREDICTION: Final = Prediction(0.1, 0.1, 0.12)

Tracing = Callable[[str], Any]
"""Makes SGLang's trace context of a request, by its id."""


def not_traced(rid: str) -> Any:
    return TraceNullContext()


class Req:
    """What recorders read of SGLang's Req, whose answer is over with its first token."""

    bootstrap_room = 7

    def __init__(self, rid: str, trace_ctx: Any) -> None:
        self.rid = rid
        self.origin_input_ids = self.origin_input_ids_unpadded = [1, 2, 3]
        self.time_stats = SchedulerReqTimeStats()
        self.time_stats.trace_ctx = trace_ctx

    def finished(self) -> bool:
        return True


class Told:
    """A recorder that is told what happens on a server on which one prefill runs, and others are suspended."""

    def __init__(
        self,
        *,
        recent: bool = True,
        reports: bool = True,
        metrics: bool = False,
        path: Path | None = None,
        points: bool = False,
        tracing: Tracing | None = None,
    ) -> None:
        """By default what a server has by default. ``path``: of the event log, which has interruption points with
        ``points``.
        """
        labels = dict.fromkeys(("model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank"), "0")
        self._recorder = (EventRecorder if tracing is None else SpanRecorder)(
            path,
            Metrics(labels, decodes=True, registry=CollectorRegistry()) if metrics else None,
            decodes=True,
            recent=RecentEvents(FlowPrefillConfig().recent_events) if recent else None,
        )
        self._reports = AnswerReports(self._recorder) if reports else None
        self._points = PointLog(self._recorder, PROGRESS) if points else None
        self._tracing = tracing or not_traced
        self._started = 0
        self._live: list[PrefillTask] = []
        work: Any = SimpleNamespace(
            waiting=(),
            policy=make_policy("feasible", Limits(16, 2048), 60.0),
            tasks=SimpleNamespace(live=self._live),
            ttft=AdaptiveTTFT(0.9, SimpleNamespace(predict_s=lambda batch: 0.1)),
            progress=PROGRESS,
        )
        self._recorder.watch(work, 4096.0)
        for _ in range(SUSPENDED):
            task = self._start()
            self._recorder.suspended(task, task, 0.0, 0.0, 0.0)
        self._running = self._start()
        self._recorder.resumed(self._running, time.monotonic())
        self._running.has_run = True

    def _start(self) -> PrefillTask:
        number, self._started = self._started, self._started + 1
        rid = f"request {number}"
        waiting = WaitingRequest(Req(rid, self._tracing(rid)), number, [1, 2, 3], PrefillShape(1000, 0), 0.0, 0)
        now_s = time.monotonic()
        task = PrefillTask(number, None, [waiting], [waiting.shape], now_s, now_s + 1.0, 0.1)
        self._live.append(task)
        return task

    def _pass_points(self, task: PrefillTask) -> None:
        """``task`` runs through the whole model, which is no event."""
        for passed in range(1, len(NAMES) + 1):
            task.operators_passed = passed
            if self._points is not None:
                self._points.passed(task)

    def round(self) -> Iterator[Callable[[], None]]:
        """The events, each to be called before the next one is asked for."""
        recorder, reports, points, running = self._recorder, self._reports, self._points, self._running
        winner = self._start()
        [member] = winner.members
        job: Job[WaitingRequest] = Job(member, winner.arrival_s, winner.deadline_s, 0.1)

        def preempt() -> None:
            if points is not None:
                points.stopped(running)
            now_s = time.monotonic()
            recorder.arrived(member.req, now_s, OBJECTIVE)
            recorder.ready(job)
            recorder.suspended(running, winner, now_s, now_s, now_s - 0.004)
            recorder.resumed(winner, now_s)
            recorder.decided(50e-6, now_s)

        def step() -> None:
            if points is not None:
                points.stopped(winner)
            now_s = time.monotonic()
            recorder.stepped(8, now_s - 0.01, now_s, now_s - 0.02, 0.01, 8, 1)
            recorder.decided(50e-6, now_s)

        def end() -> None:
            if points is not None:
                points.stopped(winner)
            now_s = time.monotonic()
            recorder.completed(winner, PREDICTION)
            recorder.answered(member.req, None, None)
            if reports is not None:
                reports.of(member.req)
                reports.forget_sent()
            recorder.resumed(running, now_s)
            recorder.decided(50e-6, now_s)

        self._pass_points(running)
        yield preempt
        self._pass_points(winner)
        winner.has_run = True
        yield step
        self._pass_points(winner)
        yield end
        self._live.remove(winner)


def spent_us(event: Callable[[], None]) -> float:
    begin_s = time.thread_time()
    event()
    return 1e6 * (time.thread_time() - begin_s)


def added_us(without: Told, looks: Told) -> dict[str, list[float]]:
    """What ``looks`` takes more than ``without``, for each event as often as it was measured."""
    added: dict[str, list[float]] = {name: [] for name in EVENTS}
    for number in range(WARM_UP + ROUNDS):
        sides = (without, looks) if number % 2 else (looks, without)
        for name, events in zip(EVENTS, zip(*(side.round() for side in sides), strict=True), strict=True):
            spent = dict(zip(sides, map(spent_us, events), strict=True))
            if number >= WARM_UP:
                added[name].append(spent[looks] - spent[without])
    return added


def ways(folder: Path) -> dict[str, tuple[Told, Told]]:
    """Without and with each way of looking."""
    return {
        "metrics": (Told(), Told(metrics=True)),
        "reports in answers": (Told(reports=False), Told()),
        "events in memory": (Told(recent=False), Told()),
        "event log": (Told(), Told(path=folder / "log")),
        "interruption points": (Told(path=folder / "plain"), Told(path=folder / "points", points=True)),
    }


def together(folder: Path) -> dict[str, tuple[Told, Told]]:
    """The same of what is a sum of ways, or pays for another that is off."""
    everything = Told(metrics=True, path=folder / "all", points=True)
    return {
        "all of these": (Told(recent=False, reports=False), everything),
        "metrics where answers have no reports": (Told(reports=False), Told(reports=False, metrics=True)),
    }


def traced(kind: type[TraceReqContext] | type[TraceReqContextAsync]) -> Tracing:
    """Contexts of requests that are in SGLang's span of their forward pass."""

    def tracing(rid: str) -> Any:
        context = kind(rid, role="unified", module_name="request")
        assert context.tracing_enable, "the process that makes spans is there"
        context.trace_req_start()
        context.trace_slice_start("prefill_forward", 1)
        return context

    return tracing


def rows(of: dict[str, tuple[Told, Told]], is_bounded: bool) -> Iterator[dict[str, Any]]:
    for way, (without, looks) in of.items():
        for event, added in added_us(without, looks).items():
            figures = {"median_us": statistics.median(added), "p99_us": statistics.quantiles(added, n=100)[-1]}
            yield {"way": way, "event": event, **figures, "is_bounded": is_bounded}


def main(endpoint: str | None = None) -> None:
    """Prints a row as JSON for each way and event. Sums are not bounded, and neither are the spans that OpenTelemetry
    makes in the scheduler's thread.
    """
    gc.collect()
    gc.freeze()  # as a server does
    folder = Path(tempfile.mkdtemp())
    try:
        measured = [*rows(ways(folder), is_bounded=True), *rows(together(folder), is_bounded=False)]
        if endpoint is not None:
            multiprocessing.set_start_method("spawn", force=True)  # as SGLang does
            process_tracing_init(endpoint, "scheduler")
            start_trace_exporter(endpoint, "scheduler")
            elsewhere, here = (Told(tracing=traced(kind)) for kind in (TraceReqContextAsync, TraceReqContext))
            measured += rows({"spans, made in another process": (Told(), elsewhere)}, is_bounded=True)
            measured += rows({"spans, made in the scheduler": (Told(), here)}, is_bounded=False)
            stop_trace_exporter()
        print(json.dumps(measured, indent=2))
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
