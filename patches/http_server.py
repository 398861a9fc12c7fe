"""SGLang's HTTP server: its app, and what answers its requests."""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import resolve

RUN: Final = "sglang.srt.entrypoints.http_server._setup_and_run_http_server"
APP: Final = "sglang.srt.entrypoints.http_server.app"
STATE: Final = "sglang.srt.entrypoints.http_server._global_state"


def tokenizer_manager(seam: str) -> Any:
    """The server's tokenizer manager, for ``seam``. Raises SeamError where SGLang has none there."""
    return resolve(seam, STATE).tokenizer_manager


def is_ending(seam: str) -> bool:
    """Whether the server was told to end, and goes on until its requests have ended. Raises SeamError likewise."""
    return bool(tokenizer_manager(seam).gracefully_exit)
