"""Rows of the contract: health checks."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import HTTP

PART: Final = Part(
    "health",
    "Health checks",
    ("HTTP server",),
    (
        source(
            "calls",
            f"{HTTP}health_generate",
            ["last_receive_tstamp > tic", "HEALTH_CHECK_TIMEOUT", "await asyncio.sleep(1)"],
            "sends the probe in the background of our route",
            "/health shows the handler's sleep, and follows steps of the wall clock",
            "(request)",
        ),
        *rows(
            "hooks",
            HTTP,
            "_setup_and_run_http_server(server_args, ...)",
            "is when our routes are put before SGLang's",
            "/health shows the handler's sleep, and follows steps of the wall clock",
        ),
        *rows(
            "reads",
            HTTP,
            "app _global_state ServerStatus HEALTH_CHECK_TIMEOUT",
            "is what the health route works with",
            "/health cannot be answered",
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:ServerStatus",
            "Up UnHealthy",
            "is what the health route says",
            "/health cannot be answered",
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager",
            "last_receive_tstamp server_status",
            "shows that the scheduler has answered",
            "/health cannot be answered",
        ),
        *attributes(
            f"{HTTP}_GlobalState",
            "tokenizer_manager",
            "shows that the scheduler has answered",
            "/health cannot be answered",
        ),
    ),
)
