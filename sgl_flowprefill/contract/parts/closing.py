"""Rows of the contract: connections of a server that ends."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import HTTP

STAYS: Final = "a server that ends goes on taking requests over connections that stay open, until it is killed"
MANAGER: Final = "sglang.srt.managers.tokenizer_manager:TokenizerManager"

PART: Final = Part(
    "closing",
    "Connections of a server that ends",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            HTTP,
            "_setup_and_run_http_server(server_args, ...)",
            "is when a wrapper is put around SGLang's app",
            STAYS,
        ),
        *rows("reads", HTTP, "app _global_state", "is what is wrapped, and what knows that the server ends", STAYS),
        *attributes(f"{HTTP}_GlobalState", "tokenizer_manager", "knows that the server ends", STAYS),
        *attributes(MANAGER, "gracefully_exit", "says that the server ends", STAYS),
        source(
            "assumes",
            f"{MANAGER}.sigterm_watchdog",
            ["while not self.gracefully_exit", "len(self.rid_to_state)"],
            "ends the server when it finds no request",
            "a server ends before its requests have ended, or not at all",
            "(self)",
        ),
    ),
)
