"""Rows of the contract: the live page."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import HTTP, OPTIONS

NO_PAGE: Final = "/flowprefill cannot be answered"
STRUCTS: Final = "sglang.srt.managers.io_struct:"

PART: Final = Part(
    "live",
    "Live page",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            HTTP,
            "_setup_and_run_http_server(server_args, ...)",
            "is when our routes are put before SGLang's",
            NO_PAGE,
        ),
        source(
            "hooks",
            f"{HTTP}launch_server",
            ["Engine._launch_subprocesses(", "_setup_and_run_http_server("],
            "starts the other processes, serves HTTP, and is what the timeline is written after",
            "a server that is started by itself writes no timeline",
            "(server_args, ...)",
        ),
        *attributes(
            OPTIONS,
            "node_rank",
            "tells the node whose server writes events from those that only compute with it",
            "a further node of a server removes the events of the first",
        ),
        *rows("reads", HTTP, "app _global_state", "is what the routes work with", NO_PAGE),
        *attributes(f"{HTTP}_GlobalState", "tokenizer_manager", "asks the scheduler", NO_PAGE),
        *rows(
            "hooks",
            "sglang.srt.utils.auth:",
            "decide_request_auth(...)",
            "lets a browser open the page of a server with an API key",
            "the page of a server with an API key cannot be opened in a browser",
        ),
        *rows(
            "calls",
            "sglang.srt.utils.auth:",
            "AuthDecision",
            "lets a browser open the page of a server with an API key",
            "the page of a server with an API key cannot be opened in a browser",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.tokenizer_manager:TokenizerManager",
            "auto_create_handle_loop(self)",
            "reads what the scheduler answers",
            NO_PAGE,
        ),
        *attributes(
            "sglang.srt.managers.tokenizer_manager:TokenizerManager",
            "gracefully_exit",
            "says that the server ends, for which nobody who watches is waited for",
            "a server that somebody watches does not end",
        ),
        source(
            "calls",
            "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin.get_internal_state",
            ["await self.get_internal_state_communicator(req)", "res.internal_state"],
            "is how the scheduler is asked",
            NO_PAGE,
            "(self)",
        ),
        *rows("calls", STRUCTS, "GetInternalStateReq", "is the question to the scheduler", NO_PAGE),
        *attributes(f"{STRUCTS}BaseReq", "rid", "is what the question carries", NO_PAGE),
        *attributes(f"{STRUCTS}GetInternalStateReqOutput", "internal_state", "is what the answer carries", NO_PAGE),
    ),
)
