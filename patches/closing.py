"""A server that ends closes each connection behind its next answer, so that it runs out of requests.

Target: ``_setup_and_run_http_server`` of ``sglang.srt.entrypoints.http_server``, before which a wrapper is put around
SGLang's app. After SIGTERM SGLang goes on to serve who asks, and ends when it finds no request at one of its looks, one
every 5 s. Clients and load balancers that keep their connections open would ask it until it is killed; one whose
connection is closed makes another, which leads elsewhere where something chooses the server.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sgl_flowprefill.patches.base import expect, resolve
from sgl_flowprefill.patches.http_server import APP, RUN, is_ending

SEAM: Final = "closing"
CONNECTION: Final = b"connection"


class ClosesWhileEnding:
    """An app whose answers over HTTP/1 close their connection while ``is_ending``; HTTP/2 has no such header."""

    def __init__(self, app: ASGIApp, is_ending: Callable[[], bool]) -> None:
        self._app, self._is_ending = app, is_ending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._is_ending():
                kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() != CONNECTION]
                message = {**message, "headers": [*kept, (CONNECTION, b"close")]}
            await send(message)

        is_http_1 = scope["type"] == "http" and scope["http_version"].startswith("1")
        await self._app(scope, receive, closing if is_http_1 else send)


def apply() -> None:
    """Register the hook. Raises SeamError when its target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(RUN, _with_wrapper, HookType.AROUND)


def _with_wrapper(run_http_server: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    resolve(SEAM, APP).add_middleware(ClosesWhileEnding, is_ending=partial(is_ending, SEAM))
    return run_http_server(*args, **kwargs)
