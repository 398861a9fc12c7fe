"""What happens to requests and tasks, told to the event log and to Prometheus."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from sglang.srt.managers.utils import is_health_check_generate_req

from sgl_flowprefill.answers import report, to_carry
from sgl_flowprefill.carried import Carried
from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    EventLog,
    Fail,
    GiveBack,
    Leave,
    Ready,
    RecentEvents,
    Resume,
    Shed,
    Start,
    Step,
    Suspend,
    rounded,
)
from sgl_flowprefill.hub.device import Stamp
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.parts import Recorder, blocked_since_s
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.metrics import table
from sgl_flowprefill.outcomes import Outcome, Outcomes
from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.metrics import Metrics, Situation
from sgl_flowprefill.runtime.reporting_streamer import ReportingStreamer
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import Prediction

REASON_CHARS: Final = 200
LOST: Final = "it is in none of the scheduler's queues"
"""Why a request has ended that left on a way that nothing here knows of."""


class EventRecorder(EventLog, Recorder):
    """An event log with a method for each kind of event, which metrics go with. It sees to it that each request that
    has arrived ends once.
    """

    def __init__(
        self,
        path: str | Path | None,
        metrics: Metrics | None = None,
        decodes: bool = False,
        recent: RecentEvents | None = None,
    ) -> None:
        """``decodes``: the server decodes as well as it prefills."""
        super().__init__(path, recent)
        self._metrics = metrics
        self._outcomes = Outcomes(decodes)
        self._outcome_listeners: list[Callable[[Outcome], object]] = []
        self._answer_listeners: list[Callable[[Any, str | None, int | None], object]] = []
        self._progress = Progress([])
        self._suspended: dict[int, tuple[PrefillTask, float]] = {}
        """By id the tasks that are suspended and since when, in that order."""
        self._counted_spans: dict[int, int] = {}
        """By id of tasks that went on, how many of their spans metrics have counted."""
        self._unwound_spans: list[tuple[Stamp, Stamp]] = []
        """Those that metrics have not counted of tasks that were unwound."""
        self._open: set[Any] = set()
        """The requests (SGLang's Req) that have arrived and not ended."""
        self._ready: set[Any] = set()
        """The requests among them that can be run, or are."""
        self._computed: set[Any] = set()
        """The requests whose prefill has run and which have not left."""
        self._abort_asked: set[Any] = set()
        """The requests that somebody wants aborted; some have still to arrive."""
        if metrics is not None:
            self.listen(metrics.read)
            self.on_outcome(metrics.ended)

    def on_outcome(self, listener: Callable[[Outcome], object]) -> None:
        """``listener(outcome)`` is called for each request, from now on, once it is known what became of it."""
        if not self._outcome_listeners:
            self.listen(self._read)
        self._outcome_listeners.append(listener)

    def on_answer(self, listener: Callable[[Any, str | None, int | None], object]) -> None:
        """``listener`` is called as ``answered`` is, from now on."""
        self._answer_listeners.append(listener)

    def if_late(self, rid: str) -> Outcome | None:
        """As ``Outcomes.if_late``, where somebody listens to outcomes."""
        return self._outcomes.if_late(rid)

    def _read(self, event: AnyEvent) -> None:
        for outcome in self._outcomes.read(event):
            for listener in self._outcome_listeners:
                listener(outcome)

    def arrived(self, req: Any, received_s: float, objective: Objective) -> None:
        if not self.is_written or req in self._open or is_health_check_generate_req(req):
            return
        self._open.add(req)
        self.write(
            Arrival,
            time.monotonic(),
            rid=req.rid,
            # SGLang replaces the prompt of one that it refuses.
            prompt_tokens=max(len(req.origin_input_ids), len(req.origin_input_ids_unpadded)),
            ttft_slo_s=objective.ttft_s,
            deadline_s=round(received_s + objective.ttft_s, 6),
            received_s=round(received_s, 6),
            slo_class=objective.slo_class,
            slo_source=objective.slo_source,
            bootstrap_room=req.bootstrap_room,
        )

    def ready(self, job: Job[WaitingRequest]) -> None:
        waiting = job.item
        if waiting.req in self._open:
            self._ready.add(waiting.req)
            self.write(
                Ready,
                time.monotonic(),
                rid=waiting.req.rid,
                readable_s=round(waiting.readable_s, 6),
                new_tokens=waiting.shape.new_tokens,
                cached_tokens=waiting.shape.cached_tokens,
                predicted_s=round(job.remaining_s, 6),
            )

    def shed(self, jobs: Sequence[Job[WaitingRequest]], backlog_s: float, retry_after_s: int) -> None:
        for job in jobs:
            self.write(
                Shed,
                time.monotonic(),
                rid=job.item.req.rid,
                predicted_s=round(job.remaining_s, 6),
                backlog_s=round(backlog_s, 6),
                retry_after_s=retry_after_s,
            )

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        readable_s = blocked_since_s(winner, now_s, news_readable_s)
        blocking_s = None if readable_s is None else now_s - readable_s
        self._suspended[task.id] = (task, stopped_s)
        if self._metrics is not None and readable_s is not None:
            self._metrics.preempted(now_s - readable_s, max(0.0, stopped_s - readable_s))
        self.write(
            Suspend,
            now_s,
            task=task.id,
            rids=task.rids,
            checkpoint=task.operators_passed,
            for_rids=winner.rids,
            readable_s=rounded(readable_s),
            stopped_s=round(stopped_s, 6),
            blocking_s=rounded(blocking_s),
            after=self._progress.behind(task.operators_passed),
            tiles=task.tiles_passed,
        )

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        _, suspended_s = self._suspended.pop(task.id, (task, None))
        if self._metrics is not None and suspended_s is not None:
            self._metrics.resumed(now_s - suspended_s)
        if task.has_run:
            self._count_forward(task, goes_on=True)
            self.write(Resume, now_s, task=task.id, rids=task.rids, checkpoint=task.operators_passed)
            return
        self.write(
            Start,
            now_s,
            task=task.id,
            rids=task.rids,
            new_tokens=task.new_tokens,
            cached_tokens=sum(shape.cached_tokens for shape in task.shapes),
            predicted_s=round(task.predicted_s, 6),
        )

    def completed(self, task: PrefillTask, prediction: Prediction) -> None:
        """Members whose abort was asked for end as aborted, when SGLang drops them."""
        self._suspended.pop(task.id, None)
        ended = [
            req
            for req in task.reqs
            if is_health_check_generate_req(req) or (req in self._open and req not in self._abort_asked)
        ]
        self._computed.update(self._open.intersection(ended))
        self.write(
            Complete,
            time.monotonic(),
            task=task.id,
            rids=self._close(ended),
            checkpoint=task.operators_passed,
            forward_s=round(task.executed_s, 6),
            predicted_s=round(task.predicted_s, 6),
            expected_s=round(prediction.expected_s, 6),
            profiled_s=round(prediction.raw_s, 6),
        )
        self._count_forward(task)
        self._count_unwound()
        if self._metrics is not None:
            self._metrics.completed(task.executed_s, prediction.expected_s)

    def dropped(self, task: PrefillTask) -> None:
        """Members that have ended already are not named."""
        self._suspended.pop(task.id, None)
        rids = self._close([req for req in task.reqs if req in self._open])
        self.write(Abort, time.monotonic(), rids=rids, task=task.id, checkpoint=task.operators_passed)
        self._count_later(task)

    def given_back(self, task: PrefillTask) -> None:
        self._suspended.pop(task.id, None)
        self.write(GiveBack, time.monotonic(), task=task.id, rids=task.rids, checkpoint=task.operators_passed)
        self._count_later(task)
        if self._metrics is not None:
            self._metrics.given_back()

    def _count_forward(self, task: PrefillTask, goes_on: bool = False) -> None:
        """Tell metrics for how long ``task`` has run since they were told last. Not at a suspension: the device may
        still have its last operators to run, and would be waited for.
        """
        if self._metrics is None:
            return
        self._metrics.ran(_sum_s(task.spans[self._counted_spans.pop(task.id, 0) :]))
        if goes_on:
            self._counted_spans[task.id] = len(task.spans)

    def _count_later(self, task: PrefillTask) -> None:
        """``task`` is unwound, and the device may still have its last operators to run, as at a suspension."""
        counted = self._counted_spans.pop(task.id, 0)
        if self._metrics is not None:
            self._unwound_spans += task.spans[counted:]

    def _count_unwound(self) -> None:
        """Tell metrics for how long tasks ran that were unwound: another one is done by now, or nothing runs."""
        if self._metrics is not None and self._unwound_spans:
            self._metrics.ran(_sum_s(self._unwound_spans))
            self._unwound_spans.clear()

    def decided(self, cost_s: float, now_s: float) -> float:
        return math.inf if self._metrics is None else self._metrics.decided(cost_s, now_s)

    def flush(self) -> None:
        self._count_unwound()
        if self._metrics is not None:
            self._metrics.rest(time.monotonic())
        super().flush()

    def watch(self, work: Work, token_bytes: float) -> None:
        """Metrics show what waits and has started of ``work``, whose modules events name; ``token_bytes`` is what a
        suspended task holds for each of its new tokens.
        """
        self._progress = work.progress
        if self._metrics is not None:
            self._metrics.watch(partial(self._situation, work, token_bytes), work.ttft.state)

    def _situation(self, work: Work, token_bytes: float, now_s: float) -> Situation:
        waiting, infeasible = len(work.waiting), work.policy.infeasible_waiting
        queue = {table.NOT_READY: len(self._open) - len(self._ready)}
        if infeasible is None:
            queue[table.NOT_JUDGED] = waiting
        else:
            queue |= {table.FEASIBLE: waiting - infeasible, table.INFEASIBLE: infeasible}
        suspended = list(self._suspended.values())
        return Situation(
            queue,
            live_tasks=len(work.tasks.live),
            suspended_tasks=len(suspended),
            suspended_bytes=round(token_bytes * sum(task.new_tokens for task, _ in suspended)),
            oldest_suspended_s=now_s - suspended[0][1] if suspended else 0.0,
        )

    def explored(self, time_s: float) -> None:
        """The event log is of requests: metrics alone hear of it."""
        if self._metrics is not None:
            self._metrics.explored(time_s)

    def stepped(
        self, streams: int, begin_s: float, end_s: float, due_s: float, took_s: float, tokens: int, late_tokens: int
    ) -> None:
        """A decode step over so many ``streams`` has run. It had to begin at ``due_s``, and took ``took_s``, what the
        device had to run before it left out.
        """
        was_due = begin_s >= due_s
        self.write(Step, end_s, streams=streams, begin_s=round(begin_s, 6), due_s=round(due_s, 6) if was_due else None)
        if self._metrics is not None:
            self._metrics.stepped(took_s, begin_s - due_s if was_due else None, tokens, late_tokens)

    def got_tokens(self, tokens: int, late_tokens: int) -> None:
        """Streams have got ``tokens`` otherwise than by a decode step, ``late_tokens`` of them later than their
        objectives say.
        """
        if self._metrics is not None:
            self._metrics.got_tokens(tokens, late_tokens)

    def failed(self, task: PrefillTask, failure: Failure) -> None:
        """Members whose abort was asked for end as aborted, when SGLang drops them."""
        self._suspended.pop(task.id, None)
        rids = self._close([req for req in task.reqs if req in self._open and req not in self._abort_asked])
        self.write(
            Fail,
            time.monotonic(),
            rids=rids,
            task=task.id,
            checkpoint=task.operators_passed,
            http_status=int(HTTPStatus.INTERNAL_SERVER_ERROR),
            reason=failure.message[:REASON_CHARS],
        )
        self._count_later(task)

    def abort_asked(self, reqs: Iterable[Any]) -> None:
        """``reqs`` are to be aborted, wherever they are."""
        if self.is_written:
            self._abort_asked.update(req for req in reqs if not is_health_check_generate_req(req))

    def answered(self, req: Any, reason: str | None, http_status: int | None) -> None:
        """The client hears the last of ``req`` from this server: an answer, its KV cache being with the decode server,
        or a ``reason`` why it gets none.
        """
        for listener in self._answer_listeners:
            listener(req, reason, http_status)
        now_s, asked = time.monotonic(), req in self._abort_asked
        if req in self._computed:
            self._computed.remove(req)
            self._abort_asked.discard(req)
            if reason is None:
                self.write(Leave, now_s, rid=req.rid)
            else:
                self.write(Leave, now_s, rid=req.rid, reason=reason[:REASON_CHARS], aborted=asked)
        elif req in self._open:
            rids = self._close([req])
            if asked:
                self.write(Abort, now_s, rids=rids)
            else:
                self.write(Fail, now_s, rids=rids, http_status=http_status, reason=str(reason)[:REASON_CHARS])

    def close_lost(self, held: Iterable[Any]) -> None:
        """End the requests that are not among ``held``, the scheduler's."""
        for req in self._open.difference(held):
            self.answered(req, LOST, None)

    def _close(self, reqs: Sequence[Any]) -> list[str]:
        """Ids of ``reqs``, which have ended."""
        self._open.difference_update(reqs)
        self._ready.difference_update(reqs)
        self._abort_asked.difference_update(reqs)
        return [req.rid for req in reqs]


def _sum_s(spans: Iterable[tuple[Stamp, Stamp]]) -> float:
    """Device time of ``spans``, which the device is waited for to pass."""
    return sum(begin.seconds_until(end) for begin, end in spans)


class AnswerReports:
    """What answers say of their requests: outcomes, until the last events of the answers have been sent."""

    def __init__(self, recorder: EventRecorder) -> None:
        self._recorder = recorder
        self._outcomes: dict[str, Outcome] = {}
        self._over: list[str] = []
        """Requests whose last event is being sent."""
        recorder.on_outcome(self._note)
        recorder.listen(self._look_for_end)

    def __len__(self) -> int:
        """Requests whose outcome is known, and whose answer is not over."""
        return len(self._outcomes)

    def of(self, req: Any) -> list[dict[str, Any]]:
        """The report that goes with what is sent of SGLang's ``req`` now: one with its last event, none before."""
        outcome = self._outcomes.get(req.rid) if req.finished() else None
        return [] if outcome is None else [report(outcome)]

    def to_carry(self, req: Any) -> Carried | None:
        """What the decode server is told of SGLang's ``req``, whose prefill has run; None where nothing is known of it,
        as of a health check.
        """
        outcome = self._recorder.if_late(req.rid)
        return None if outcome is None else to_carry(outcome)

    def forget_sent(self) -> None:
        """The last events have been sent."""
        for rid in self._over:
            self._outcomes.pop(rid, None)
        self._over.clear()

    def _note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.rid] = outcome
        if outcome.course.first_token_s is None:
            self._over.append(outcome.rid)

    def _look_for_end(self, event: AnyEvent) -> None:
        if isinstance(event, Leave):
            self._over.append(event.rid)


class RecordedStreamer(ReportingStreamer):
    """Tells the event recorder of the last event of each answer, and adds its report."""

    recorder: EventRecorder | None = None
    """Set on the instance, when the scheduler is ready to serve."""
    reports: AnswerReports | None = None
    """Likewise, where answers have reports."""

    @property
    def has_additional_customized_info(self) -> bool:
        return self.reports is not None and super().has_additional_customized_info

    def stream_output(self, reqs: Sequence[Any], return_logprob: bool, skip_req: Any = None) -> None:
        if self.recorder is not None:
            for req in reqs:
                if req.finished() and not req.finished_output:
                    reason = req.finished_reason.to_json()
                    self.recorder.answered(req, reason.get("message"), reason.get("status_code"))
        super().stream_output(reqs, return_logprob, skip_req)
        if self.reports is not None:
            self.reports.forget_sent()

    def _report(self, req: Any) -> list[dict[str, Any]]:
        return [] if self.reports is None else self.reports.of(req)
