"""What a server has measured of its own tasks: a bounded sample in which rare shapes stay.

Rows are numbers in one array, so that they can be handed to another process, or written, at once. Where the array is
full, the oldest row of the cell with most rows goes: what is common is kept by its newest, what is rare by all.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final, NamedTuple

import numpy as np

from sgl_flowprefill.ttft.features import COUNT, Array
from sgl_flowprefill.ttft.kinds import BANDS_REQUESTS, share_band

CAPACITY: Final = 1200
OF_PROFILE: Final = -1
"""Number of the rows that the profile has measured."""


class Row(NamedTuple):
    """One measured batch: its features (``ttft.features``), and how long it took."""

    requests: float
    new_tokens: float
    cached_tokens: float
    pairs: float
    seconds: float
    """Device time."""
    slowness: float
    """How many times slower than in the profile the machine was then."""
    number: float
    """Counts the tasks of a server, over its restarts; OF_PROFILE."""
    explored: float = 0.0
    """1 for a batch that nobody asked for, which was run for its time alone."""


COLUMNS: Final = len(Row._fields)
SECONDS: Final = Row._fields.index("seconds")
SLOWNESS: Final = Row._fields.index("slowness")
NUMBER: Final = Row._fields.index("number")
EXPLORED: Final = Row._fields.index("explored")


def rows_of_profile(matrix: Array, seconds: Array) -> Array:
    """[batches, COLUMNS] rows of a profile: ``seconds`` of batches with the features in ``matrix``, as usual."""
    ones = np.ones(len(matrix))
    return np.column_stack([matrix, seconds, ones, OF_PROFILE * ones, 0 * ones])


def features_of(rows: Array) -> Array:
    """[rows, COUNT] features of ``rows``, as the models take them."""
    return rows[:, :COUNT]


def usual_seconds(rows: Array) -> Array:
    """Seconds of ``rows`` on the machine as fast as in the profile."""
    return np.asarray(rows[:, SECONDS] / rows[:, SLOWNESS])


def cell(requests: float, new_tokens: float, cached_tokens: float) -> tuple[int, int, int]:
    """What a row is kept with: rows of about its size, number of requests, and share of cached tokens."""
    return int(new_tokens).bit_length(), bisect_right(BANDS_REQUESTS, requests), share_band(new_tokens, cached_tokens)


class Reservoir:
    """At most ``capacity`` rows."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self._rows = np.empty((capacity, COLUMNS))
        self._size = 0
        self._cells: dict[tuple[int, int, int], deque[int]] = {}
        """Places of the rows of each cell, the oldest first."""

    @classmethod
    def of(cls, rows: Array, capacity: int = CAPACITY) -> Reservoir:
        """One that has been given ``rows`` in the order of their numbers."""
        reservoir = cls(capacity)
        for row in rows[np.argsort(rows[:, NUMBER], kind="stable")].tolist():
            reservoir.add(Row(*row))
        return reservoir

    def __len__(self) -> int:
        return self._size

    def alike(self, requests: float, new_tokens: float, cached_tokens: float) -> int:
        """Rows that are kept with a batch of these features."""
        return len(self._cells.get(cell(requests, new_tokens, cached_tokens), ()))

    def add(self, row: Row) -> None:
        """Keep ``row``, in place of another where there is no room."""
        own = self._cells.setdefault(cell(*row[:3]), deque())
        own.append(self._size)
        if self._size < len(self._rows):
            self._size += 1
        else:
            fullest = max(self._cells.values(), key=lambda places: (len(places), places is not own))
            own[-1] = fullest.popleft()
        self._rows[own[-1]] = row

    @property
    def rows(self) -> Array:
        """[rows, COLUMNS], a copy."""
        return self._rows[: self._size].copy()
