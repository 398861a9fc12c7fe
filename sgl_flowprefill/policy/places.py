"""Order in which waiting requests get what a decode server has too little of: a place and KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

T = TypeVar("T")

PLACES_PER_STARVED: Final = 50
"""One place in so many goes to a request that has starved: it is also the share of the time that the prefill policies
give to such requests."""


class DueTimes(NamedTuple):
    """When a request arrived and when its first token is due: seconds on one clock."""

    arrival_s: float
    deadline_s: float


class PlaceOrder(Generic[T]):
    """Requests that can still be in time go first, earliest deadline first; then the late ones, oldest first.

    A request holds its place from before its prefill until its last token. Given out first come first served, places
    are soon all held by requests that the prefill server puts off, and an urgent one waits for them at the door. The
    oldest late request goes before all once it has waited ``max_starvation_s``, one in PLACES_PER_STARVED.

    There is no clock: a request is late when a waiting one has arrived after its deadline. So tensor-parallel ranks,
    which all see the same requests but each have a clock, give out places in the same order.
    """

    def __init__(self, due_times: Callable[[T], DueTimes], max_starvation_s: float) -> None:
        self._due_times = due_times
        self._max_starvation_s = max_starvation_s
        self._before_starved = 0
        self._starved: T | None = None

    def order(self, waiting: Sequence[T]) -> list[T]:
        """``waiting`` in the order in which they are to get places. O(n log n)."""
        if len(waiting) < 2:
            self._starved = None
            return list(waiting)
        times = {id(request): self._due_times(request) for request in waiting}
        now_s = max(arrival_s for arrival_s, _ in times.values())

        def rank(request: T) -> tuple[bool, float, float]:
            arrival_s, deadline_s = times[id(request)]
            return (True, arrival_s, deadline_s) if deadline_s < now_s else (False, deadline_s, arrival_s)

        ordered = sorted(waiting, key=rank)
        self._starved = None
        late = next((place for place, request in enumerate(ordered) if rank(request)[0]), None)
        if late is not None and self._before_starved <= 0:
            arrival_s, _ = times[id(ordered[late])]
            if arrival_s + self._max_starvation_s <= now_s:
                self._starved = ordered.pop(late)
                ordered.insert(0, self._starved)
        return ordered

    def given(self, requests: Collection[T]) -> None:
        """``requests``, of those last ordered, have got places."""
        if self._starved is not None and any(request is self._starved for request in requests):
            self._before_starved = PLACES_PER_STARVED
        self._before_starved -= len(requests)
