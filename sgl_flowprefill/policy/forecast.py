"""What will arrive, judged by what has: work that waiting jobs will have to make room for before their deadlines."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any, Final, NamedTuple

import numpy as np

from sgl_flowprefill.pace import AS_PREDICTED, Pace

SLOTS: Final = 20
"""Parts of the window. The oldest is forgotten as a whole, and all that arrived in it."""
PLACES: Final = SLOTS + 1
"""For the present part, too."""
UPDATES: Final = 20
"""The forecast is made anew when one in so many of the requests in the window is new to it."""
LEAST_SHARE: Final = 1 / 8
"""Share of the window: what arrived after a pause is taken for the arrivals of so long a time at least."""
CLASSES: Final = 48
WORKS_S: Final[list[float]] = np.geomspace(1e-4, 1e3, CLASSES - 1).tolist()
SLOS_S: Final[list[float]] = np.geomspace(1e-2, 1e4, CLASSES - 1).tolist()
"""Where classes of requests begin, by their work and by their SLO, after the first class."""
FROM_WORKS_S: Final = np.array([0.0, *WORKS_S])
SLO_BOUNDS_S: Final = [-math.inf, *SLOS_S, math.inf]
LONGEST_SLO_S: Final = 1e9
SAME_PACE: Final = 0.02
"""Relative change of a pace that the forecast does not follow: most tasks that end change paces by less."""
CHANGED_PACE: Final = 0.2
"""Relative change of a pace by which other requests may be those that there is time for."""


class Counted(NamedTuple):
    """The requests that count, summed up without their paces: whatever these become, that is multiplied."""

    past_s: float
    """Time in which they arrived."""
    paces: list[Pace]
    factors: list[float]
    """What the paces were when it was judged which requests count."""
    sums: np.ndarray[Any, np.dtype[np.float64]]
    """float64 [paces, 4 * CLASSES]: the four sums of ``_Arrivals``, each by SLO class."""

    def now(self) -> list[list[float]]:
        """For each SLO class, at the present paces: the four sums over the classes before, and over its own. There is
        time for no more than what arrived in ``past_s``.
        """
        factors = np.array([pace.factor for pace in self.paces])
        works, squares = self.sums[:, : 2 * CLASSES], self.sums[:, 2 * CLASSES :]
        own = np.concatenate((factors @ works, factors**2 @ squares)).reshape(4, CLASSES)
        np.maximum(own, 0.0, out=own)
        if (works_s := own[0].sum()) > self.past_s:
            own *= self.past_s / works_s
        by_class: list[list[float]] = np.concatenate([own.cumsum(axis=1) - own, own]).T.tolist()
        return by_class

    def is_outdated(self) -> bool:
        """Whether other requests may count by now."""
        return _has_changed(self.paces, self.factors, CHANGED_PACE)


def _has_changed(paces: Iterable[Pace], factors: Iterable[float], share: float) -> bool:
    return any(abs(pace.factor - factor) > share * factor for pace, factor in zip(paces, factors, strict=True))


NOTHING: Final = Counted(1.0, [], [], np.zeros((0, 4 * CLASSES)))


class Entry(NamedTuple):
    """A request that has arrived, as it was counted."""

    slot: int
    work_s: float
    slo_s: float
    pace: Pace


class Forecast:
    """Expects what arrived in the last ``window_s`` to go on arriving, at random, at the same rate and at the present
    pace. Which requests count is judged anew as requests arrive, what these take as paces change.

    Of what arrived, the shortest requests count, as many as there was time for: the longer ones would not be served.
    So the work expected within any time is at most that time. Requests are summed up by classes: an arrival costs as
    much, and the forecast is as large, however many there were.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._slot_s = window_s / SLOTS
        self._at: dict[Pace, _Arrivals] = {}
        """What arrived, by pace. The paces are few: one for each kind of requests."""
        self._arrived = 0
        """Requests that arrived in all slots."""
        self._slot = 0
        """The present slot, counted from time 0. Its place is its remainder."""
        self._now_s = self._since_s = -math.inf
        self._unseen = 0
        self._counted = NOTHING
        self._is_outdated = False
        """Whether other requests may count by now."""
        self._factors: list[float] = []
        """What its paces were when ``_by_class`` was made."""
        self._by_class = NOTHING.now()
        self._next: Counted | None = None
        """Made with one arrival and valid from the next: who plans by it need not wait for both at once."""

    def arrived(self, now_s: float, work_s: float, slo_s: float, pace: Pace = AS_PREDICTED) -> bool:
        """A request of ``work_s``, before ``pace``, has arrived, which must end within ``slo_s``. Whether other work is
        expected now.

        One that is announced after a later one counts as having arrived together with that.
        """
        self._now_s = now_s = max(now_s, self._now_s)
        self._forget(int(now_s / self._slot_s))
        arrivals = self._at.get(pace)
        if arrivals is None:
            arrivals = self._at[pace] = _Arrivals()
        arrivals.add(self._slot % PLACES, work_s, slo_s)
        self._arrived += 1
        self._unseen += 1
        if self._next is None:
            if self._unseen * UPDATES >= self._arrived or self._is_outdated:
                self._next = self._summary()
            return False
        self._unseen = 0
        self._counted, self._next = self._next, None
        self._is_outdated = self._counted.is_outdated()
        self._follow()
        return True

    def entry(self, work_s: float, slo_s: float, pace: Pace = AS_PREDICTED) -> Entry:
        """The request that has just ``arrived``."""
        return Entry(self._slot, work_s, slo_s, pace)

    def withdrawn(self, request: Entry) -> None:
        """``request`` was given up before it took any time, so it counts no more among what arrived: what is expected
        with the next arrivals follows.
        """
        if request.slot < self._slot - SLOTS:
            return  # forgotten already
        self._at[request.pace].add(request.slot % PLACES, request.work_s, request.slo_s, -1)
        self._arrived -= 1
        self._unseen += 1

    def repaced(self) -> None:
        """Paces have changed: what arrived counts at the present ones."""
        self._is_outdated = self._counted.is_outdated()
        if _has_changed(self._counted.paces, self._factors, SAME_PACE):
            self._follow()

    def due_s(self, within_s: float) -> float:
        """Expected work of requests that are still to arrive and whose deadlines pass in the next ``within_s``.

        A request with SLO s is among them when it arrives in the next ``within_s - s``.
        """
        work, offset, _, _, own, own_offset, _, _ = self._by_class[bisect_right(SLOS_S, within_s)]
        return (work * within_s - offset + max(0.0, own * within_s - own_offset)) / self._counted.past_s

    def rooms_s(self, times_s: Sequence[float]) -> list[float]:
        """Time to leave for that work within each of ``times_s``: one standard deviation more, as it arrives at random,
        but no more than all.
        """
        rooms_s: list[float] = []
        by_class, past_s = self._by_class, self._counted.past_s
        from_s = to_s = math.inf
        for within_s in times_s:
            if not from_s <= within_s < to_s:  # not of the class of the one before
                place = bisect_right(SLOS_S, within_s)
                from_s, to_s = SLO_BOUNDS_S[place], SLO_BOUNDS_S[place + 1]
                work, offset, square, square_offset, own, own_offset, own_square, own_square_offset = by_class[place]
            mean, variance = work * within_s - offset, square * within_s - square_offset
            if (own_mean := own * within_s - own_offset) > 0.0:
                mean += own_mean
                if (own_variance := own_square * within_s - own_square_offset) > 0.0:
                    variance += own_variance
            room_s = mean / past_s
            if variance > 0.0:
                room_s += sqrt(variance / past_s)
            rooms_s.append(room_s if room_s < within_s else within_s)
        return rooms_s

    def _forget(self, slot: int) -> None:
        """Time has come to ``slot``: forget the slots whose places are needed."""
        if slot - self._slot > SLOTS:
            self._at.clear()
            self._arrived = 0
            self._slot = slot
            self._since_s = self._now_s
        while self._slot < slot:
            self._slot += 1
            for arrivals in self._at.values():
                self._arrived -= arrivals.forget(self._slot % PLACES)

    def _follow(self) -> None:
        """What counts is worth what its paces make of it now."""
        self._factors = [pace.factor for pace in self._counted.paces]
        self._by_class = self._counted.now()

    def _summary(self) -> Counted:
        since_s = max(self._since_s, (self._slot - SLOTS) * self._slot_s)
        past_s = max(self._now_s - since_s, self._window_s * LEAST_SHARE)
        paces, arrived = list(self._at), self._at.values()
        factors = np.array([pace.factor for pace in paces])
        classes = FROM_WORKS_S[1:].searchsorted(np.outer(factors, FROM_WORKS_S), side="right")
        works_s = factors[:, None] * np.stack([arrivals.works_s for arrivals in arrived])
        up_to_s = np.bincount(classes.ravel(), works_s.ravel(), CLASSES).cumsum()
        whole = int(up_to_s.searchsorted(past_s, side="right"))
        shares = np.zeros(CLASSES)
        """Share of the requests that count, by their work at the present pace."""
        shares[:whole] = 1.0
        if whole < CLASSES:  # of the requests that take a little too long, as many as there is time for
            before_s = up_to_s[whole - 1] if whole else 0.0
            shares[whole] = (past_s - before_s) / (up_to_s[whole] - before_s)
        sums = np.stack([arrivals.sums(of_pace) for arrivals, of_pace in zip(arrived, shares[classes], strict=True)])
        return Counted(past_s, paces, factors.tolist(), sums)


