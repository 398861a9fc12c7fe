"""Rows of the contract: idle decode servers."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import DECODE_QUEUE, SCHEDULER

KEEPS_WAITING: Final = "a rank with nothing to do keeps the streams of the others waiting"

PART: Final = Part(
    "decode_idle",
    "Idle decode servers",
    ("scheduler",),
    (
        *rows(
            "hooks",
            SCHEDULER,
            "on_idle(self)",
            "is when a decode server sleeps",
            "an idle decode server takes most of a core",
        ),
        source(
            "assumes",
            f"{SCHEDULER}.event_loop_normal_disagg_decode",
            ["self.process_decode_queue()", "self.on_idle()"],
            "looks at what has happened before each sleep",
            "a decode server sleeps although there is work",
        ),
        source(
            "assumes",
            f"{SCHEDULER}.event_loop_overlap_disagg_decode",
            ["self.process_decode_queue()", "self.on_idle()"],
            "looks at what has happened before each sleep",
            "a decode server sleeps although there is work",
        ),
        *rows(
            "calls",
            SCHEDULER,
            "is_fully_idle(self, ...)",
            "tells how long a decode server may sleep",
            "a decode server sleeps although there is work",
        ),
        *attributes(
            SCHEDULER,
            "disagg_decode_prealloc_queue disaggregation_mode forward_ct gracefully_exit ipc_channels",
            "tells whether there is work",
            "a decode server sleeps although there is work",
        ),
        *attributes(
            SCHEDULER,
            "attn_dp_enabled",
            "says whether several ranks have requests of their own, and meet in each round",
            KEEPS_WAITING,
        ),
        source(
            "assumes",
            "sglang.srt.managers.scheduler_components.request_receiver:"
            "SchedulerRequestReceiver._broadcast_reqs_across_ranks",
            ["if get_parallel().attn_dp_enabled:", "src=tp_group.ranks[0]"],
            "is where ranks meet at the beginning of a round",
            KEEPS_WAITING,
        ),
        source(
            "assumes",
            f"{SCHEDULER}.get_next_disagg_decode_batch_to_run",
            ["maybe_prepare_mlp_sync_batch(ret)"],
            "is where ranks with data-parallel attention meet before each step",
            KEEPS_WAITING,
        ),
        *attributes(
            DECODE_QUEUE,
            "pending_reqs",
            "holds the requests whose prefill server is not known yet",
            "a decode server sleeps although there is work",
        ),
    ),
)
