"""A decode server's scheduler: SGLang's own, whose answers say what became of their requests: when the first token was
there, which it knows itself, and what the prefill server has sent along of what it predicted, how long it suspended the
prefill, and why a first token that is late is so.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.utils import is_health_check_generate_req

from sgl_flowprefill.answers import report_of_first_token
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import objective, received_by_http_s, resolver
from sgl_flowprefill.patches import carried_report
from sgl_flowprefill.runtime.reporting_streamer import ReportingStreamer

FIRST_TOKEN: Final = "flowprefill_first_token_s"
"""Attribute of SGLang's Req: when its first token was there. Whoever does not stream gets it with the last one."""


class DecodeStreamer(ReportingStreamer):
    """Adds a report to the last event of each answer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._resolver = resolver(FlowPrefillConfig.from_env())

    def stream_output(self, reqs: Sequence[Any], return_logprob: bool, skip_req: Any = None) -> None:
        """SGLang calls this with all requests of a step, and with those whose KV cache has come."""
        for req in reqs:
            if req.output_ids and not hasattr(req, FIRST_TOKEN):
                setattr(req, FIRST_TOKEN, time.monotonic())
        super().stream_output(reqs, return_logprob, skip_req)

    def _report(self, req: Any) -> list[dict[str, Any]]:
        if not req.finished() or is_health_check_generate_req(req):
            return []
        received_s, first_token_s = received_by_http_s(req), getattr(req, FIRST_TOKEN, None)
        if not received_s:
            return []  # it came another way than by the HTTP server
        ttft_s = None if first_token_s is None else first_token_s - received_s
        return [report_of_first_token(objective(req, self._resolver), ttft_s, carried_report.of(req))]


class DecodeScheduler(Scheduler):
    """SGLang's scheduler, but for its answers."""

    def get_output_streamer_class(self) -> type[DecodeStreamer]:
        """SGLang's hook for what its scheduler hands answers to."""
        return DecodeStreamer
