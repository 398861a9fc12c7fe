"""The event log of a decode server: a line for each request, when it is over, by the times that SGLang keeps of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.events import Decoded, EventLog, of_decode_server, rounded

LOGGED: Final = "flowprefill_logged"
"""Attribute of SGLang's Req: its line is written. With overlapped decode steps, SGLang hands on its end twice."""
REASON_CHARS: Final = 200


class DecodeLog(EventLog):
    """Writes whole lines, so that several ranks, with requests of their own, may share a file."""

    def __init__(self, path: str | Path) -> None:
        """``path``: as the server's options have it."""
        super().__init__(of_decode_server(Path(path)))
        self.begin(decodes=True, prefills=False)
        self.flush()

    def ended(self, req: Any, received_s: float, first_token_s: float | None, reason: str | None) -> None:
        """SGLang's ``req``, received then by this machine's clock, is over; ``reason`` says what went wrong, where
        something did. Only the first call counts.

        SGLang has the times of a request's last place and of when it last had KV cache, or was retracted: what is later
        than the first token is of no use.
        """
        if hasattr(req, LOGGED):
            return
        setattr(req, LOGGED, True)
        now_s = time.monotonic()
        until_s = now_s if first_token_s is None else first_token_s

        def first(at_s: float) -> float | None:
            return rounded(at_s) if 0.0 < at_s <= until_s else None

        self.write(
            Decoded,
            now_s,
            rid=req.rid,
            bootstrap_room=req.bootstrap_room,
            received_s=round(received_s, 6),
            queued_s=first(req.time_stats.decode_prealloc_queue_entry_time),
            place_s=first(req.time_stats.decode_transfer_queue_entry_time),
            kv_s=first(req.time_stats.wait_queue_entry_time),
            first_token_s=rounded(first_token_s),
            tokens=len(req.output_ids),
            retractions=req.retraction_count,
            reason=None if reason is None else reason[:REASON_CHARS],
        )
