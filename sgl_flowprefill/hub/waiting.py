"""The requests that could be started now: the job of each, its number, since when it could have been read, and which
have an outdated prefix match: more of their prompts has been cached since, or some of what was may be evicted.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from sgl_flowprefill.policy import Job
from sgl_flowprefill.ttft import PrefillShape

BLOCK_TOKENS: Final = 64
"""A longer cached prefix is noticed by blocks of so many tokens."""


@dataclass(eq=False, slots=True)
class WaitingRequest:
    """A request that could be started now."""

    req: Any
    """The role's own: SGLang's Req."""
    number: int
    """Counts the requests that could be started; the same on all tensor-parallel ranks. Its job has it, too, and both
    stay if a prefill of it is given back.
    """
    prompt: Sequence[int]
    shape: PrefillShape
    """New and cached tokens of the request, as the last prefix match left them."""
    readable_s: float
    """When this process could first have read that it can be run: it was sent here, and it has bootstrapped."""
    logprob_rows: int
    """Tokens of its prompt whose log probabilities are asked for."""
    dp_rank: int = 0
    """The part of the engine that computes it."""
    tbt_s: float = math.inf
    """Objective for the time between its tokens."""
    was_given_back: bool = False
    """Whether a prefill of it has begun before, which was given back."""
    watched: int | None = None
    """Hash of its prompt up to the first whole block that is not cached."""
    matched_at: int = 0
    """Evictions (``WaitingRequests.evicted``) before the last prefix match."""


class WaitingRequests:
    """Jobs of the waiting requests, by the role's own request (SGLang's Req, as its ``waiting_queue`` has them)."""

    def __init__(self) -> None:
        self.news_readable_s = math.inf
        """When the first of the requests added since ``forget_news`` could have been read."""
        self._jobs: dict[Any, Job[WaitingRequest]] = {}
        self._by_number: dict[int, Job[WaitingRequest]] = {}
        self._added = 0
        self._watched: dict[int, dict[Any, None]] = {}
        """By the hash of a prompt's beginning, up to the first block that is not cached: the requests that begin so."""
        self._outdated: dict[Any, None] = {}
        """Requests with an outdated prefix match, in the order in which more of their prompts was cached."""
        self.evictions = 0
        """How often something was evicted from the cache so far."""

    def __len__(self) -> int:
        return len(self._jobs)

    def holds(self, job: Job[WaitingRequest]) -> bool:
        """Whether the request of ``job`` waits."""
        return self._by_number.get(job.item.number) is job

    @property
    def jobs(self) -> list[Job[WaitingRequest]]:
        """The jobs of all requests, in the order in which they came."""
        return list(self._jobs.values())

    def next_number(self) -> int:
        """The number of the request that is added next."""
        self._added += 1
        return self._added - 1

    def add(self, job: Job[WaitingRequest]) -> None:
        waiting = job.item
        self.news_readable_s = min(self.news_readable_s, waiting.readable_s)
        self._jobs[waiting.req] = job
        self._by_number[waiting.number] = job
        waiting.matched_at = self.evictions
        self._watch(waiting)

    def matched(self, job: Job[WaitingRequest], shape: PrefillShape) -> bool:
        """``job`` costs ``shape`` by the cached prefix that it has now. Whether a choice may change by that: not so
        where nothing was cached or evicted but of others.
        """
        waiting, is_as_before = job.item, not self.has_more_cached(job) and shape == job.item.shape
        waiting.matched_at = self.evictions
        if is_as_before:
            return False  # what is watched is, too
        self._unwatch(waiting)
        waiting.shape = shape
        self._watch(waiting)
        return True

    def cached(self, prompts: Iterable[Sequence[int]]) -> None:
        """The KV of all of ``prompts`` is in the cache now: requests that begin alike can be matched farther."""
        if not self._watched:
            return
        for prompt in prompts:
            for beginning in beginnings(prompt):
                self._outdated |= self._watched.pop(beginning, {})

    def note_outdated(self, req: Any) -> None:
        """More of the prompt of ``req`` has been cached where it is computed."""
        if req in self._jobs:
            self._outdated[req] = None

    def evicted(self) -> None:
        """Something was evicted from the cache: a cached prefix may be shorter than it was when it was matched. Those
        of requests that are about to start are matched again.
        """
        self.evictions += 1

    def outdated(self, most: int | None = None) -> list[Job[WaitingRequest]]:
        """Requests of whose prompts more has been cached, ``most`` of them at most, in the order in which it was."""
        return [self._jobs[req] for req in islice(self._outdated, most)] if self._outdated else []

    def is_outdated(self, job: Job[WaitingRequest]) -> bool:
        """Whether more of its prompt has been cached since it was matched, or some of what was may be evicted."""
        return self.may_be_evicted(job) or self.has_more_cached(job)

    def may_be_evicted(self, job: Job[WaitingRequest]) -> bool:
        """Whether some of what was cached of its prompt may be evicted since it was matched. What is cached elsewhere,
        of a request without its prompt here, is not asked about.
        """
        waiting = job.item
        return waiting.matched_at != self.evictions and waiting.shape.cached_tokens > 0 and len(waiting.prompt) > 0

    def has_more_cached(self, job: Job[WaitingRequest]) -> bool:
        """Whether more of its prompt has been cached since it was matched."""
        return job.item.req in self._outdated

    @property
    def watches(self) -> bool:
        """Whether something that could be cached would be noticed."""
        return bool(self._watched)

    def forget_news(self) -> None:
        """The hub looks at what there is: what is added from now on is news."""
        self.news_readable_s = math.inf

    def shape(self, req: Any) -> PrefillShape | None:
        """What ``req`` costs as it was matched last, if it waits."""
        job = self._jobs.get(req)
        return None if job is None else job.item.shape

    def numbered(self, numbers: Sequence[int]) -> list[Job[WaitingRequest]]:
        """The jobs with ``numbers``, in their order."""
        return [self._by_number[number] for number in numbers]

    def take(self, reqs: Sequence[Any]) -> list[Job[WaitingRequest]]:
        """The jobs of ``reqs``, which start now and wait no longer."""
        jobs = [self._jobs.pop(req) for req in reqs]
        for job in jobs:
            del self._by_number[job.item.number]
            self._unwatch(job.item)
        return jobs

    def take_all_but(self, reqs: Collection[Any]) -> list[Job[WaitingRequest]]:
        """The jobs of all requests but ``reqs``, which the role lets wait on; none is new here (``Role``)."""
        if len(self._jobs) == len(reqs):
            return []
        waiting = set(reqs)
        return self.take([req for req in self._jobs if req not in waiting])

    def _watch(self, waiting: WaitingRequest) -> None:
        """Notice when the block of the prompt after its cached prefix is cached."""
        cached_blocks = waiting.shape.cached_tokens // BLOCK_TOKENS
        waiting.watched = None
        if len(waiting.prompt) >= (cached_blocks + 1) * BLOCK_TOKENS:
            waiting.watched = next(islice(beginnings(waiting.prompt), cached_blocks, None))
            self._watched.setdefault(waiting.watched, {})[waiting.req] = None

    def _unwatch(self, waiting: WaitingRequest) -> None:
        self._outdated.pop(waiting.req, None)
        if waiting.watched in self._watched:
            watching = self._watched[waiting.watched]
            watching.pop(waiting.req, None)
            if not watching:
                del self._watched[waiting.watched]


def beginnings(prompt: Sequence[int]) -> Iterator[int]:
    """Hashes of ``prompt`` up to each of its whole blocks of BLOCK_TOKENS, each made of the one before."""
    beginning = 0
    for end in range(BLOCK_TOKENS, len(prompt) + 1, BLOCK_TOKENS):
        beginning = hash((beginning, array("q", prompt[end - BLOCK_TOKENS : end]).tobytes()))
        yield beginning
