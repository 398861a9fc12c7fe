"""Rows of the contract: a prefill server without a decode server."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row

PART: Final = Part(
    "lone_prefill",
    "A prefill server without a decode server",
    ("scheduler",),
    (
        Row(
            "sglang.srt.managers.scheduler:Scheduler.init_disaggregation",
            "hooks",
            "makes the transfer library's manager",
            "`launch.py gpu-report` needs the transfer library",
            signature="(self)",
            holds=("self.transfer_backend = TransferBackend(", "disaggregation_transfer_backend"),
        ),
    ),
)
