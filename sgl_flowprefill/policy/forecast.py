"""What will arrive, judged by what has: work that waiting jobs will have to make room for before their deadlines."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from itertools import accumulate
from typing import Final

UPDATES_PER_WINDOW: Final = 64
LEAST_SHARE: Final = 1 / 8
"""Of the window: what arrived after a pause is taken for that of so long a time at least."""


class Forecast:
    """Expects what arrived in the last ``window_s`` to go on arriving, at random and at the same rate.

    Of what arrived, the shortest requests count, as many as there was time for: the longer ones would not be served.
    So the work expected within any time is at most that time.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._recent: deque[tuple[float, float, float]] = deque()
        self._next_update_s = float("-inf")
        self._slos_s: list[float] = []
        self._rates = [0.0]
        """Seconds of work a second, of requests with the first 0, 1, 2, ... of ``_slos_s``."""
        self._offsets_s = [0.0]
        """The same, each times its SLO."""

    def arrived(self, now_s: float, work_s: float, slo_s: float) -> None:
        """A request of ``work_s`` has arrived, which must end within ``slo_s``."""
        self._recent.append((now_s, work_s, slo_s))
        while self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        if now_s >= self._next_update_s:
            self._next_update_s = now_s + self._window_s / UPDATES_PER_WINDOW
            self._update(max(now_s - self._recent[0][0], self._window_s * LEAST_SHARE))

    def due_s(self, within_s: float) -> float:
        """Expected work of requests that are still to arrive and whose deadlines pass in the next ``within_s``.

        A request with SLO s is among them when it arrives in the next ``within_s - s``.
        """
        place = bisect_right(self._slos_s, within_s)
        return self._rates[place] * within_s - self._offsets_s[place]

    def _update(self, past_s: float) -> None:
        shortest = sorted((work_s, slo_s) for _, work_s, slo_s in self._recent)
        fitting = bisect_right(list(accumulate(work_s for work_s, _ in shortest)), past_s)
        by_slo = sorted((slo_s, work_s / past_s) for work_s, slo_s in shortest[:fitting])
        self._slos_s = [slo_s for slo_s, _ in by_slo]
        self._rates = [0.0, *accumulate(rate for _, rate in by_slo)]
        self._offsets_s = [0.0, *accumulate(slo_s * rate for slo_s, rate in by_slo)]
