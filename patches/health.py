"""``/health`` answers when the scheduler does, not at the next full second, and whatever the wall clock does.

Target: the ``/health`` and ``/health_generate`` routes of ``sglang.srt.entrypoints.http_server.app``.
SGLang's handler sends a probe and looks once a second whether anything has come back; the scheduler answers a probe at
its next preemption checkpoint, so a probe's figure would be the handler's sleep and not the server's state. It looks by
comparing the wall clock with the time of the last answer: once the clock has been set back, an answer from before looks
new and a scheduler that hangs looks sound; when it is set forward meanwhile, a sound one looks like one that hangs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from fastapi import Request, Response
from fastapi.routing import APIRoute

from sgl_flowprefill.contract import supported
from sgl_flowprefill.patches.base import SeamError, expect, resolve
from sgl_flowprefill.patches.http_server import APP, RUN, tokenizer_manager

HANDLER: Final = "sglang.srt.entrypoints.http_server.health_generate"
STATUS: Final = "sglang.srt.entrypoints.http_server.ServerStatus"
TIMEOUT: Final = "sglang.srt.entrypoints.http_server.HEALTH_CHECK_TIMEOUT"
PATHS: Final = ("/health", "/health_generate")
POLL_S: Final = 0.01


def apply() -> None:
    """Register the hook that puts the routes in before the server starts. Raises SeamError for a changed target."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("health")
    HookRegistry.register(RUN, _with_routes, HookType.AROUND)


def _with_routes(run_http_server: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    app = resolve("health", APP)
    health = answering_when_the_scheduler_does(resolve("health", HANDLER))
    replaced = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    if len(replaced) != len(PATHS):
        raise SeamError(
            f"health: SGLang's HTTP server has no routes {' and '.join(PATHS)}; install sglang{supported()}."
        )
    for route in replaced:
        app.router.routes.insert(0, APIRoute(route.path, health, methods=["GET"]))
    return run_http_server(*args, **kwargs)


def answering_when_the_scheduler_does(
    handler: Callable[[Any], Awaitable[Any]],
) -> Callable[[Request], Awaitable[Response]]:
    """A route in whose background SGLang's ``handler`` sends the probe and tidies up after it."""
    background: set[asyncio.Task[Any]] = set()

    async def health(request: Request) -> Response:
        manager = tokenizer_manager("health")
        status = resolve("health", STATUS)
        give_up_s = time.monotonic() + resolve("health", TIMEOUT)
        before = manager.last_receive_tstamp

        def is_sound() -> bool:
            """Seen by the change of a number, not by which of two times of the wall clock is the later."""
            return bool(manager.last_receive_tstamp != before)

        def correct(probe: asyncio.Task[Any]) -> None:
            background.discard(probe)
            manager.server_status = status.Up if is_sound() else status.UnHealthy

        while True:
            probe = asyncio.ensure_future(handler(request))
            await asyncio.sleep(0)
            if probe.done():  # it knew without asking the scheduler: the server starts, or ends
                answer: Response = probe.result()
                return answer
            background.add(probe)
            probe.add_done_callback(correct)
            while not is_sound() and not probe.done() and time.monotonic() < give_up_s:
                await asyncio.sleep(POLL_S)
            if is_sound() or time.monotonic() >= give_up_s:
                return Response(status_code=200 if is_sound() else 503)
            # By the wall clock the handler's time is over, or it found an old answer: ask again.

    return health
