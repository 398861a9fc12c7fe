"""What happens to requests and tasks, told to the event log and to Prometheus."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from sglang.srt.managers.scheduler_components.output_streamer import SchedulerOutputStreamer
from sglang.srt.managers.utils import is_health_check_generate_req

from sgl_flowprefill.events import Abort, Arrival, Complete, EventLog, Fail, GiveBack, Resume, Start, Step, Suspend
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.parts import TTFT, Recorder
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.ttft import Prediction

REASON_CHARS: Final = 200


class EventRecorder(EventLog, Recorder):
    """An event log with a method for each kind of event, which metrics go with. It sees to it that each request that
    has arrived ends once.
    """

    def __init__(self, path: str | Path | None, metrics: Metrics | None = None) -> None:
        super().__init__(path)
        self._metrics = metrics
        self._open: set[Any] = set()
        """The requests (SGLang's Req) that have arrived and not ended."""
        self._abort_asked: set[Any] = set()
        """The requests that somebody wants aborted; some have still to arrive."""

    def arrived(self, req: Any, received_s: float, slo_s: float) -> None:
        if not self.is_written or req in self._open or is_health_check_generate_req(req):
            return
        self._open.add(req)
        self.write(
            Arrival,
            time.monotonic(),
            rid=req.rid,
            # SGLang replaces the prompt of one that it refuses.
            prompt_tokens=max(len(req.origin_input_ids), len(req.origin_input_ids_unpadded)),
            ttft_slo_s=slo_s,
            deadline_s=round(received_s + slo_s, 6),
            received_s=round(received_s, 6),
        )

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        """``task``, which ran until ``stopped_s``, waits for ``winner``. The first news that led to it could have been
        read at ``news_readable_s``; infinity without any.
        """
        # A winner that lost an earlier decision wins because of what has happened since, and waits for it from then on.
        readable_s = min(now_s, max(winner.readable_s, news_readable_s)) if news_readable_s < math.inf else None
        blocking_s = None if readable_s is None else now_s - readable_s
        if self._metrics is not None:
            self._metrics.preempted(blocking_s)
        self.write(
            Suspend,
            now_s,
            task=task.id,
            rids=task.rids,
            checkpoint=task.checkpoint,
            for_rids=winner.rids,
            readable_s=readable_s and round(readable_s, 6),
            stopped_s=round(stopped_s, 6),
            blocking_s=blocking_s and round(blocking_s, 6),
        )

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        """``task`` runs, for the first time or again."""
        if task.has_run:
            self.write(Resume, now_s, task=task.id, rids=task.rids, checkpoint=task.checkpoint)
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

    def completed(self, task: PrefillTask, prediction: Prediction, ttft: TTFT, live_tasks: int) -> None:
        """``prediction`` is what ``ttft`` says of it now that it has run. Members whose abort was asked for end as
        aborted, when SGLang drops them.
        """
        ended = [
            req
            for req in task.reqs
            if is_health_check_generate_req(req) or (req in self._open and req not in self._abort_asked)
        ]
        self.write(
            Complete,
            time.monotonic(),
            task=task.id,
            rids=self._close(ended),
            checkpoint=task.checkpoint,
            forward_s=round(task.executed_s, 6),
            predicted_s=round(task.predicted_s, 6),
            expected_s=round(prediction.expected_s, 6),
            profiled_s=round(prediction.raw_s, 6),
        )
        if self._metrics is not None:
            self._metrics.completed(ttft.state(), live_tasks)

    def dropped(self, task: PrefillTask) -> None:
        """``task`` is unwound: nobody waits for it any more. Members that have ended already are not named."""
        rids = self._close([req for req in task.reqs if req in self._open])
        self.write(Abort, time.monotonic(), rids=rids, task=task.id, checkpoint=task.checkpoint)

    def given_back(self, task: PrefillTask) -> None:
        """``task`` is unwound, because streams need its KV cache."""
        self.write(GiveBack, time.monotonic(), task=task.id, rids=task.rids, checkpoint=task.checkpoint)
        if self._metrics is not None:
            self._metrics.given_back()

    def stepped(self, streams: int, begin_s: float, end_s: float, due_s: float) -> None:
        """A decode step over so many ``streams`` has run. It had to begin at ``due_s``."""
        was_due = begin_s >= due_s
        self.write(Step, end_s, streams=streams, begin_s=round(begin_s, 6), due_s=round(due_s, 6) if was_due else None)
        if self._metrics is not None:
            self._metrics.stepped(end_s - begin_s, begin_s - due_s if was_due else None)

    def failed(self, task: PrefillTask, failure: Failure) -> None:
        """The forward pass of ``task`` has raised. Members whose abort was asked for end as aborted, when SGLang drops
        them.
        """
        rids = self._close([req for req in task.reqs if req in self._open and req not in self._abort_asked])
        self.write(
            Fail,
            time.monotonic(),
            rids=rids,
            task=task.id,
            checkpoint=task.checkpoint,
            http_status=int(HTTPStatus.INTERNAL_SERVER_ERROR),
            reason=failure.message[:REASON_CHARS],
        )

    def abort_asked(self, reqs: Iterable[Any]) -> None:
        """``reqs`` are to be aborted, wherever they are."""
        if self.is_written:
            self._abort_asked.update(reqs)

    def answered(self, req: Any, reason: str, http_status: int | None) -> None:
        """The client has heard the last of ``req``: an answer, or a ``reason`` why it gets none."""
        if req not in self._open:
            return
        now_s, asked = time.monotonic(), req in self._abort_asked
        rids = self._close([req])
        if asked:
            self.write(Abort, now_s, rids=rids)
        else:
            self.write(Fail, now_s, rids=rids, http_status=http_status, reason=reason[:REASON_CHARS])

    def close_lost(self, held: Iterable[Any]) -> None:
        """End the requests that are not among ``held``, the scheduler's: they left it on a way that nothing else here
        knows of.
        """
        for req in self._open.difference(held):
            self.answered(req, "it is in none of the scheduler's queues", None)

    def _close(self, reqs: Sequence[Any]) -> list[str]:
        """Ids of ``reqs``, which have ended."""
        self._open.difference_update(reqs)
        self._abort_asked.difference_update(reqs)
        return [req.rid for req in reqs]


class RecordedStreamer(SchedulerOutputStreamer):
    """SGLang's way of answers to the client, which tells the event recorder of each last one."""

    recorder: EventRecorder | None = None
    """Set on the instance, when the scheduler is ready to serve."""

    def stream_output(self, reqs: Sequence[Any], return_logprob: bool, skip_req: Any = None) -> None:
        super().stream_output(reqs, return_logprob, skip_req)
        if self.recorder is not None:
            for req in reqs:
                if req.finished():
                    reason = req.finished_reason.to_json()
                    self.recorder.answered(req, str(reason.get("message")), reason.get("status_code"))
