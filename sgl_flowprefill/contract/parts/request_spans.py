"""Rows of the contract: spans in the traces of requests."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source
from sgl_flowprefill.contract.symbols import TIMES

TRACE: Final = "sglang.srt.observability.trace:"
NO_SPANS: Final = "traces do not say where a prefill was suspended"

PART: Final = Part(
    "request_spans",
    "Spans in the traces of requests",
    ("scheduler",),
    (
        *rows("calls", TRACE, "get_global_tracing_enabled()", "says whether SGLang writes traces", NO_SPANS),
        *rows("calls", TRACE, "TraceReqContext.trace_event(self, name, level, ts, attrs)", "adds to a span", NO_SPANS),
        *rows(
            "calls",
            TRACE,
            "TraceReqContext.abort(self, ts, abort_info)",
            "ends a request's trace when the request is refused",
            "an overloaded server cannot shed",
        ),
        *rows("calls", TIMES, "RequestStageConfig", "names a span and says how detailed it is", NO_SPANS),
        *rows("calls", TIMES, "convert_time_to_realtime_ns(time_value)", "makes a time of a trace", NO_SPANS),
        *rows(
            "calls",
            TIMES,
            "SchedulerReqTimeStats.trace_slice(self, stage, start_time, end_time, attrs)",
            "writes a span",
            NO_SPANS,
        ),
        source(
            "assumes",
            f"{TIMES}SchedulerReqTimeStats.set_forward_entry_time",
            ["RequestStage.PREFILL_WAITING", "self.trace_ctx.trace_slice_start(", "RequestStage.PREFILL_FORWARD"],
            "ends the span of a request's wait, and begins that of its prefill, which ours are in",
            "FlowPrefill's spans are not within SGLang's",
        ),
        source(
            "assumes",
            f"{TIMES}SchedulerReqTimeStats.set_prefill_finished_time",
            ["RequestStage.PREFILL_FORWARD", "self.trace_ctx.trace_slice_end("],
            "ends the span of a request's prefill, behind FlowPrefill's last one in it",
            "FlowPrefill's spans are not within SGLang's",
        ),
    ),
)
