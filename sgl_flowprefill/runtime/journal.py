"""What happens to requests and tasks, told to the event log and to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sgl_flowprefill.events import EventLog
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.task import PrefillTask
from sgl_flowprefill.ttft import AdaptiveTTFT, Prediction


class Journal(EventLog):
    """An event log with a method for each kind of event, which metrics go with."""

    def __init__(self, path: str | Path | None, metrics: Metrics | None = None) -> None:
        super().__init__(path)
        self._metrics = metrics

    def arrived(self, req: Any, received_s: float, slo_s: float) -> None:
        self.write(
            "arrival",
            time.monotonic(),
            rid=req.rid,
            prompt_tokens=len(req.origin_input_ids),
            ttft_slo_s=slo_s,
            deadline_s=round(received_s + slo_s, 6),
            received_s=round(received_s, 6),
        )

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        """``task``, which ran until ``stopped_s``, waits for ``winner``. The first news that led to it could have been
        read at ``news_readable_s``.
        """
        # A winner that lost an earlier decision wins because of what has happened since, and waits for it from then on.
        readable_s = min(now_s, max(winner.readable_s, news_readable_s))
        blocking_s = max(0.0, now_s - readable_s)
        if self._metrics is not None:
            self._metrics.preempted(blocking_s)
        self.write(
            "suspend",
            now_s,
            task=task.id,
            rids=task.rids,
            checkpoint=task.checkpoint,
            for_rids=winner.rids,
            readable_s=round(readable_s, 6),
            stopped_s=round(stopped_s, 6),
            blocking_s=round(blocking_s, 6),
        )

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        """``task`` runs, for the first time or again."""
        if task.started:
            self.write("resume", now_s, task=task.id, rids=task.rids, checkpoint=task.checkpoint)
            return
        self.write(
            "start",
            now_s,
            task=task.id,
            rids=task.rids,
            new_tokens=task.new_tokens,
            cached_tokens=sum(req.prefix_len for req in task.batch.reqs),
            predicted_s=round(task.predicted_s, 6),
        )

    def completed(self, task: PrefillTask, prediction: Prediction, ttft: AdaptiveTTFT, live_tasks: int) -> None:
        """``prediction`` is what ``ttft`` says of it now that it has run."""
        self.write(
            "complete",
            time.monotonic(),
            task=task.id,
            rids=task.rids,
            checkpoint=task.checkpoint,
            forward_s=round(task.executed_s, 6),
            predicted_s=round(task.predicted_s, 6),
            expected_s=round(prediction.expected_s, 6),
            profiled_s=round(prediction.raw_s, 6),
        )
        if self._metrics is not None:
            self._metrics.completed(ttft.state(), live_tasks)

    def aborted(self, rids: Sequence[str], task: PrefillTask | None = None) -> None:
        """Nobody waits for ``rids`` any more, which ``task`` was running, or none."""
        running = {} if task is None else {"task": task.id, "checkpoint": task.checkpoint}
        self.write("abort", time.monotonic(), rids=rids, **running)
