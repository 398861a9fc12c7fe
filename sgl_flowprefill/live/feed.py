"""Who watches, and what they are told: the scheduler is asked only while somebody watches, and once for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final, Protocol

from sgl_flowprefill.live.ask import Ask
from sgl_flowprefill.live.attainment import BIN_S, WINDOW_S
from sgl_flowprefill.live.board import Board
from sgl_flowprefill.live.state import Answer, Document, Server, encode_document

EVERY_S: Final = 0.25
"""Time between two states at least."""
CATCH_UP_S: Final = 0.01
"""Pause between two questions of one who has to catch up: a prefill gets on meanwhile."""
BEAT_S: Final = 2.0
"""Longest silence: a connection that nobody reads any more is noticed when something is sent."""


class Watched(Protocol):
    """One server or several that can be watched, as their routes see it."""

    def frames(self) -> AsyncIterator[bytes]:
        """Server-sent events, each a ``Document`` in JSON, until the server ends."""

    async def events(self) -> list[tuple[str, bytes]]:
        """Of each server its name, and as lines of an event log all events that it keeps."""


class Feed:
    """Tells those who watch the newest document. Subclasses say how it is made."""

    def __init__(self) -> None:
        self._watching = 0
        self._news = asyncio.Condition()
        self._frame = b""
        self._number = 0
        self._worker: asyncio.Task[None] | None = None

    @property
    def is_watched(self) -> bool:
        return self._watching > 0

    @property
    def is_ending(self) -> bool:
        """Whether the server ends, for which nobody who watches shall be waited for."""
        return False

    async def run(self) -> None:
        """Call ``tell`` again and again while ``is_watched``. Called when somebody begins to watch."""
        raise NotImplementedError

    async def tell(self, document: Document) -> None:
        """Send ``document`` to all who watch."""
        self._frame = b"data: " + encode_document(document) + b"\n\n"
        self._number += 1
        async with self._news:
            self._news.notify_all()

    async def frames(self) -> AsyncIterator[bytes]:
        self._watching += 1
        try:
            seen = self._number
            yield b": hello\n\n"
            while not self.is_ending:
                if self._worker is None or self._worker.done():
                    self._worker = asyncio.create_task(self.run())
                try:
                    async with asyncio.timeout(BEAT_S), self._news:
                        await self._news.wait_for(lambda: self._number != seen)  # noqa: B023 - awaited at once
                    seen = self._number
                    yield self._frame
                except TimeoutError:
                    yield b": still here\n\n"
        finally:
            self._watching -= 1


class SchedulerFeed(Feed):
    """What those are told who watch one server."""

    def __init__(
        self,
        name: str,
        ask: Callable[[Ask], Awaitable[Answer]],
        is_ending: Callable[[], bool] = lambda: False,
        every_s: float = EVERY_S,
    ) -> None:
        """``ask``: the scheduler, one question at a time."""
        super().__init__()
        self._name, self._ask, self._every_s = name, ask, every_s
        self._is_ending = is_ending
        self._board = Board(name)

    @property
    def is_ending(self) -> bool:
        return self._is_ending()

    async def run(self) -> None:
        while self.is_watched and not self.is_ending:
            begin_s = time.monotonic()
            try:
                while self._board.read(await self._ask(Ask(self._board.next))):
                    await asyncio.sleep(CATCH_UP_S)
                server = self._board.server()
            except Exception as error:  # whatever it is, it is for who watches: the server goes on
                server = Server(self._name, error=f"the scheduler cannot be asked: {error!r}")
            await self.tell(Document([server], WINDOW_S, BIN_S))
            await asyncio.sleep(max(CATCH_UP_S, begin_s + self._every_s - time.monotonic()))

    async def events(self) -> list[tuple[str, bytes]]:
        lines, since = b"", 0
        while True:
            answer = await self._ask(Ask(since, with_state=False))
            lines += answer.lines
            since = answer.next
            if since >= answer.written:
                return [(self._name, answer.head + lines)]
            await asyncio.sleep(CATCH_UP_S)
