"""Rows of the contract: wake-ups by KV transfers."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows

PART: Final = Part(
    "wakeups",
    "Wake-ups by KV transfers",
    ("scheduler",),
    (
        *rows(
            "hooks",
            "sglang.srt.disaggregation.common.conn:",
            "CommonKVManager.update_status(self, bootstrap_room, status)",
            "is what all transfer threads call when something has happened",
            "a sleeping scheduler notices it up to a second later",
        ),
    ),
)
