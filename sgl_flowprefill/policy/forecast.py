"""What will arrive, judged by what has: work that waiting jobs will have to make room for before their deadlines."""

from __future__ import annotations

import math
from bisect import bisect_right
from math import sqrt
from typing import Any, Final

import numpy as np

SLOTS: Final = 20
"""Parts of the window. The oldest is forgotten as a whole, and all that arrived in it."""
UPDATES: Final = 20
"""Times that the forecast changes while all that it is judged by is replaced."""
LEAST_SHARE: Final = 1 / 8
"""Share of the window: what arrived after a pause is taken for the arrivals of so long a time at least."""
CLASSES: Final = 48
WORKS_S: Final[list[float]] = np.geomspace(1e-4, 1e3, CLASSES - 1).tolist()
SLOS_S: Final[list[float]] = np.geomspace(1e-2, 1e4, CLASSES - 1).tolist()
"""Where classes of requests begin, by their work and by their SLO, after the first class."""
LONGEST_SLO_S: Final = 1e9


class Forecast:
    """Expects what arrived in the last ``window_s`` to go on arriving, at random and at the same rate.

    Of what arrived, the shortest requests count, as many as there was time for: the longer ones would not be served.
    So the work expected within any time is at most that time. Requests are summed up by classes: an arrival costs as
    much, and the forecast is as large, however many there were.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._slot_s = window_s / SLOTS
        self._slots = np.zeros((SLOTS + 1, CLASSES, 4, CLASSES))
        """What arrived in each slot, by work and SLO: its work, that times SLO, work squared, and that times SLO."""
        self._arrivals = [0] * (SLOTS + 1)
        """Requests that arrived in each slot."""
        self._sums = np.zeros((CLASSES, 4, CLASSES))
        """Sums of ``_slots`` over all slots."""
        self._flat_slots, self._flat_sums = _flat(self._slots), _flat(self._sums)
        """Flat views of ``_slots`` and ``_sums``: an arrival adds to a few of their numbers."""
        self._arrived = 0
        """Requests that arrived in all slots."""
        self._slot = 0
        """The present slot, counted from time 0. Its place is its remainder."""
        self._now_s = self._since_s = -math.inf
        self._unseen = 0
        self._past_s = window_s
        self._counted = [[0.0] * 8] * CLASSES
        """For each SLO class: the four sums over the counted requests of the classes before, and over its own."""
        self._next: tuple[float, list[list[float]]] | None = None
        """Both, made with one arrival and valid from the next: who plans by them need not wait for both at once."""

    def arrived(self, now_s: float, work_s: float, slo_s: float) -> bool:
        """A request of ``work_s`` has arrived, which must end within ``slo_s``. Whether other work is expected now.

        One that is announced after a later one counts as having arrived together with that.
        """
        self._now_s = now_s = max(now_s, self._now_s)
        self._forget(int(now_s / self._slot_s))
        work, slo = bisect_right(WORKS_S, work_s), bisect_right(SLOS_S, slo_s)
        offset_s = min(slo_s, LONGEST_SLO_S)
        place, cell = self._slot % (SLOTS + 1), work * 4 * CLASSES + slo
        for added in (work_s, work_s * offset_s, work_s * work_s, work_s * work_s * offset_s):
            self._flat_sums[cell] += added
            self._flat_slots[place * self._sums.size + cell] += added
            cell += CLASSES
        self._arrivals[place] += 1
        self._arrived += 1
        self._unseen += 1
        if self._next is None:
            if self._unseen * UPDATES >= self._arrived:
                since_s = max(self._since_s, (self._slot - SLOTS) * self._slot_s)
                self._next = self._summary(max(now_s - since_s, self._window_s * LEAST_SHARE))
            return False
        self._unseen = 0
        self._past_s, self._counted = self._next
        self._next = None
        return True

    def due_s(self, within_s: float) -> float:
        """Expected work of requests that are still to arrive and whose deadlines pass in the next ``within_s``.

        A request with SLO s is among them when it arrives in the next ``within_s - s``.
        """
        work, offset, _, _, own, own_offset, _, _ = self._counted[bisect_right(SLOS_S, within_s)]
        return (work * within_s - offset + max(0.0, own * within_s - own_offset)) / self._past_s

    def room_s(self, within_s: float) -> float:
        """Time to leave for that work: one standard deviation more, as it arrives at random, but no more than all."""
        work, offset, square, square_offset, own, own_offset, own_square, own_square_offset = self._counted[
            bisect_right(SLOS_S, within_s)
        ]
        mean, variance = work * within_s - offset, square * within_s - square_offset
        if (own_mean := own * within_s - own_offset) > 0.0:
            mean += own_mean
            if (own_variance := own_square * within_s - own_square_offset) > 0.0:
                variance += own_variance
        room_s = mean / self._past_s
        if variance > 0.0:
            room_s += sqrt(variance / self._past_s)
        return room_s if room_s < within_s else within_s

    def _forget(self, slot: int) -> None:
        """Time has come to ``slot``: forget the slots whose places are needed."""
        if slot - self._slot > SLOTS:
            self._slots[:] = self._sums[:] = 0.0
            self._arrivals = [0] * len(self._arrivals)
            self._arrived = 0
            self._slot = slot
            self._since_s = self._now_s
        while self._slot < slot:
            self._slot += 1
            place = self._slot % len(self._slots)
            if self._arrivals[place]:
                self._arrived -= self._arrivals[place]
                self._arrivals[place] = 0
                self._sums -= self._slots[place]
                self._slots[place] = 0.0

    def _summary(self, past_s: float) -> tuple[float, list[list[float]]]:
        works_s = self._sums[:, 0].sum(axis=1).cumsum()
        whole = int(works_s.searchsorted(past_s, side="right"))
        counted = self._sums[:whole].sum(axis=0)
        if whole < CLASSES:  # of the requests that take a little too long, as many as there is time for
            before_s = works_s[whole - 1] if whole else 0.0
            counted += self._sums[whole] * ((past_s - before_s) / (works_s[whole] - before_s))
        np.maximum(counted, 0.0, out=counted)
        by_class = np.empty((2, 4, CLASSES))
        counted.cumsum(axis=1, out=by_class[0])
        by_class[0] -= counted
        by_class[1] = counted
        return past_s, by_class.reshape(8, CLASSES).T.tolist()


def _flat(numbers: np.ndarray[Any, np.dtype[np.float64]]) -> memoryview[float]:
    """The memory of ``numbers`` in a row: where Python reads and writes single ones faster."""
    return numbers.data.cast("B").cast("d")
