"""The requests that could be started now: the job of each, its number, and since when it could have been read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from sglang.srt.disaggregation.base import KVPoll

from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.deadline import sent_s
from sgl_flowprefill.ttft import PrefillShape


@dataclass(eq=False)
class WaitingRequest:
    """A request that could be started now."""

    req: Any
    """SGLang's Req."""
    number: int
    """Counts the requests that could be started; the same on all tensor-parallel ranks."""
    shape: PrefillShape
    """Its cost as the prefix match at its arrival left it."""
    readable_s: float
    """When this process could first have read that it can be run: it was sent here, and it has bootstrapped."""


class WaitingRequests:
    """Their jobs, by SGLang's Req. SGLang's ``waiting_queue`` holds the same requests."""

    def __init__(self) -> None:
        self.news_readable_s = math.inf
        """When the first of the requests added since ``forget_news`` could have been read."""
        self._jobs: dict[Any, Job[WaitingRequest]] = {}
        self._added = 0
        self._bootstrapped_s: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def note_bootstrap(self, bootstrap_room: int, status: Any) -> None:
        """On a transfer thread: how far the bootstrap of the request with that room has come."""
        if status == KVPoll.WaitingForInput:
            self._bootstrapped_s[bootstrap_room] = time.monotonic()
        elif status == KVPoll.Failed:
            self._bootstrapped_s.pop(bootstrap_room, None)

    def add(
        self,
        req: Any,
        arrival_s: float,
        slo_s: float,
        predict_s: Callable[[Sequence[WaitingRequest]], float],
    ) -> Job[WaitingRequest]:
        """The job of ``req``, which has bootstrapped and knows its cached prefix."""
        readable_s = max(sent_s(req), self._bootstrapped_s.pop(req.bootstrap_room, 0.0))
        self.news_readable_s = min(self.news_readable_s, readable_s)
        shape = PrefillShape(len(req.origin_input_ids) - req.prefix_len, req.prefix_len)
        waiting = WaitingRequest(req, self._added, shape, readable_s)
        self._added += 1
        job = self._jobs[req] = Job(waiting, arrival_s, arrival_s + slo_s, predict_s([waiting]))
        return job

    def forget_news(self) -> None:
        """The hub looks at what there is: what is added from now on is news."""
        self.news_readable_s = math.inf

    def numbered(self, numbers: Sequence[int]) -> list[Job[WaitingRequest]]:
        """The jobs of those numbers, in their order."""
        by_number = {job.item.number: job for job in self._jobs.values()}
        return [by_number[number] for number in numbers]

    def take(self, reqs: Sequence[Any]) -> list[Job[WaitingRequest]]:
        """Those that start now: no longer waiting."""
        return [self._jobs.pop(req) for req in reqs]

    def take_all_but(self, reqs: Collection[Any]) -> list[Job[WaitingRequest]]:
        """Those that are not among ``reqs``, which SGLang lets wait."""
        if len(self._jobs) == len(reqs):
            return []
        waiting = set(reqs)
        return self.take([req for req in self._jobs if req not in waiting])
