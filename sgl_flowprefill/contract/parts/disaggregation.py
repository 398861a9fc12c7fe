"""Rows of the contract: KV transfer."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows
from sgl_flowprefill.contract.symbols import SCHEDULER

PART: Final = Part(
    "disaggregation",
    "KV transfer",
    ("scheduler",),
    (
        *rows(
            "reads",
            "sglang.srt.disaggregation.utils:",
            "DisaggregationMode DisaggregationMode.DECODE",
            "tells prefill servers from decode servers",
            "the server does not start",
        ),
        *rows(
            "calls",
            "sglang.srt.disaggregation.utils:",
            "is_aborted(req)",
            "tells whether anybody still waits for a request",
            "prefills run on for clients that have gone",
        ),
        *rows(
            "calls",
            "sglang.srt.disaggregation.prefill:PrefillBootstrapQueue",
            "pop_bootstrapped(self, ...)",
            "gives the requests for which a decode server has room",
            "no prefill can start",
        ),
        *attributes(
            "sglang.srt.disaggregation.prefill:PrefillBootstrapQueue",
            "queue",
            "holds the requests that a decode server has no room for yet",
            "requests seem to be lost in the event log",
        ),
        *attributes(
            SCHEDULER,
            "req_to_metadata_buffer_idx_allocator",
            "says whether a request that has bootstrapped finds a buffer",
            "requests that found none start up to a second late",
        ),
        *attributes(
            SCHEDULER,
            "disagg_prefill_inflight_queue",
            "holds the requests whose KV cache is being sent",
            "clients that go meanwhile count as misses, and ranks of data-parallel attention take requests for lost",
        ),
        *rows(
            "reads",
            "sglang.srt.disaggregation.base:",
            "KVPoll KVPoll.Bootstrapping KVPoll.WaitingForInput KVPoll.Failed",
            "says how far the transfer of a request has come",
            "blocking times cannot be told",
        ),
    ),
)
