"""Connections of a server that ends: each is closed behind its next answer, and none before."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from sgl_flowprefill.patches.closing import ClosesWhileEnding

HTTP: Scope = {"type": "http", "http_version": "1.1"}
CLOSES = (b"connection", b"close")


def begin(*headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain"), *headers]}


BODY: Message = {"type": "http.response.body", "body": b"a token", "more_body": True}
END: Message = {"type": "http.response.body", "body": b""}


def passed_on(scope: Scope, messages: list[Message], is_ending: Callable[[], bool]) -> list[Message]:
    """What a server is given of an app that answers with ``messages``."""
    given: list[Message] = []

    async def app(seen: Scope, receive: Receive, send: Send) -> None:
        assert seen is scope
        for message in messages:
            await send(message)

    async def receive() -> Message:
        raise AssertionError("the app has not asked")

    async def send(message: Message) -> None:
        given.append(message)

    asyncio.run(ClosesWhileEnding(app, is_ending)(scope, receive, send))
    return given


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_an_answer_closes_its_connection_only_while_the_server_ends(version: str) -> None:
    scope, answer = {**HTTP, "http_version": version}, [begin(), BODY, END]
    assert passed_on(scope, answer, lambda: False) == [begin(), BODY, END]
    assert passed_on(scope, answer, lambda: True) == [begin(CLOSES), BODY, END]
    assert answer == [begin(), BODY, END], "the app's own message stays as it is"


def test_what_an_answer_says_of_its_connection_otherwise_is_not_sent() -> None:
    assert passed_on(HTTP, [begin((b"Connection", b"keep-alive")), END], lambda: True) == [begin(CLOSES), END]
    without = {"type": "http.response.start", "status": 204}
    assert passed_on(HTTP, [without, END], lambda: True) == [{**without, "headers": [CLOSES]}, END]


@pytest.mark.parametrize(
    ("scope", "messages"),
    [
        ({"type": "lifespan"}, [{"type": "lifespan.startup.complete"}, {"type": "lifespan.shutdown.complete"}]),
        ({"type": "websocket", "http_version": "1.1"}, [{"type": "websocket.accept", "headers": []}]),
        ({"type": "websocket", "http_version": "1.1"}, [{"type": "websocket.http.response.start", "headers": []}]),
        ({"type": "http", "http_version": "2"}, [begin(), END]),
    ],
)
def test_what_is_no_answer_over_http_1_is_left_alone(scope: Scope, messages: list[Message]) -> None:
    assert passed_on(scope, messages, lambda: True) == messages


@contextmanager
def served(is_ending: Callable[[], bool]) -> Iterator[socket.socket]:
    """A connection to a server such as SGLang's, whose app answers ``here``."""

    def answer(request: Request) -> PlainTextResponse:
        return PlainTextResponse("here")

    app = Starlette(routes=[Route("/", answer)])
    app.add_middleware(ClosesWhileEnding, is_ending=is_ending)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        with socket.create_connection(server.servers[0].sockets[0].getsockname(), timeout=30) as connection:
            yield connection
    finally:
        server.should_exit = True
        thread.join()


def test_a_connection_is_kept_until_the_server_ends() -> None:
    ending = threading.Event()
    request = b"GET / HTTP/1.1\r\nHost: here\r\n\r\n"
    with served(ending.is_set) as connection:
        for _ in range(2):
            connection.sendall(request)
            answer = b""
            while not answer.endswith(b"\r\n\r\nhere"):
                part = connection.recv(4096)
                assert part, "closed"
                answer += part
            assert b"connection:" not in answer.lower()
        ending.set()
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(4096), b""))  # until the server has closed it
    assert answer.endswith(b"\r\n\r\nhere")
    assert b"\r\nconnection: close\r\n" in answer
