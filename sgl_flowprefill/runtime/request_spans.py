"""FlowPrefill's part of SGLang's OpenTelemetry trace of a request (``--enable-trace``): where its prefill ran, was
suspended, or let decode steps by, inside SGLang's span ``prefill_forward``.

A span is written when it is over, with SGLang's own method for spans. docs/operations.md says what is in them. Times
are the scheduler's: on a GPU, the operators that it has queued by then run a little later.
"""

from __future__ import annotations

import time
from typing import Any, Final, NamedTuple

from sglang.srt.observability.req_time_stats import RequestStageConfig, convert_time_to_realtime_ns

from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.ttft import Prediction

Attributes = dict[str, bool | int | float | str | list[str]]

RUN: Final = RequestStageConfig("flowprefill_run", level=2)
SUSPENDED: Final = RequestStageConfig("flowprefill_suspended", level=2)
STEP: Final = RequestStageConfig("flowprefill_decode_step", level=3)
"""As detailed as SGLang's own spans of the steps of a stream."""
CAN_RUN: Final = "flowprefill_can_run"
"""An event in SGLang's span ``prefill_waiting``."""


class Span(NamedTuple):
    """What a task does, until something else begins."""

    stage: RequestStageConfig
    begin_s: float
    attributes: Attributes


class RequestSpans:
    """Writes what tasks do, into the traces of their requests."""

    def __init__(self) -> None:
        self._spans: dict[PrefillTask, Span] = {}
        self._running: PrefillTask | None = None

    def __len__(self) -> int:
        """Tasks that are under way."""
        return len(self._spans)

    def can_run(self, job: Job[WaitingRequest], now_s: float) -> None:
        """The request of ``job`` could be started from now on."""
        waiting = job.item
        waiting.req.time_stats.trace_ctx.trace_event(
            CAN_RUN,
            RUN.level,
            convert_time_to_realtime_ns(now_s),
            {
                "slack_s": job.slack_s(now_s),
                "predicted_s": job.remaining_s,
                "new_tokens": waiting.shape.new_tokens,
                "cached_tokens": waiting.shape.cached_tokens,
            },
        )

    def run(self, task: PrefillTask, now_s: float) -> None:
        """``task`` runs from now on. One that ran until now without being suspended is done."""
        if self._running is not None:
            self.end(self._running, now_s)
        self.end(task, now_s)
        started: Attributes = {"task": task.id, "requests": len(task.members), "slack_s": task.job.slack_s(now_s)}
        self._running, self._spans[task] = task, Span(RUN, now_s, started)

    def suspend(self, task: PrefillTask, winner: PrefillTask, stopped_s: float) -> None:
        self.end(task, stopped_s)
        self._spans[task] = Span(SUSPENDED, stopped_s, {"for_rids": winner.rids, "checkpoint": task.operators_passed})

    def step(self, begin_s: float, end_s: float, streams: int) -> None:
        """A decode step has run, for which the task that runs was left where it was."""
        if self._running is not None:
            span = Span(STEP, max(begin_s, self._spans[self._running].begin_s), {"streams": streams})
            _write(self._running, span, end_s)

    def end(self, task: PrefillTask, end_s: float) -> None:
        """What ``task`` does is over."""
        span = self._spans.pop(task, None)
        if self._running is task:
            self._running = None
        if span is not None:
            _write(task, span, end_s)


def _write(task: PrefillTask, span: Span, end_s: float) -> None:
    if end_s > span.begin_s:
        for req in task.reqs:
            req.time_stats.trace_slice(span.stage, span.begin_s, end_s, span.attributes)


class SpanRecorder(EventRecorder):
    """An event recorder that has spans written, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spans: Final = RequestSpans()

    def ready(self, job: Job[WaitingRequest]) -> None:
        super().ready(job)
        self.spans.can_run(job, time.monotonic())

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        super().suspended(task, winner, stopped_s, now_s, news_readable_s)
        self.spans.suspend(task, winner, stopped_s)

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        super().resumed(task, now_s)
        self.spans.run(task, now_s)

    def stepped(
        self, streams: int, begin_s: float, end_s: float, due_s: float, took_s: float, tokens: int, late_tokens: int
    ) -> None:
        super().stepped(streams, begin_s, end_s, due_s, took_s, tokens, late_tokens)
        self.spans.step(begin_s, end_s, streams)

    def completed(self, task: PrefillTask, prediction: Prediction) -> None:
        super().completed(task, prediction)
        self.spans.end(task, time.monotonic())

    def dropped(self, task: PrefillTask) -> None:
        super().dropped(task)
        self.spans.end(task, time.monotonic())

    def given_back(self, task: PrefillTask) -> None:
        super().given_back(task)
        self.spans.end(task, time.monotonic())

    def failed(self, task: PrefillTask, failure: Failure) -> None:
        super().failed(task, failure)
        self.spans.end(task, time.monotonic())
