"""The live page of a cluster: the launcher listens to its servers, while somebody watches, and tells of all of them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Final

import aiohttp
import uvicorn
from starlette.applications import Starlette

from sgl_flowprefill.cluster.base import LIVE_PORT, StartError
from sgl_flowprefill.cluster.free_ports import is_free
from sgl_flowprefill.cluster.gateway import bearer
from sgl_flowprefill.live import EVENTS, PAGE, STATE
from sgl_flowprefill.live.attainment import BIN_S, WINDOW_S
from sgl_flowprefill.live.feed import EVERY_S, Feed
from sgl_flowprefill.live.routes import LONGEST_S, routes
from sgl_flowprefill.live.state import Document, Server, decode_document

AGAIN_S: Final = 1.0
"""Until a server that cannot be reached is tried again."""
SILENCE_S: Final = 10.0
"""A server that sends nothing for so long cannot be reached: it sends something every other second."""


class ClusterFeed(Feed):
    """What those are told who watch the servers at ``urls``, by their names."""

    def __init__(self, urls: Mapping[str, str], api_key: str | None = None) -> None:
        super().__init__()
        self._urls, self._headers = urls, bearer(api_key)
        self._servers = {name: Server(name) for name in urls}
        self._heard_s = dict.fromkeys(urls, time.monotonic())

    async def run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
        async with aiohttp.ClientSession(headers=self._headers, timeout=timeout) as session:
            listening = [asyncio.create_task(self._listen(session, name)) for name in self._urls]
            try:
                while self.is_watched:
                    await asyncio.sleep(EVERY_S)
                    now_s = time.monotonic()
                    for name, server in self._servers.items():
                        server.age_s = now_s - self._heard_s[name]
                    await self.tell(Document(list(self._servers.values()), WINDOW_S, BIN_S))
            finally:
                for task in listening:
                    task.cancel()
                await asyncio.gather(*listening, return_exceptions=True)

    async def events(self) -> list[tuple[str, bytes]]:
        async with aiohttp.ClientSession(headers=self._headers) as session:

            async def of(name: str, url: str) -> tuple[str, bytes]:
                try:
                    async with session.get(f"{url}{EVENTS}?seconds={LONGEST_S:.0f}") as response:
                        response.raise_for_status()
                        return name, await response.read()
                except (aiohttp.ClientError, TimeoutError):
                    return name, b""  # the others are shown without it

            return list(await asyncio.gather(*(of(name, url) for name, url in self._urls.items())))

    async def _listen(self, session: aiohttp.ClientSession, name: str) -> None:
        while True:
            try:
                async with session.get(self._urls[name] + STATE) as response:
                    response.raise_for_status()
                    async for document in documents(response.content):
                        [server] = document.servers
                        server.name = name
                        self._servers[name], self._heard_s[name] = server, time.monotonic()
            except Exception as error:  # whatever it is, such as a server of another version: the others are shown
                self._servers[name].error = f"the {name} server cannot be reached: {error!r}"
            await asyncio.sleep(AGAIN_S)


async def documents(content: aiohttp.StreamReader) -> AsyncIterator[Document]:
    """Of server-sent events."""
    frame = b""
    async for part in content.iter_any():
        *frames, frame = (frame + part).split(b"\n\n")
        for whole in frames:
            if whole.startswith(b"data: "):
                yield decode_document(whole.removeprefix(b"data: "))


@contextmanager
def page(urls: Mapping[str, str], host: str, port: int | None, api_key: str | None) -> Iterator[str]:
    """A context in which the servers at ``urls`` can be watched at the yielded URL: at ``port``, or without one at
    LIVE_PORT if it is free. Raises StartError.
    """
    if port is None:
        port = LIVE_PORT if is_free(host, LIVE_PORT) else 0
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # who comes before the server runs is not refused
    except OSError as error:
        listener.close()
        raise StartError(f"--live-port {port}: {error.strerror}; name another port, or 0 for any free one") from None
    feed = cache(lambda: ClusterFeed(urls, api_key))  # made at the first request, in the event loop of the page
    app = Starlette(routes=routes(feed, api_key))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), name="live page", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{listener.getsockname()[1]}{PAGE}"
    finally:
        server.should_exit = True
        thread.join(5)
