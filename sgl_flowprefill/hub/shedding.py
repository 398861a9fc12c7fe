"""Which waiting requests are refused on an overloaded server: those that may be and cannot be met any more, and those
beyond the limit of their class.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from heapq import heapify, heappop, heappush
from typing import Any, Final, NamedTuple

from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job, Policy
from sgl_flowprefill.policy.decode import DecodeLoad

FORGOTTEN: Final = 64
"""Entries of requests that do not wait any more, which are kept at most, beside as many as wait."""


class Refusal(NamedTuple):
    """A request that is to be refused."""

    job: Job[WaitingRequest]
    why: str


LATE: Final = "it has no time for this request, which may be refused (sheddable): the objective cannot be met"
BEYOND: Final = "{waiting} tokens of class {slo_class} wait, and with these {tokens} there would be more than {most}"


class Shedding:
    """The waiting requests that may be refused, as no prefill of theirs has begun: those that are sheddable, and those
    of classes with a limit.

    A sheddable request is looked at when it arrives, and once more when it would have to run by itself to be in time,
    so that an event costs O(log n). A request is beyond the limit of its class when it arrives or not at all, also if
    it is set aside for a while; one that waits alone of its class is let in, however long it is.
    """

    def __init__(self, sheds: bool = True, most_tokens: Mapping[str, int] | None = None) -> None:
        """``sheds``: sheddable requests are refused if they cannot be met. ``most_tokens``: new tokens of prompts that
        wait, by class.
        """
        self.backlog = Backlog()
        self._sheds = sheds
        self._most_tokens = most_tokens or {}
        self._tokens: Counter[str] = Counter()
        """New tokens that wait, by class."""
        self._counted: dict[Any, tuple[str, int]] = {}
        """By the role's request: class and new tokens of waiting requests, as they were counted."""
        self._aside: set[Any] = set()
        """Requests that wait and that the hub does not know of for now: who was let in stays counted."""
        self._beyond: list[Refusal] = []
        self._arrived: list[Job[WaitingRequest]] = []
        self._by_latest_start: list[tuple[float, int, Job[WaitingRequest]]] = []
        self._waiting: set[int] = set()
        """Numbers of the requests."""

    @property
    def remembered(self) -> int:
        """Entries that are kept, of requests that wait and of others."""
        return len(self._by_latest_start) + len(self._arrived) + len(self._beyond)

    def add(self, job: Job[WaitingRequest], slo_class: str, sheddable: bool) -> None:
        """``job`` waits, and nothing has been computed for it. One that an idle server would not meet either is not
        shed: no overload is to blame.
        """
        if slo_class in self._most_tokens and not self._let_in(job, slo_class):
            return
        if self._sheds and sheddable and job.latest_start_s >= job.arrival_s:
            self._waiting.add(job.item.number)
            self._arrived.append(job)

    def set_aside(self, reqs: Collection[Any], come_again: Collection[Any] = ()) -> None:
        """``reqs`` are those that wait and cannot be started for now, whether they were here or not. Of those that were
        set aside before, all that neither are any more nor ``come_again`` have ended.
        """
        for req in self._aside.difference(reqs, come_again):
            self._uncount(req)
        self._aside = set(reqs)

    def _let_in(self, job: Job[WaitingRequest], slo_class: str) -> bool:
        if job.item.req in self._counted:
            return True  # it was before, and comes again
        waiting, tokens, most = self._tokens[slo_class], job.item.shape.new_tokens, self._most_tokens[slo_class]
        if waiting and waiting + tokens > most:
            why = BEYOND.format(waiting=waiting, slo_class=slo_class, tokens=tokens, most=most)
            self._beyond.append(Refusal(job, why))
            return False
        self._tokens[slo_class] += tokens
        self._counted[job.item.req] = slo_class, tokens
        return True

    def _uncount(self, req: Any) -> None:
        if (counted := self._counted.pop(req, None)) is not None:
            slo_class, tokens = counted
            self._tokens[slo_class] -= tokens

    def remove(self, job: Job[WaitingRequest]) -> None:
        """``job`` waits no longer, if it was here, or has been set aside."""
        self._waiting.discard(job.item.number)
        if job.item.req not in self._aside:
            self._uncount(job.item.req)
        if len(self._by_latest_start) > 2 * len(self._waiting) + FORGOTTEN:
            self._by_latest_start = [entry for entry in self._by_latest_start if entry[1] in self._waiting]
            heapify(self._by_latest_start)

    def refused(self, policy: Policy[Any, Any], now_s: float) -> list[Refusal]:
        """The requests that were beyond a limit since the last call, and those that cannot be met, of those that have
        arrived and those that would have to run by now. Whoever asks removes them; one that has left is named as well.
        """
        found, self._beyond = self._beyond, []
        arrived, self._arrived = self._arrived, []
        entries = self._by_latest_start
        while entries and entries[0][0] < now_s:
            arrived.append(heappop(entries)[2])
        for job in arrived:
            if job.item.number not in self._waiting:
                continue
            if policy.is_late(job, now_s):
                found.append(Refusal(job, LATE))
            else:
                heappush(entries, (max(job.latest_start_s, now_s), job.item.number, job))
        return found


class Backlog:
    """The predicted work of all jobs, summed up by pace."""

    def __init__(self) -> None:
        self._jobs = 0
        self._work_s: dict[Pace, float] = {}

    def add(self, job: Job[Any]) -> None:
        self._jobs += 1
        self._work_s[job.pace] = self._work_s.get(job.pace, 0.0) + job.work_s

    def remove(self, job: Job[Any]) -> None:
        """``job`` is as it was when it was added."""
        self._jobs -= 1
        if self._jobs:
            self._work_s[job.pace] -= job.work_s
        else:
            self._work_s.clear()  # and with it what rounding has left

    @property
    def work_s(self) -> float:
        return max(0.0, sum(work_s * pace.factor for pace, work_s in self._work_s.items()))


def retry_after_s(backlog_s: float, load: DecodeLoad) -> int:
    """Whole seconds until ``backlog_s`` of prefills have run beside the decode steps of ``load``: not before, whatever
    arrives meanwhile.
    """
    prefill_share = 1.0 - (load.step_s / load.period_s if load.period_s < math.inf else 0.0)
    return max(1, math.ceil(backlog_s / prefill_share))
