"""``/health`` answers when the scheduler does, not at the next full second.

Target: the ``/health`` and ``/health_generate`` routes of ``sglang.srt.entrypoints.http_server.app`` (SGLang 0.5.23).
SGLang's handler sends a probe and looks once a second whether anything has come back; the scheduler answers a probe at
its next checkpoint, so a probe's figure would be the handler's sleep and not the server's state.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute

from sgl_flowprefill.patches.base import SeamError, expect_parameters, expect_source, resolve

HANDLER: Final = "sglang.srt.entrypoints.http_server.health_generate"
LAUNCH: Final = "sglang.srt.entrypoints.http_server.launch_server"
PATHS: Final = ("/health", "/health_generate")
POLL_S: Final = 0.01


def apply() -> None:
    """Register the hook that puts the routes in before the server starts. Raises SeamError for a changed target."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect_source("health", HANDLER, "last_receive_tstamp > tic", "await asyncio.sleep(1)")
    expect_parameters("health", LAUNCH, ("server_args",))
    HookRegistry.register(LAUNCH, _with_routes, HookType.AROUND)


def _with_routes(launch_server: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    app = resolve("health", "sglang.srt.entrypoints.http_server.app")
    handler: Callable[[Any], Awaitable[Any]] = resolve("health", HANDLER)
    background: set[asyncio.Task[Any]] = set()

    async def health(request: Request) -> Any:
        started_s = time.time()
        manager = resolve("health", "sglang.srt.entrypoints.http_server._global_state").tokenizer_manager
        probe = asyncio.ensure_future(handler(request))
        background.add(probe)
        probe.add_done_callback(background.discard)
        while not probe.done() and manager.last_receive_tstamp <= started_s:
            await asyncio.sleep(POLL_S)
        # Once anything has come back the handler's verdict is known; it tidies up by itself.
        return probe.result() if probe.done() else Response(status_code=200)

    replaced = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    if len(replaced) != len(PATHS):
        raise SeamError(f"health: SGLang's HTTP server has no routes {' and '.join(PATHS)}; install sglang==0.5.23.")
    for route in replaced:
        app.router.routes.insert(0, APIRoute(route.path, health, methods=["GET"]))
    return launch_server(*args, **kwargs)
