"""Order in which waiting requests get what a decode server has too little of: running slots and KV cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from operator import itemgetter
from typing import Final, Generic, NamedTuple, TypeVar

from sgl_flowprefill.policy.slack import STARVED_SHARE

T = TypeVar("T")

PLACES_PER_STARVED: Final = round(1 / STARVED_SHARE)
"""One running slot in so many goes to a request that has starved, as of the time of prefills."""


class DueTimes(NamedTuple):
    """When a request arrived and when its first token is due: seconds on one clock."""

    arrival_s: float
    deadline_s: float


class PlaceOrder(Generic[T]):
    """Requests that can still be in time go first, earliest deadline first; then the late ones, oldest first.

    A request holds its running slot from before its prefill until its last token. Given out first come first served,
    running slots are soon all held by requests that the prefill server puts off, and an urgent request waits for them
    at the door. The oldest late request goes before all once it has waited ``max_starvation_s``, one in
    PLACES_PER_STARVED.

    There is no clock: a request is late when another has arrived after its deadline. Requests with the same times keep
    the order in which they were added. So tensor-parallel ranks that add and remove the same requests, with the same
    times, in the same order, give out running slots in the same order.

    The requests are kept in order: to add or to remove one costs a binary search and moving the pointers behind it.
    """

    def __init__(self, max_starvation_s: float) -> None:
        self._max_starvation_s = max_starvation_s
        self._in_time: _Row[T] = _Row()
        self._late: _Row[T] = _Row()
        self._waiting: dict[int, tuple[DueTimes, int]] = {}
        """Times and number of each request, by its identity."""
        self._added = 0
        self._newest_s = float("-inf")
        self._before_starved = 0
        self._starved: T | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: T) -> bool:
        return id(request) in self._waiting

    def add(self, request: T, times: DueTimes) -> None:
        """``request`` waits from now on. It is told from others by its identity."""
        if times.arrival_s > self._newest_s:
            self._newest_s = times.arrival_s
            self._late.add_all(
                [
                    (_Key(arrival_s, deadline_s, number), late)
                    for (deadline_s, arrival_s, number), late in self._in_time.take_before(self._newest_s)
                ]
            )
        self._waiting[id(request)] = times, self._added
        row, key = self._place(times, self._added)
        row.add(key, request)
        self._added += 1

    def remove(self, request: T) -> None:
        """``request`` waits no longer."""
        row, key = self._place(*self._waiting.pop(id(request)))
        row.remove(key)

    def give_place(self, request: T) -> None:
        """``request`` has got a running slot, and waits no longer."""
        if request is self._starved:
            self._before_starved = PLACES_PER_STARVED
        self._before_starved -= 1
        self.remove(request)

    def in_order(self) -> list[T]:
        """The waiting requests, in the order in which they are to get running slots."""
        self._starved = self._find_starved()
        if self._starved is None:
            return self._in_time.requests + self._late.requests
        return [self._starved, *self._in_time.requests, *self._late.requests[1:]]

    def _find_starved(self) -> T | None:
        if len(self) < 2 or self._before_starved > 0 or not self._late.requests:
            return None
        arrival_s = self._late.keys[0].first_s
        return self._late.requests[0] if arrival_s + self._max_starvation_s <= self._newest_s else None

    def _place(self, times: DueTimes, number: int) -> tuple[_Row[T], _Key]:
        arrival_s, deadline_s = times
        if deadline_s < self._newest_s:
            return self._late, _Key(arrival_s, deadline_s, number)
        return self._in_time, _Key(deadline_s, arrival_s, number)


class _Key(NamedTuple):
    """What a row is sorted by: the deadline before the arrival, or the other way round, and no two alike."""

    first_s: float
    second_s: float
    number: int


class _Row(Generic[T]):
    """Requests sorted by their keys, in two lists side by side."""

    def __init__(self) -> None:
        self.keys: list[_Key] = []
        self.requests: list[T] = []

    def add(self, key: _Key, request: T) -> None:
        place = bisect_left(self.keys, key)
        self.keys.insert(place, key)
        self.requests.insert(place, request)

    def add_all(self, entries: Sequence[tuple[_Key, T]]) -> None:
        """Add a few one by one; sort once for many."""
        if len(entries) <= len(self.keys) // 8:
            for key, request in entries:
                self.add(key, request)
        elif entries:
            together = [*zip(self.keys, self.requests, strict=True), *entries]
            together.sort(key=itemgetter(0))
            self.keys = [key for key, _ in together]
            self.requests = [request for _, request in together]

    def remove(self, key: _Key) -> None:
        place = bisect_left(self.keys, key)
        del self.keys[place], self.requests[place]

    def take_before(self, first_s: float) -> list[tuple[_Key, T]]:
        """Take out the requests whose keys begin with less than ``first_s``."""
        end = bisect_left(self.keys, _Key(first_s, float("-inf"), -1))
        taken = list(zip(self.keys[:end], self.requests[:end], strict=True))
        del self.keys[:end], self.requests[:end]
        return taken
