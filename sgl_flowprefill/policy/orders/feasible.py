"""Feasible-set order: the largest set of jobs that can all meet their deadlines (Moore-Hodgson), with room for what
will arrive, kept up to date from event to event."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from sgl_flowprefill.policy.base import Candidate, Job, Jobs, Limits, Policy, Standing
from sgl_flowprefill.policy.decode import NO_LOAD, DecodeLoad
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.registry import register
from sgl_flowprefill.policy.slack import LOOKS, STARVED_SHARE, SlackOrder, StarvationTurns, is_infeasible

R = TypeVar("R")
K = TypeVar("K")

FORECAST_WINDOW_S: Final = 60.0
"""Past by which the policy judges what will arrive."""
PLANNED: Final = 32
"""Jobs that a plan looks at, the ones with the earliest deadlines: bounds the cost of an event."""
STARVED, KEPT, STARTED, LEFT_OUT, STARTED_INFEASIBLE, INFEASIBLE = 0.0, 1.0, 2.0, 3.0, 4.0, 5.0
"""Tiers of jobs."""

ByWorth = tuple[float, float, int, float]
"""A job by its worth: two numbers, its own number, and its remaining time."""

_BY_DEADLINE: Final = attrgetter("deadline_s", "number")


class Feasible(NamedTuple):
    """Jobs that can all meet their deadlines, by deadline, and by how long their start can be put off."""

    jobs: list[Job[Any]]
    spare_s: float


class Expected(Protocol):
    """What is expected beside the jobs."""

    def rooms_s(self, times_s: Sequence[float]) -> list[float]:
        """Time to leave for it within each of ``times_s`` from now, at most that."""


class Charged(NamedTuple):
    """What will arrive, and the decode steps from ``since_s`` on."""

    forecast: Expected
    load: DecodeLoad
    since_s: float

    def rooms_s(self, times_s: Sequence[float]) -> list[float]:
        for_arrivals = zip(times_s, self.forecast.rooms_s(times_s), strict=True)
        taken_s = self.load.taken_s
        return [min(within_s, room_s + taken_s(self.since_s, within_s)) for within_s, room_s in for_arrivals]


def largest_feasible(by_deadline: Sequence[Job[Any]], now_s: float, expected: Expected) -> Feasible:
    """What to keep of ``by_deadline``.

    In order of deadlines, jobs are taken on until one would be late; then the job that takes longest per request is let
    go. What is ``expected`` before a job's deadline is taken off the time until then. Without batches and arrivals, a
    largest set of jobs that all finish in time beside the decode steps is kept (Moore 1968: steps leave the more time
    until a deadline the later it is, so that time can stand for the deadline).

    Where weights differ, the most weight that can be met is hard to find (a knapsack). The set is the heavier one of
    two, each from the jobs that could be met alone: in the first, the job is let go that takes longest per weight, in
    the second the lightest one.
    """
    if len({job.weight for job in by_deadline}) <= 1:
        return _feasible(by_deadline, now_s, expected, _longest_per_weight)

    rooms_s = expected.rooms_s([job.deadline_s - now_s for job in by_deadline])
    alone = [job for job, room_s in zip(by_deadline, rooms_s, strict=True) if job.latest_start_s - room_s >= now_s]
    found = _feasible(alone, now_s, expected, _longest_per_weight)
    if len(found.jobs) == len(alone):
        return found
    other = _feasible(alone, now_s, expected, _lightest)
    return other if _weight(other.jobs) > _weight(found.jobs) else found


def _longest_per_weight(job: Job[Any]) -> ByWorth:
    remaining_s = job.work_s * job.pace.factor
    return -remaining_s / (job.requests * job.weight), 0.0, job.number, remaining_s


def _lightest(job: Job[Any]) -> ByWorth:
    remaining_s = job.work_s * job.pace.factor
    return job.requests * job.weight, -remaining_s, job.number, remaining_s


def _weight(jobs: Iterable[Job[Any]]) -> float:
    return sum(job.requests * job.weight for job in jobs)


def _feasible(
    by_deadline: Sequence[Job[Any]],
    now_s: float,
    expected: Expected,
    worth: Callable[[Job[Any]], ByWorth],
) -> Feasible:
    """Jobs that can all be met; those of the least ``worth`` are let go."""
    taken: list[Job[Any]] = []
    by_worth: list[ByWorth] = []
    in_heap = 0
    """How many of ``taken`` are in ``by_worth``. The rest follow when one has to be let go."""
    let_go: set[int] = set()
    end_s, spare_s = now_s, math.inf
    rooms_s = expected.rooms_s([job.deadline_s - now_s for job in by_deadline])
    for job, room_s in zip(by_deadline, rooms_s, strict=True):
        taken.append(job)
        end_s += job.work_s * job.pace.factor
        free_until_s = job.deadline_s - room_s
        if end_s > free_until_s:
            for other in taken[in_heap:]:
                heappush(by_worth, worth(other))
            in_heap = len(taken)
            while by_worth and end_s > free_until_s:
                _, _, worst, remaining_s = heappop(by_worth)
                let_go.add(worst)
                end_s -= remaining_s
        if free_until_s - end_s < spare_s and len(taken) > len(let_go):
            spare_s = free_until_s - end_s
    return Feasible([job for job in taken if job.number not in let_go] if let_go else taken, spare_s)


class Plan:
    """Which of the jobs that compete for one machine to keep.

    S-EDF only drops what is late by itself, and under overload starts jobs that together cannot all be met. Here jobs
    that can all be met are ``kept``, in order of deadlines (``largest_feasible``).

    One number tells whether the plan still holds: the latest time at which to start ``kept``, or a bound below it,

        latest start <= deadline - expected work due before it - work of the kept jobs up to it,   for each kept job.

    * While the first job runs, it moves along with the time. The work expected before a deadline only becomes less as
      the deadline comes nearer. So while the plan is followed, it holds, and nothing is planned.
    * A job that comes takes its own work off, or sets it to what its own deadline asks. If it is not past then, the
      plan with this job holds: one more than the most that could be met is the most. If it is, all are planned anew.
    * While a decode step runs, the kept jobs stand still. All jobs are planned anew behind it, as the load has changed.
    * A job that was let go does not come back while the plan is followed, as a new plan would let it go again, but for
      the work that the forecast no longer expects. All jobs are planned anew when the forecast or the paces change, and
      when nothing is kept any more.
    """

    def __init__(self, forecast: Forecast) -> None:
        self.kept: list[Job[Any]] = []
        """By deadline."""
        self._forecast = forecast
        self._load = NO_LOAD
        self._last_arrived = -1
        """Number of the last job that was counted among what arrives."""
        self._now_s = -math.inf
        self._latest_start_s = math.inf
        self._horizon_s = math.inf
        """Jobs with later deadlines wait for the next plan of all: only PLANNED at a time are planned."""
        self._is_old = False
        """What the plan goes by has changed."""
        self._some_have_left = False
        """Jobs that were kept have left since all jobs were planned."""

    def arrived(self, job: Job[Any]) -> None:
        """``job`` waits: count it among what arrives, unless nobody could have met its deadline, or it is put back."""
        if job.number > self._last_arrived and job.latest_start_s >= job.arrival_s:
            self._last_arrived = job.number
            slo_s = job.deadline_s - job.arrival_s
            changed = self._forecast.arrived(job.arrival_s, job.work_s, slo_s, job.pace)
            self._is_old = self._is_old or changed
            job.counted = self._forecast.entry(job.work_s, slo_s, job.pace)

    def withdrawn(self, job: Job[Any]) -> None:
        """``job`` is not wanted any more and has taken no time: it counts no more among what arrives. Clients that open
        long requests and leave at once would take the machine from the others.
        """
        if job.counted is not None:
            self._forecast.withdrawn(job.counted)

    def repaced(self) -> None:
        """Paces of jobs have changed."""
        self._forecast.repaced()
        self._is_old = True

    def charge(self, load: DecodeLoad) -> None:
        """Decode steps take ``load`` from now on."""
        if load is not self._load:
            self._load = load
            self._is_old = True

    def add(self, job: Job[Any]) -> None:
        """Keep ``job``, or leave it out."""
        deadline_s, remaining_s = job.deadline_s, job.remaining_s
        since_s = job.arrival_s if job.arrival_s > self._now_s else self._now_s
        [room_s] = self._expected(since_s).rooms_s([deadline_s - since_s])
        alone_s = deadline_s - room_s - remaining_s
        if alone_s < since_s or deadline_s > self._horizon_s:
            return
        place = self._place(job)
        ahead_s = sum([before.work_s * before.pace.factor for before in self.kept[:place]]) if place else 0.0
        self._latest_start_s -= remaining_s
        if alone_s - ahead_s < self._latest_start_s:
            self._latest_start_s = alone_s - ahead_s
        self.kept.insert(place, job)
        if len(self.kept) > PLANNED:
            self._horizon_s = self.kept.pop().deadline_s

    def remove(self, job: Job[Any]) -> None:
        """Take ``job`` out of the kept jobs, if it is there."""
        kept = self.kept
        place = self._place(job)
        if place == len(kept) or kept[place] is not job:
            return
        del kept[place]
        self._some_have_left = True
        if not self.kept:
            self._latest_start_s = math.inf
        elif place == 0:
            self._latest_start_s += job.remaining_s

    def is_late(self, job: Job[Any], now_s: float) -> bool:
        """Whether ``job`` misses its deadline behind the kept jobs that are due before it, and the decode steps until
        then. What will arrive is not counted: it may not.
        """
        place = self._place(job)
        if place < len(self.kept) and self.kept[place] is job:
            return False
        ahead_s = sum(before.remaining_s for before in self.kept[:place])
        steps_s = self._load.taken_s(now_s, max(0.0, job.deadline_s - now_s))
        return now_s + ahead_s + job.remaining_s + steps_s > job.deadline_s

    def holds(self, now_s: float) -> bool:
        """Whether the plan need not be made anew at ``now_s``: it can be met, and no other job might fit."""
        self._now_s = now_s
        return not (self._is_old or now_s > self._latest_start_s or (self._some_have_left and not self.kept))

    def make(self, by_deadline: list[Job[Any]]) -> None:
        """Plan anew at the present time: choose from ``by_deadline``, where more than PLANNED need not be looked at."""
        self._is_old = self._some_have_left = False
        self._horizon_s = by_deadline[PLANNED].deadline_s if len(by_deadline) > PLANNED else math.inf
        self.kept, spare_s = largest_feasible(by_deadline[:PLANNED], self._now_s, self._expected(self._now_s))
        self._latest_start_s = self._now_s + spare_s

    def _expected(self, since_s: float) -> Expected:
        """What to leave room for from ``since_s`` on."""
        return self._forecast if self._load is NO_LOAD else Charged(self._forecast, self._load, since_s)

    def _place(self, job: Job[Any]) -> int:
        """Place of ``job`` among the kept jobs: most often the first one."""
        kept = self.kept
        if not kept or kept[0] is job or job.deadline_s < kept[0].deadline_s:
            return 0
        if job.deadline_s > kept[-1].deadline_s:
            return len(kept)
        return bisect_left(kept, (job.deadline_s, job.number), key=_BY_DEADLINE)


@register("feasible", "the largest set that can meet its objectives, earliest deadline first")
class FeasibleSet(Policy[R, K]):
    """The jobs that a plan of all keeps, earliest deadline first, and then the jobs that it gives up.

    Of the tasks that it gives up the one with least left goes first, as each holds KV cache and a place among the
    suspended; the requests that it gives up are in the order of S-EDF. The infeasible tasks wait for every request that
    can still be met.

    There are as many tasks as may be suspended, and one that runs: each is looked at.
    """

    def __init__(self, limits: Limits, max_starvation_s: float, window_s: float = FORECAST_WINDOW_S) -> None:
        super().__init__(limits)
        self._max_starvation_s = max_starvation_s
        self._turns = StarvationTurns(STARVED_SHARE)
        self._waiting: SlackOrder[Any] = SlackOrder(max_starvation_s, self._turns)
        self._started: list[Job[Any]] = []
        self._plan = Plan(Forecast(window_s))

    def add(self, job: Job[R] | Job[K]) -> None:
        if job.started:
            self._started.append(job)
            self._turns.charge(job)
        else:
            self._waiting.add(job)
            self._plan.arrived(job)
        self._plan.add(job)

    def remove(self, job: Job[R] | Job[K]) -> None:
        (self._started if job.started else self._waiting).remove(job)
        self._plan.remove(job)

    def repaced(self) -> None:
        self._waiting.repaced()
        self._plan.repaced()

    def withdrawn(self, job: Job[R]) -> None:
        self._plan.withdrawn(job)

    def charge(self, load: DecodeLoad) -> None:
        self._plan.charge(load)

    def keeps(self, job: Job[K], now_s: float) -> bool:
        self._update(now_s)
        return any(kept is job for kept in self._plan.kept)

    def starts_alone(self, winner: Job[R], now_s: float) -> bool:
        return bool(self._plan.kept) and self._waiting.first_starved(now_s) is winner

    def turn_ends_s(self, job: Job[R]) -> float:
        return self._turns.ends_s(job)

    def standings(self, jobs: Sequence[Job[Any]], now_s: float) -> list[Standing]:
        self._reclassify(now_s)
        starved, kept = self._waiting.first_starved(now_s), set(map(id, self._plan.kept))

        def standing(job: Job[Any]) -> Standing:
            if job is starved:
                return Standing.STARVED
            if id(job) in kept:
                return Standing.KEPT
            return Standing.LEFT_OUT if job.latest_start_s >= now_s else Standing.INFEASIBLE

        return list(map(standing, jobs))

    def is_late(self, job: Job[R], now_s: float) -> bool:
        self._update(now_s)
        return self._plan.is_late(job, now_s)

    @property
    def waiting(self) -> Jobs[Job[R]]:
        return self._waiting

    @property
    def started(self) -> Jobs[Job[K]]:
        return self._started

    @property
    def kept(self) -> list[Job[R] | Job[K]]:
        """The jobs that can all be met, by deadline."""
        return self._plan.kept

    @property
    def infeasible_waiting(self) -> int:
        return self._waiting.infeasible

    def in_order(self, now_s: float) -> Iterator[Job[R]]:
        self._reclassify(now_s)
        kept = [job for job in self._plan.kept if not job.started]
        return self._waiting.behind((*self._waiting.starved(now_s), *kept, self._waiting.first_feasible(now_s)))

    def _best_waiting(self, now_s: float) -> Candidate[R] | None:
        self._reclassify(now_s)
        if (starved := self._waiting.first_starved(now_s)) is not None:
            return Candidate(STARVED, starved.arrival_s, starved)
        for kept in self._plan.kept:
            if not kept.started:
                return Candidate(KEPT, kept.deadline_s, kept)
        if (feasible := self._waiting.first_feasible(now_s)) is not None:
            return Candidate(LEFT_OUT, feasible.deadline_s, feasible)
        infeasible = self._waiting.first_infeasible()
        return None if infeasible is None else Candidate(INFEASIBLE, infeasible.arrival_s, infeasible)

    def _best_started(self, now_s: float) -> Candidate[K] | None:
        self._update(now_s)
        if not self._started:
            return None
        if (starved := self._starved_task(now_s)) is not None:
            return Candidate(STARVED, starved.arrival_s, starved)
        for kept in self._plan.kept:
            if kept.started:
                return Candidate(KEPT, kept.deadline_s, kept)

        def rank(job: Job[Any]) -> tuple[float, float, int]:
            remaining_s = job.work_s * job.pace.factor
            return STARTED_INFEASIBLE if job.deadline_s - remaining_s < now_s else STARTED, remaining_s, job.number

        best = min(self._started, key=rank)
        tier, remaining_s, _ = rank(best)
        return Candidate(tier, remaining_s, best)

    def _starved_task(self, now_s: float) -> Job[K] | None:
        """The oldest infeasible task, if it has waited too long and it is its turn."""
        starved = [
            job
            for job in self._started
            if job.arrival_s + self._max_starvation_s <= now_s and job.latest_start_s < now_s
        ]
        if not starved:
            return None
        oldest = min(starved, key=attrgetter("arrival_s", "number"))
        return oldest if self._turns.is_turn_of(oldest, now_s) else None

    def _reclassify(self, now_s: float) -> None:
        for job in self._waiting.reclassify(now_s):
            if is_infeasible(job):
                self._plan.remove(job)
            else:
                self._plan.add(job)
        self._update(now_s)

    def _update(self, now_s: float) -> None:
        if not self._plan.holds(now_s):
            self._plan.make(self._feasible(now_s))

    def _feasible(self, now_s: float) -> list[Job[Any]]:
        """The jobs that can meet their deadlines by themselves, by deadline: the first of many."""
        found: list[Job[Any]] = []
        for job in islice(self._waiting.feasible, PLANNED + LOOKS):
            if job.deadline_s - job.work_s * job.pace.factor >= now_s:
                found.append(job)
                if len(found) > PLANNED:
                    break
        if started := [job for job in self._started if job.latest_start_s >= now_s]:
            found = sorted(found + started, key=_BY_DEADLINE)
        return found
