"""Jobs in the order of a number: what every queue is made of."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from operator import attrgetter
from typing import Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job

T = TypeVar("T")
Item = TypeVar("Item")

BLOCK_JOBS: Final = 256
"""Jobs of a block at most: it is cut in two halves beyond."""


class JobList(Generic[T]):
    """Jobs in the order of a key, and of equal ones by their number. The key of a job stays the same while it is there.

    Blocks of keys, as bare numbers, beside blocks of jobs. A search in them touches a few cache lines however many jobs
    there are, where one in a sorted list of tuples reads two objects from memory at each step. No object is made for a
    job, so there is no more to collect for Python than the jobs themselves, and nothing is ever copied as a whole.
    """

    def __init__(self, key: Callable[[Job[T]], float]) -> None:
        self._key = key
        self._keys: list[array[float]] = []
        self._jobs: list[list[Job[T]]] = []
        self._last_keys: array[float] = array("d")
        """Last key of each block."""
        self._length = 0

    def add(self, job: Job[T]) -> None:
        key = self._key(job)
        self._length += 1
        if not self._jobs:
            self._keys.append(array("d", (key,)))
            self._jobs.append([job])
            self._last_keys.append(key)
            return
        block = bisect_left(self._last_keys, key)
        if block == len(self._jobs):
            block -= 1
        keys, jobs = self._keys[block], self._jobs[block]
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] == key:
            block, place = self._among_equals(key, job.number)
            keys, jobs = self._keys[block], self._jobs[block]
            assert place == len(jobs) or jobs[place] is not job, "a job is in a list at most once"
        keys.insert(place, key)
        jobs.insert(place, job)
        if place == len(jobs) - 1:
            self._last_keys[block] = key
        if len(jobs) > BLOCK_JOBS:
            half = len(jobs) // 2
            self._insert_block(block, keys[:half], jobs[:half])
            del keys[:half], jobs[:half]

    def remove(self, job: Job[T]) -> None:
        key = self._key(job)
        block = bisect_left(self._last_keys, key)
        place = bisect_left(self._keys[block], key)
        if self._jobs[block][place] is not job:
            block, place = self._among_equals(key, job.number)
        keys, jobs = self._keys[block], self._jobs[block]
        assert jobs[place] is job, "only a job that is in the list, with the key that it had then, is taken out"
        del keys[place], jobs[place]
        self._length -= 1
        if jobs:
            if place == len(jobs):
                self._last_keys[block] = keys[-1]
        else:
            del self._keys[block], self._jobs[block], self._last_keys[block]

    def first(self) -> Job[T] | None:
        return self._jobs[0][0] if self._jobs else None

    def first_before(self, key: float) -> Job[T] | None:
        """The first job, if its key is smaller."""
        return self._jobs[0][0] if self._jobs and self._keys[0][0] < key else None

    def from_key(self, key: float) -> Iterator[Job[T]]:
        """The jobs whose keys are no smaller, in order. The list may not change meanwhile."""
        block = bisect_left(self._last_keys, key)
        if block == len(self._jobs):
            return iter(())
        place = bisect_left(self._keys[block], key)
        return chain(_items(self._jobs[block], place), chain.from_iterable(_items(self._jobs, block + 1)))

    def before(self, key: float, number: float) -> Iterator[Job[T]]:
        """The jobs before that key and number, the last one first. The list may not change meanwhile."""
        if not self._jobs:
            return iter(())
        block, place = self._among_equals(key, number)
        blocks_before = (reversed(jobs) for jobs in _items_before(self._jobs, block))
        return chain(_items_before(self._jobs[block], place), chain.from_iterable(blocks_before))

    def _among_equals(self, key: float, number: float) -> tuple[int, int]:
        """The block of the first job that is not before that key and number, and its place there; or the end."""
        block = bisect_left(self._last_keys, key)
        block = bisect_left(
            self._jobs, number, block, bisect_right(self._last_keys, key, block), key=lambda jobs: jobs[-1].number
        )
        block = min(block, len(self._jobs) - 1)
        keys, jobs = self._keys[block], self._jobs[block]
        place = bisect_left(keys, key)
        return block, bisect_left(jobs, number, place, bisect_right(keys, key, place), key=attrgetter("number"))

    def _insert_block(self, block: int, keys: array[float], jobs: list[Job[T]]) -> None:
        self._keys.insert(block, keys)
        self._jobs.insert(block, jobs)
        self._last_keys.insert(block, keys[-1])

    def __iter__(self) -> Iterator[Job[T]]:
        return chain.from_iterable(self._jobs)

    def __len__(self) -> int:
        return self._length


def _items(items: Sequence[Item], start: int) -> Iterator[Item]:
    """``items`` from ``start`` on, one by one: a slice would read every one of them from memory at once."""
    return map(items.__getitem__, range(start, len(items)))


def _items_before(items: Sequence[Item], end: int) -> Iterator[Item]:
    """``items`` before ``end``, the last one first."""
    return map(items.__getitem__, range(end - 1, -1, -1))
