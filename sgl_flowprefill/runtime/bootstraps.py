"""Which of the requests without a place at a decode server SGLang is to look at, however many there are: those to which
something has happened.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import takewhile
from typing import Any, Final

LOOKED_AT_AGAIN: Final = 16
"""Most requests that an event looks at because there may have been no metadata buffer for them."""


class Bootstraps:
    """The requests of SGLang's bootstrap queue, and which of them SGLang is to look at.

    Each has a number, which is the same on all tensor-parallel ranks: these have the same queue.
    """

    def __init__(self) -> None:
        self._told: deque[int | None] = deque()
        """Rooms of which a transfer thread has told something."""
        self._by_number: dict[int, Any] = {}
        self._numbers: dict[Any, int] = {}
        self._in_room: dict[int | None, set[int]] = {}
        self._taken_in = 0
        self._ready: set[int] = set()
        """Requests of which something was told, and that are in the queue still."""
        self._without_buffer: set[int] = set()

    def tell(self, room: int) -> None:
        """Something has happened to the request in ``room``. On any thread."""
        self._told.append(room)

    def take_told(self, new: Iterable[int] = (), rooms: Container[int] = ()) -> list[int]:
        """Numbers of the requests to which something has happened since the last call: of ``new`` ones it may have been
        before they came, where ``rooms`` has theirs.
        """
        numbers = {number for number in new if self._by_number[number].bootstrap_room in rooms}
        while self._told:
            numbers |= self._in_room.get(self._told.popleft(), set())
        return sorted(numbers)

    def mark(self, rid_prefix: str) -> None:
        """Something has happened to the requests whose ids begin so."""
        self._ready.update(number for req, number in self._numbers.items() if req.rid.startswith(rid_prefix))

    def take_in(self, queue: Sequence[Any]) -> range:
        """Numbers of the requests that are new: those at the end of ``queue``."""
        new = list(takewhile(lambda req: req not in self._numbers, reversed(queue)))
        numbers = range(self._taken_in, self._taken_in + len(new))
        for number, req in zip(numbers, reversed(new), strict=True):
            self._by_number[number], self._numbers[req] = req, number
            self._in_room.setdefault(req.bootstrap_room, set()).add(number)
        self._taken_in = numbers.stop
        return numbers

    def due(self, told: Iterable[int], new: Iterable[int]) -> list[Any]:
        """The requests to look at, in the order in which they came: with those of the numbers, all of which something
        was told, and some that found no buffer.
        """
        self._ready.update(told)
        return [self._by_number[number] for number in sorted(self._ready.union(self._without_buffer, new))]

    def looked_at(self, reqs: Iterable[Any], staying: Sequence[Any], out_of_buffers: bool) -> None:
        """Of ``reqs``, those ``staying`` are in the queue still."""
        stay = set(staying)
        for req in [req for req in reqs if req not in stay]:
            number = self._numbers.pop(req)
            del self._by_number[number]
            self._ready.discard(number)
            self._in_room[req.bootstrap_room].discard(number)
            if not self._in_room[req.bootstrap_room]:
                del self._in_room[req.bootstrap_room]
        without = staying[:LOOKED_AT_AGAIN] if out_of_buffers else ()
        self._without_buffer = {self._numbers[req] for req in without}

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._numbers))
