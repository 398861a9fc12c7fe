"""What will arrive, judged by what has: work that waiting jobs will have to make room for before their deadlines."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import deque
from itertools import accumulate
from operator import itemgetter, mul
from typing import Final

UPDATES: Final = 20
"""Times that the forecast changes while all that it is judged by is replaced. So an arrival costs as much, on average,
as looking at so many others, however many there are."""
LEAST_SHARE: Final = 1 / 8
"""Of the window: what arrived after a pause is taken for that of so long a time at least."""
_WORK_S, _SLO_S = itemgetter(1), itemgetter(2)


class Forecast:
    """Expects what arrived in the last ``window_s`` to go on arriving, at random and at the same rate.

    Of what arrived, the shortest requests count, as many as there was time for: the longer ones would not be served.
    So the work expected within any time is at most that time.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._recent: deque[tuple[float, float, float]] = deque()
        self._now_s = -math.inf
        self._unseen = 0
        self._past_s = window_s
        self._slos_s: list[float] = []
        self._works_s = [0.0]
        """Work of the requests with the first 0, 1, 2, ... of ``_slos_s``, which came in ``_past_s``."""
        self._offsets_s2 = [0.0]
        """The same, each times its SLO."""

    def arrived(self, now_s: float, work_s: float, slo_s: float) -> bool:
        """A request of ``work_s`` has arrived, which must end within ``slo_s``. Whether other work is expected now.

        One that is announced after a later one counts as having arrived together with that.
        """
        self._now_s = now_s = max(now_s, self._now_s)
        self._recent.append((now_s, work_s, slo_s))
        while self._recent[0][0] < now_s - self._window_s:
            self._recent.popleft()
        self._unseen += 1
        if self._unseen * UPDATES < len(self._recent):
            return False
        self._unseen = 0
        self._update(max(now_s - self._recent[0][0], self._window_s * LEAST_SHARE))
        return True

    def due_s(self, within_s: float) -> float:
        """Expected work of requests that are still to arrive and whose deadlines pass in the next ``within_s``.

        A request with SLO s is among them when it arrives in the next ``within_s - s``.
        """
        place = bisect_right(self._slos_s, within_s)
        return (self._works_s[place] * within_s - self._offsets_s2[place]) / self._past_s

    def _update(self, past_s: float) -> None:
        counted = list(self._recent)
        if sum(map(_WORK_S, counted)) > past_s:
            counted.sort(key=_WORK_S)
            del counted[bisect_right(list(accumulate(map(_WORK_S, counted))), past_s) :]
        counted.sort(key=_SLO_S)
        works_s = list(map(_WORK_S, counted))
        self._past_s = past_s
        self._slos_s = list(map(_SLO_S, counted))
        self._works_s = [0.0, *accumulate(works_s)]
        self._offsets_s2 = [0.0, *accumulate(map(mul, self._slos_s, works_s))]
