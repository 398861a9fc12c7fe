"""What will arrive, judged by what has: work that waiting jobs will have to make room for before their deadlines."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
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
NUMBERS: Final = CLASSES * 4 * CLASSES
"""Sums of what arrived at a pace: four for each class of work and of SLO."""
ROWS: Final = 16
"""Paces that there is room for at first: a server's requests are of no more kinds (``ttft.kinds``). For more, one event
copies all sums."""
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
    """float64 [2, paces, 2 * CLASSES]: the four sums of ``_Arrivals``, two and two, each by SLO class."""

    def now(self) -> list[list[float]]:
        """The four sums over all SLO classes before each one, and over all of them, at the present paces. There is time
        for no more than what arrived in ``past_s``.
        """
        factors = [pace.factor for pace in self.paces]
        of_classes = np.array((factors, [factor * factor for factor in factors]))[:, None] @ self.sums
        before = np.zeros((4, CLASSES + 1))
        np.maximum(of_classes, 0.0).reshape(4, CLASSES).cumsum(axis=1, out=before[:, 1:])
        if (works_s := before[0, -1]) > self.past_s:
            before *= self.past_s / works_s
        before_class: list[list[float]] = before.T.tolist()
        return before_class

    def is_outdated(self) -> bool:
        """Whether other requests may count by now."""
        return _has_changed(self.paces, self.factors, CHANGED_PACE)


def _has_changed(paces: Iterable[Pace], factors: Iterable[float], share: float) -> bool:
    return any(abs(pace.factor - factor) > share * factor for pace, factor in zip(paces, factors, strict=True))


NOTHING: Final = Counted(1.0, [], [], np.zeros((2, 0, 2 * CLASSES)))


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
        self._arrivals = _Arrivals()
        self._requests = [0] * PLACES
        """Requests that arrived in each slot."""
        self._arrived = 0
        """Requests that arrived in all slots."""
        self._slot = 0
        """The present slot, counted from time 0. Its place is its remainder."""
        self._now_s = self._since_s = -math.inf
        self._unseen = 0
        self._counted = NOTHING
        self._is_repaced = False
        """Paces have changed since it was asked whether other requests may count by now."""
        self._factors: list[float] = []
        """What its paces were when ``_before_class`` was made."""
        self._before_class = NOTHING.now()
        self._next: Counted | None = None
        """Made with one arrival and valid from the next: who plans by it need not wait for both at once."""

    def arrived(self, now_s: float, work_s: float, slo_s: float, pace: Pace = AS_PREDICTED) -> bool:
        """A request of ``work_s``, before ``pace``, has arrived, which must end within ``slo_s``. Whether other work is
        expected now.

        One that is announced after a later one counts as having arrived together with that.
        """
        self._now_s = now_s = max(now_s, self._now_s)
        self._forget(int(now_s / self._slot_s))
        self._arrivals.add(self._slot, work_s, slo_s, pace)
        self._requests[self._slot % PLACES] += 1
        self._arrived += 1
        self._unseen += 1
        if self._next is None:
            if self._unseen * UPDATES >= self._arrived or self._is_outdated():
                self._next = self._arrivals.counted(self._past_s(), self._slot - SLOTS)
            return False
        self._unseen = 0
        self._counted, self._next = self._next, None
        self._is_repaced = True
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
        self._arrivals.add(request.slot, request.work_s, request.slo_s, request.pace, -1)
        self._requests[request.slot % PLACES] -= 1
        self._arrived -= 1
        self._unseen += 1

    def repaced(self) -> None:
        """Paces have changed: what arrived counts at the present ones."""
        self._is_repaced = True
        if _has_changed(self._counted.paces, self._factors, SAME_PACE):
            self._follow()

    def due_s(self, within_s: float) -> float:
        """Expected work of requests that are still to arrive and whose deadlines pass in the next ``within_s``.

        A request with SLO s is among them when it arrives in the next ``within_s - s``.
        """
        place = bisect_right(SLOS_S, within_s)
        (work, offset, _, _), (up_to_work, up_to_offset, _, _) = self._before_class[place : place + 2]
        return max(work * within_s - offset, up_to_work * within_s - up_to_offset) / self._counted.past_s

    def rooms_s(self, times_s: Sequence[float]) -> list[float]:
        """Time to leave for that work within each of ``times_s``: one standard deviation more, as it arrives at random,
        but no more than all.
        """
        rooms_s: list[float] = []
        before_class, past_s = self._before_class, self._counted.past_s
        from_s = to_s = math.inf
        for within_s in times_s:
            if not from_s <= within_s < to_s:  # not of the class of the one before
                place = bisect_right(SLOS_S, within_s)
                from_s, to_s = SLO_BOUNDS_S[place], SLO_BOUNDS_S[place + 1]
                work, offset, square, square_offset = before_class[place]
                up_to_work, up_to_offset, up_to_square, up_to_square_offset = before_class[place + 1]
            mean, variance = work * within_s - offset, square * within_s - square_offset
            if (up_to_mean := up_to_work * within_s - up_to_offset) > mean:
                mean = up_to_mean
                if (up_to_variance := up_to_square * within_s - up_to_square_offset) > variance:
                    variance = up_to_variance
            room_s = mean / past_s
            if variance > 0.0:
                room_s += sqrt(variance / past_s)
            rooms_s.append(room_s if room_s < within_s else within_s)
        return rooms_s

    def _forget(self, slot: int) -> None:
        """Time has come to ``slot``: forget the slots whose places are needed."""
        if slot - self._slot > SLOTS:
            self._arrivals = _Arrivals()
            self._requests = [0] * PLACES
            self._arrived = 0
            self._slot = slot
            self._since_s = self._now_s
        while self._slot < slot:
            self._slot += 1
            self._arrived -= self._requests[self._slot % PLACES]
            self._requests[self._slot % PLACES] = 0

    def _past_s(self) -> float:
        since_s = max(self._since_s, (self._slot - SLOTS) * self._slot_s)
        return max(self._now_s - since_s, self._window_s * LEAST_SHARE)

    def _is_outdated(self) -> bool:
        """Whether other requests may count by now: asked once after paces have changed."""
        is_repaced, self._is_repaced = self._is_repaced, False
        return is_repaced and self._counted.is_outdated()

    def _follow(self) -> None:
        """What counts is worth what its paces make of it now."""
        self._factors = [pace.factor for pace in self._counted.paces]
        self._before_class = self._counted.now()


class _OfPace(NamedTuple):
    """What arrived at one pace."""

    row: int
    """Where its sums are among those of all paces."""
    slots: deque[int]
    """The slots that are in the sums, the oldest first."""
    by_slot: np.ndarray[Any, np.dtype[np.float64]]
    """float64 [PLACES, CLASSES, 4 * CLASSES]: the sums of each slot."""
    flat: memoryview[float]
    """The same in a row."""


class _Arrivals:
    """What arrived, by pace and before that. The paces are few: one for each kind of requests.

    Each class of work has four sums by class of SLO: of work, that times SLO, work squared, and that times SLO. A pace
    forgets an old slot when a request of it arrives, or when all are summed up: not all paces at one event.
    """

    def __init__(self) -> None:
        self._at: dict[Pace, _OfPace] = {}
        self._sums = np.zeros((ROWS, CLASSES, 4 * CLASSES))
        """A row for each pace, and others for those that may come."""
        self._works_s = np.zeros((ROWS, CLASSES))
        """The work of all slots, by its class."""
        self._first, self._end = CLASSES, 0
        """Requests of no other classes of work have arrived: all numbers of the others are 0, and nobody reads them."""
        self._flat_sums, self._flat_works_s = _flat(self._sums), _flat(self._works_s)
        """Flat views: an arrival adds to a few of their numbers."""

    def add(self, slot: int, work_s: float, slo_s: float, pace: Pace, requests: int = 1) -> None:
        """A request has arrived in ``slot``; with -1 ``requests``, it has not."""
        of_pace = self._at.get(pace) or self._new(pace)
        self._forget(of_pace, slot - SLOTS)
        if not of_pace.slots or of_pace.slots[-1] < slot:
            of_pace.slots.append(slot)
        work, slo = bisect_right(WORKS_S, work_s), bisect_right(SLOS_S, slo_s)
        self._first, self._end = min(self._first, work), max(self._end, work + 1)
        offset_s = min(slo_s, LONGEST_SLO_S)
        cell = 4 * CLASSES * work + slo
        of_all, of_slot = NUMBERS * of_pace.row + cell, NUMBERS * (slot % PLACES) + cell
        for added in (work_s, work_s * offset_s, work_s * work_s, work_s * work_s * offset_s):
            self._flat_sums[of_all] += requests * added
            of_pace.flat[of_slot] += requests * added
            of_all += CLASSES
            of_slot += CLASSES
        self._flat_works_s[CLASSES * of_pace.row + work] += requests * work_s

    def counted(self, past_s: float, oldest: int) -> Counted:
        """The requests that count of those since the slot ``oldest``, which arrived in ``past_s``."""
        for of_pace in self._at.values():
            self._forget(of_pace, oldest)
        works = slice(self._first, self._end)
        factors = np.array([pace.factor for pace in self._at])
        classes = FROM_WORKS_S[1:].searchsorted(factors[:, None] * FROM_WORKS_S[works], side="right")
        works_s = factors[:, None] * self._works_s[: len(self._at), works]
        up_to_s = np.bincount(classes.ravel(), works_s.ravel(), CLASSES).cumsum()
        whole = int(up_to_s.searchsorted(past_s, side="right"))
        shares = np.zeros(CLASSES)
        """Share of the requests that count, by their work at the present pace."""
        shares[:whole] = 1.0
        if whole < CLASSES:  # of the requests that take a little too long, as many as there is time for
            before_s = up_to_s[whole - 1] if whole else 0.0
            shares[whole] = (past_s - before_s) / (up_to_s[whole] - before_s)
        sums = shares[classes][:, None] @ self._sums[: len(self._at), works]
        return Counted(past_s, list(self._at), factors.tolist(), sums.reshape(-1, 2, 2 * CLASSES).swapaxes(0, 1))

    def _new(self, pace: Pace) -> _OfPace:
        if (row := len(self._at)) == len(self._sums):
            self._sums = np.concatenate((self._sums, np.zeros_like(self._sums)))
            self._works_s = np.concatenate((self._works_s, np.zeros_like(self._works_s)))
            self._flat_sums, self._flat_works_s = _flat(self._sums), _flat(self._works_s)
        by_slot = np.zeros((PLACES, CLASSES, 4 * CLASSES))
        self._at[pace] = of_pace = _OfPace(row, deque(), by_slot, _flat(by_slot))
        return of_pace

    def _forget(self, of_pace: _OfPace, oldest: int) -> None:
        """Take the slots before ``oldest`` out of the sums."""
        while of_pace.slots and of_pace.slots[0] < oldest:
            works = slice(self._first, self._end)
            of_slot = of_pace.by_slot[of_pace.slots.popleft() % PLACES, works]
            sums = self._sums[of_pace.row, works]
            sums -= of_slot
            of_slot[:] = 0.0
            self._works_s[of_pace.row, works] = sums[:, :CLASSES].sum(axis=1)


def _flat(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> memoryview[float]:
    """The memory of ``numbers`` in a row: where Python reads and writes single ones faster."""
    return numbers.data.cast("B").cast("d")
