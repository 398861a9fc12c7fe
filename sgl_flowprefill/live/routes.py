"""The routes of those who watch, the same on a server's port and on the launcher's."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Coroutine
from io import BytesIO
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sgl_flowprefill.events import Log, decode_events
from sgl_flowprefill.live import EVENTS, PAGE, STATE, TIMELINE
from sgl_flowprefill.live.feed import Watched
from sgl_flowprefill.timeline import SUFFIX, History
from sgl_flowprefill.timeline.trace import write_trace

FILE: Final = Path(__file__).with_name("page.html")
DEFAULT_S: Final = 30.0
LONGEST_S: Final = 3600.0
HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""The page loads nothing, and is in no other's frame."""
Endpoint = Callable[[Request], Coroutine[Any, Any, Response]]


def routes(server: Callable[[], Watched], api_key: str | None = None) -> list[Route]:
    """``server`` is asked for at each request. With ``api_key``, all but the page, which has no data, asks for it."""

    alone = asyncio.Lock()
    """Answers of the past are made one at a time: each takes a thread, and the scheduler's time for some questions."""

    async def page(request: Request) -> Response:
        return FileResponse(FILE, headers=HEADERS)

    async def state(request: Request) -> Response:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(server().frames(), media_type="text/event-stream", headers=headers)

    async def timeline(request: Request) -> Response:
        seconds = _seconds(request)
        if seconds is None:
            return _refusal(request)
        async with alone:
            logs = await server().events()
            trace = await asyncio.to_thread(trace_of, logs, seconds)
        headers = {"Content-Disposition": f'attachment; filename="flowprefill{SUFFIX}"', "Cache-Control": "no-store"}
        return Response(trace, media_type="application/x-protobuf", headers=headers)

    async def events(request: Request) -> Response:
        seconds = _seconds(request)
        if seconds is None:
            return _refusal(request)
        async with alone:
            logs = await server().events()
            lines = await asyncio.to_thread(lambda: b"".join(last_lines(lines, seconds) for _, lines in logs))
        return Response(lines, media_type="application/jsonl", headers={"Cache-Control": "no-store"})

    guarded = _guard(api_key)
    return [
        Route(PAGE, page),
        Route(STATE, guarded(state)),
        Route(TIMELINE, guarded(timeline)),
        Route(EVENTS, guarded(events)),
    ]


def trace_of(logs: list[tuple[str, bytes]], seconds: float) -> bytes:
    """The last ``seconds`` of servers, by their names and lines of their event logs, as a trace for Perfetto."""
    histories = [(name, History.of(decode_events(lines))) for name, lines in logs]
    end_s = max((history.end_s for _, history in histories), default=0.0)
    file = BytesIO()
    write_trace([(name, history.since(end_s - seconds)) for name, history in histories], file)
    return file.getvalue()


def last_lines(lines: bytes, seconds: float) -> bytes:
    """Those of ``lines`` of an event log that are of its last ``seconds``, behind its first line."""
    told, events = lines.splitlines(keepends=True), decode_events(lines)
    head = told[:1] if events and isinstance(events[0], Log) else []
    begin_s = events[-1].t_s - seconds if events else 0.0
    past = range(len(head), len(events))
    first = next((number for number in past if events[number].t_s >= begin_s), len(events))
    return b"".join(head + told[first:])


def _seconds(request: Request) -> float | None:
    """How much of the past is asked for; None where that is no number of seconds."""
    try:
        seconds = float(request.query_params.get("seconds", DEFAULT_S))
    except ValueError:
        return None
    return seconds if 0 < seconds <= LONGEST_S else None


def _refusal(request: Request) -> Response:
    asked = request.query_params.get("seconds", "")[:60]
    return PlainTextResponse(
        f"seconds={asked}: expected a number of seconds above 0 and at most {LONGEST_S:.0f}\n", status_code=400
    )


def _guard(api_key: str | None) -> Callable[[Endpoint], Endpoint]:
    """Requests to an endpoint show ``api_key`` as a bearer token, where there is one."""

    def guarded(endpoint: Endpoint) -> Endpoint:
        async def checked(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if api_key and not secrets.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
                return PlainTextResponse("this needs the API key, as a bearer token\n", status_code=401)
            return await endpoint(request)

        return checked

    return guarded
