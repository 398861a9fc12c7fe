"""S-EDF, slack-aware earliest deadline first: the order of the paper, and the same with a bound on starvation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from sgl_flowprefill.policy.base import Candidate, Job, Jobs, Limits, Policy, Standing
from sgl_flowprefill.policy.registry import register
from sgl_flowprefill.policy.slack import STARVED_SHARE, SlackOrder, StarvationTurns

R = TypeVar("R")
K = TypeVar("K")
T = TypeVar("T")

STARVED, FEASIBLE, INFEASIBLE = 0.0, 1.0, 2.0
"""Tiers of jobs."""


@register("s-edf", "slack-aware earliest deadline first, with a bound on starvation")
class SlackEdf(Policy[R, K]):
    """Feasible jobs, earliest deadline first; then the infeasible ones, the oldest first. An infeasible job that has
    waited ``max_starvation_s`` goes before the feasible ones, when it is its turn."""

    def __init__(
        self,
        limits: Limits,
        max_starvation_s: float,
        starved_share: float = STARVED_SHARE,
        infeasible_order: Callable[[Job[Any]], float] = attrgetter("arrival_s"),
    ) -> None:
        super().__init__(limits)
        self._turns = StarvationTurns(starved_share)
        self._waiting: SlackOrder[Any] = SlackOrder(max_starvation_s, self._turns, infeasible_order)
        self._started: SlackOrder[Any] = SlackOrder(max_starvation_s, self._turns, infeasible_order)

    def add(self, job: Job[R] | Job[K]) -> None:
        if job.started:
            self._started.add(job)
            self._turns.charge(job)
        else:
            self._waiting.add(job)

    def remove(self, job: Job[R] | Job[K]) -> None:
        (self._started if job.started else self._waiting).remove(job)

    def repaced(self) -> None:
        self._waiting.repaced()
        self._started.repaced()

    @property
    def waiting(self) -> Jobs[Job[R]]:
        return self._waiting

    @property
    def started(self) -> Jobs[Job[K]]:
        return self._started

    @property
    def infeasible_waiting(self) -> int:
        return self._waiting.infeasible

    def in_order(self, now_s: float) -> Iterator[Job[R]]:
        jobs = self._waiting
        jobs.reclassify(now_s)
        return jobs.behind((*jobs.starved(now_s), jobs.first_feasible(now_s)))

    def starts_alone(self, winner: Job[R], now_s: float) -> bool:
        if self._turns.are_unlimited or self._waiting.first_starved(now_s) is not winner:
            return False
        return any(jobs.first_feasible(now_s) is not None for jobs in (self._waiting, self._started))

    def turn_ends_s(self, job: Job[R]) -> float:
        return self._turns.ends_s(job)

    def standings(self, jobs: Sequence[Job[Any]], now_s: float) -> list[Standing]:
        self._waiting.reclassify(now_s)
        starved = set(map(id, self._waiting.starved(now_s)))

        def standing(job: Job[Any]) -> Standing:
            if id(job) in starved:
                return Standing.STARVED
            return Standing.FEASIBLE if job.latest_start_s >= now_s else Standing.INFEASIBLE

        return list(map(standing, jobs))

    def _best_waiting(self, now_s: float) -> Candidate[R] | None:
        return _best(self._waiting, now_s)

    def _best_started(self, now_s: float) -> Candidate[K] | None:
        return _best(self._started, now_s)


@register("s-edf-paper", "S-EDF as published: infeasible requests latest deadline first, waiting without bound")
class PublishedSlackEdf(SlackEdf[R, K]):
    """The paper's ``sign(slack)/deadline``, highest first. A batch may take all the time that its members have."""

    batch_share = 1.0

    def __init__(self, limits: Limits, max_starvation_s: float) -> None:
        super().__init__(limits, math.inf, infeasible_order=lambda job: -job.deadline_s)


def _best(jobs: SlackOrder[T], now_s: float) -> Candidate[T] | None:
    jobs.reclassify(now_s)
    if (starved := jobs.first_starved(now_s)) is not None:
        return Candidate(STARVED, jobs.infeasible_order(starved), starved)
    if (feasible := jobs.first_feasible(now_s)) is not None:
        return Candidate(FEASIBLE, feasible.deadline_s, feasible)
    infeasible = jobs.first_infeasible()
    return None if infeasible is None else Candidate(INFEASIBLE, jobs.infeasible_order(infeasible), infeasible)