class _Arrivals:
    """What arrived at one pace, before that."""

    def __init__(self) -> None:
        self._slots = np.zeros((PLACES, CLASSES, 4, CLASSES))
        """What arrived in each slot, by work and SLO: its work, that times SLO, work squared, and that times SLO."""
        self._requests = [0] * PLACES
        """Requests that arrived in each slot."""
        self._by_work = np.zeros((CLASSES, 4 * CLASSES))
        """Sums of ``_slots`` over all slots."""
        self.works_s = np.zeros(CLASSES)
        """The work of all slots, by its class."""
        self._first, self._end = CLASSES, 0
        """Requests of no other classes of work have arrived: all numbers of the others are 0, and nobody reads them."""
        self._flat_slots, self._flat_sums = _flat(self._slots), _flat(self._by_work)
        self._flat_works_s = _flat(self.works_s)
        """Flat views of ``_slots``, ``_by_work`` and ``works_s``: an arrival adds to a few of their numbers."""

    def add(self, place: int, work_s: float, slo_s: float, requests: int = 1) -> None:
        """A request has arrived in the slot at ``place``; with -1 ``requests``, it has not."""
        work, slo = bisect_right(WORKS_S, work_s), bisect_right(SLOS_S, slo_s)
        self._first, self._end = min(self._first, work), max(self._end, work + 1)
        offset_s = min(slo_s, LONGEST_SLO_S)
        cell = work * 4 * CLASSES + slo
        for added in (work_s, work_s * offset_s, work_s * work_s, work_s * work_s * offset_s):
            self._flat_sums[cell] += requests * added
            self._flat_slots[place * self._by_work.size + cell] += requests * added
            cell += CLASSES
        self._flat_works_s[work] += requests * work_s
        self._requests[place] += requests

    def forget(self, place: int) -> int:
        """Empty the slot at ``place``; returns how many requests arrived in it."""
        requests, self._requests[place] = self._requests[place], 0
        if requests:
            works = slice(self._first, self._end)
            self._by_work[works] -= self._slots[place, works].reshape(-1, 4 * CLASSES)
            self._slots[place, works] = 0.0
            self.works_s[works] = self._by_work[works, :CLASSES].sum(axis=1)
        return requests

    def sums(self, shares: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        """float64 [4 * CLASSES]: the four sums, each by SLO, over the ``shares`` of the classes of work."""
        works = slice(self._first, self._end)
        total: np.ndarray[Any, np.dtype[np.float64]] = shares[works] @ self._by_work[works]
        return total


def _flat(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> memoryview[float]:
    """The memory of ``numbers`` in a row: where Python reads and writes single ones faster."""
    return numbers.data.cast("B").cast("d")
