"""A decode server's scheduler: SGLang's own, whose answers say what became of their requests: when the first token was
there, which it knows itself, and what the prefill server has sent along of what it predicted, how long it suspended the
prefill, and why a first token that is late is so.

Where an event log is asked for, it has a line for each request, too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.runtime_context import get_parallel

from sgl_flowprefill.answers import report_of_first_token
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import objective, received_by_http_s, received_s, resolver
from sgl_flowprefill.patches import carried_report
from sgl_flowprefill.runtime.decode_log import DecodeLog
from sgl_flowprefill.runtime.reporting_streamer import ReportingStreamer
from sgl_flowprefill.slo.resolve import Resolver

FIRST_TOKEN: Final = "flowprefill_first_token_s"
"""Attribute of SGLang's Req: when its first token was there. Whoever does not stream gets it with the last one."""
ABORTED: Final = "aborted while it waited"
"""Why a request is over of which SGLang gives no reason."""


class DecodeStreamer(ReportingStreamer):
    """Adds a report to the last event of each answer, and tells the event log that it is over."""

    log: DecodeLog | None = None
    """Set on the instance, when the scheduler has been made, where there is one."""
    _resolver: Resolver | None = None
    """None where answers have no reports."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        config = FlowPrefillConfig.from_env()
        if config.answer_report:
            self._resolver = resolver(config)
        self._has_http_clock = get_parallel().node_rank == 0
        """Whether this rank is on the first node, as the HTTP server is, whose clock it has then. Ranks of DP attention
        answer requests of their own on all nodes."""
        super().__init__(*args, **kwargs)

    @property
    def has_additional_customized_info(self) -> bool:
        return self._resolver is not None and super().has_additional_customized_info

    def stream_output(self, reqs: Sequence[Any], return_logprob: bool, skip_req: Any = None) -> None:
        """SGLang calls this with all requests of a step, and with those whose KV cache has come."""
        for req in reqs:
            if req.output_ids and not hasattr(req, FIRST_TOKEN):
                setattr(req, FIRST_TOKEN, time.monotonic())
        super().stream_output(reqs, return_logprob, skip_req)
        if self.log is not None:
            for req in reqs:
                if req.finished():
                    self.note_end(req, req.finished_reason.to_json().get("message"))
            self.log.flush()  # once for all of a step, in which others wait

    def note_end(self, req: Any, reason: str | None) -> None:
        """``req`` is over; ``reason`` says what went wrong, where something did. Its line waits for a ``flush``."""
        if self.log is not None and not is_health_check_generate_req(req):
            came_s = received_s(req) if self._has_http_clock else float(req.time_stats.scheduler_recv_time)
            self.log.ended(req, came_s, getattr(req, FIRST_TOKEN, None), reason)

    def _report(self, req: Any) -> list[dict[str, Any]]:
        if self._resolver is None or not req.finished() or is_health_check_generate_req(req):
            return []
        by_http_s, first_token_s = received_by_http_s(req), getattr(req, FIRST_TOKEN, None)
        if not by_http_s:
            return []  # it came another way than by the HTTP server
        ttft_s = None if first_token_s is None or not self._has_http_clock else first_token_s - by_http_s
        return [report_of_first_token(objective(req, self._resolver), ttft_s, carried_report.of(req))]


class DecodeScheduler(Scheduler):
    """SGLang's scheduler, but for its answers, and for an event log where one is asked for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        path = FlowPrefillConfig.from_env().event_log
        if path is not None and self.ipc_channels.recv_from_tokenizer is not None:  # of ranks, one answers
            self.output_streamer.log = DecodeLog(path)

    def get_output_streamer_class(self) -> type[DecodeStreamer]:
        """SGLang's hook for what its scheduler hands answers to."""
        return DecodeStreamer

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        """SGLang's other way to end a request, past the output streamer."""
        super().send_abort_output(abort_req, req)
        streamer = self.output_streamer
        streamer.note_end(req, (abort_req.finished_reason or {}).get("message") or ABORTED)
        if streamer.log is not None:
            streamer.log.flush()
