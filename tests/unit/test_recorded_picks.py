"""Every pick, batch and order of random scripts is what it was when it was recorded."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job, Limits, make_policy


@dataclass(frozen=True)
class R:
    """A waiting request."""

    id: int
    tokens: int
    work_s: float


@dataclass(frozen=True)
class T:
    """A started task."""

    id: int


def request(
    random: Random, number: int, now_s: float, paces: list[Pace], on_grid: bool, weight: float = 1.0
) -> Job[Any]:
    tokens = random.randint(1, 1024)
    work_s = tokens * 0.0001 * random.choice([1, 1, 1, 10])
    arrival_s = now_s - random.random() * random.choice([0.0, 0.05, 10.0])
    deadline_s = arrival_s + random.choice([1e-3, 0.25, 0.5, 1.0, 4.0, 30.0, 1000.0]) * random.random()
    if on_grid:
        arrival_s, deadline_s, work_s = round(arrival_s, 1), round(deadline_s, 1), round(work_s, 1)
    item = R(number, tokens, work_s)
    return Job(item, arrival_s, deadline_s, work_s, number=number, pace=random.choice(paces), weight=weight)


@functools.cache
def decisions(kind: str, seed: int, paces_change: bool = True, weight: float = 1.0) -> str:
    """Digest of what the policy says while requests come, go, change and are done, tasks too, and paces change."""
    random, decided = Random(seed), hashlib.sha256()
    limits = Limits(random.choice([1, 4, 16]), random.choice([1, 500, 2048]), random.choice([4, 64]))
    policy = make_policy(kind, limits, random.choice([0.5, 5.0, 60.0]))
    paces = [Pace() for _ in range(3)] if paces_change else [Pace()]
    on_grid = random.random() < 0.3
    load = random.choice([0.5, 1.0, 2.0, 5.0])
    waiting: dict[int, Job[Any]] = {}
    tasks: dict[int, Job[Any]] = {}
    running: Job[Any] | None = None
    now_s = resumed_s = 0.0
    requests = 0

    def decide(*what: object) -> None:
        decided.update(repr(what).encode())

    for _ in range(random.choice([200, 1500])):
        event, elapsed_s = random.random(), random.expovariate(load / 0.05)
        elapsed_s = round(elapsed_s, 1) if on_grid else elapsed_s
        if running is not None and now_s + elapsed_s > resumed_s + running.remaining_s and event < 0.8:
            now_s = max(now_s, resumed_s + running.remaining_s)
            policy.remove(tasks.pop(running.item.id))
            running = None
        else:
            now_s += elapsed_s
            if running is not None:
                policy.remove(running)
                running.remaining_s = max(0.0, running.remaining_s - (now_s - resumed_s))
                policy.add(running)
                resumed_s = now_s
            if event < 0.75 or not waiting:
                for _ in range(random.choice([1, 1, 1, 5, 30]) if random.random() < 0.2 else 1):
                    waiting[requests] = request(random, requests, now_s, paces, on_grid, weight)
                    policy.add(waiting[requests])
                    requests += 1
            elif event < 0.85:
                policy.remove(waiting.pop(random.choice(sorted(waiting))))
            elif event < 0.9:
                changed = waiting[random.choice(sorted(waiting))]
                policy.remove(changed)
                changed.remaining_s = changed.remaining_s * random.uniform(0.5, 1.0)
                policy.add(changed)
            elif event < 0.94 and paces_change:
                for pace in paces:
                    pace.factor = random.choice([0.5, 1.0, 1.3, 3.0])
                policy.repaced()
            elif event < 0.96 and tasks:
                dropped = tasks.pop(random.choice(sorted(tasks)))
                policy.remove(dropped)
                running = None if dropped is running else running
        winner = policy.pick(now_s, running, random.random() < 0.9)
        if random.random() < 0.15:
            decide("o", [job.number for job in policy.first_waiting(now_s, 40)])
        if winner is None:
            decide("none")
            continue
        decide(winner.number, type(winner.item).__name__, winner.work_s)
        if isinstance(winner.item, R):
            members = policy.batch(
                winner, now_s, lambda item: item.tokens, lambda items: sum(item.work_s for item in items)
            )
            decide([member.number for member in members])
            if random.random() < 0.1:
                winner = policy.pick(now_s, running, False)
                decide(winner and winner.number)
                if winner is None:
                    continue
            else:
                for member in members:
                    policy.remove(waiting.pop(member.item.id))
                task: Job[Any] = Job(
                    T(winner.number), winner.arrival_s, winner.deadline_s, sum(member.work_s for member in members),
                    len(members), winner.number, winner.pace, started=True, weight=weight,
                )  # fmt: skip
                winner = tasks[winner.number] = task
                policy.add(task)
        running, resumed_s = winner, now_s
    return decided.hexdigest()[:12]


def digest(digests: Iterable[str]) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]


SCRIPTS = 12
RECORDED = {
    "feasible": "7301a2067000d82f",
    "s-edf": "ee5f20b9bf06d7f8",
    "s-edf-paper": "70193de4acb17e1d",
    "edf": "09b8fef6a968d4c4",
    "fcfs": "929f8d778ef31ede",
}
"""Digests of the digests of SCRIPTS seeds."""
RECORDED_AT_ONE_PACE = "f7b07d1aadc54810"


@pytest.mark.parametrize("kind", RECORDED)
def test_a_policy_decides_what_it_decided_when_that_was_recorded(kind: str) -> None:
    """Who changes a policy on purpose records anew."""
    assert digest(decisions(kind, seed) for seed in range(SCRIPTS)) == RECORDED[kind]


def test_the_default_policy_decides_what_it_decided_where_no_pace_changes() -> None:
    assert digest(decisions("feasible", seed, paces_change=False) for seed in range(SCRIPTS)) == RECORDED_AT_ONE_PACE


@pytest.mark.parametrize("weight", [0.3, 7.0])
def test_weights_that_are_all_equal_change_no_decision(weight: float) -> None:
    for seed in range(SCRIPTS):
        assert decisions("feasible", seed, weight=weight) == decisions("feasible", seed)
