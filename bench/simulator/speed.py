"""How fast the policy is by itself: requests through the policy objects, with nothing around them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.policy import Job, Policy

WARM_UP: Final = 100
"""Events that are not measured."""

NewPolicy = Callable[[], Policy[Any, Any]]


class PolicySpeed(NamedTuple):
    """What the policy does in a second of wall time on one core."""

    requests_per_s: float
    events_per_s: float


def policy_speed(new_policy: NewPolicy, requests: list[SimRequest]) -> PolicySpeed:
    """Serve ``requests`` one at a time, each at its predicted time: two events a request, arrival and completion.

    At an arrival the running task is put back with what is left of it and the winner starts or goes on, as the runtime
    does it; forward passes, checkpoints and batches cost nothing here.
    """
    policy = new_policy()
    running: Job[Any] | None = None
    resumed_s = end_s = 0.0
    events = 0
    arrivals = iter(requests)
    arriving = next(arrivals, None)
    started_s = time.perf_counter()
    while arriving is not None or running is not None:
        if running is not None and (arriving is None or end_s <= arriving.ready_s):
            now_s = end_s
            policy.remove(running)
            running = None
        else:
            assert arriving is not None
            now_s = arriving.ready_s
            if running is not None:
                policy.remove(running)
                running.remaining_s -= now_s - resumed_s
                policy.add(running)
            policy.add(Job(arriving, arriving.arrival_s, arriving.deadline_s, arriving.predicted_s))
            arriving = next(arrivals, None)
        events += 1
        winner = policy.pick(now_s, running)
        if winner is None:
            continue
        if isinstance(winner.item, SimRequest):
            policy.remove(winner)
            winner = Job(
                (winner.item,),
                winner.arrival_s,
                winner.deadline_s,
                winner.remaining_s,
                number=winner.number,
                started=True,
            )
            policy.add(winner)
        running, resumed_s, end_s = winner, now_s, now_s + winner.remaining_s
    elapsed_s = time.perf_counter() - started_s
    return PolicySpeed(len(requests) / elapsed_s, events / elapsed_s)


class EventCost(NamedTuple):
    """CPU time of events on one core."""

    p50_s: float
    p99_s: float
    max_s: float


class Waiting(NamedTuple):
    """A kind of waiting requests: drawn uniformly, for work of about WORK_S each."""

    ages_s: tuple[float, float]
    slos_s: tuple[float, float]


WORK_S: Final = 0.02
ON_TIME = Waiting(ages_s=(0.0, 1.0), slos_s=(1e6, 2e6))
LEFT_OUT = Waiting(ages_s=(0.0, 1.0), slos_s=(600.0, 1200.0))
"""Each could meet its deadline; 100,000 of them cannot."""
TIGHT = Waiting(ages_s=(0.0, 0.1), slos_s=(0.1, 2.0))
"""Most turn hopeless while they wait."""
HOPELESS = Waiting(ages_s=(0.0, 1.0), slos_s=(0.0, 0.001))
STARVED = Waiting(ages_s=(100.0, 1000.0), slos_s=(0.0, 50.0))
KINDS: Final = {
    "on time": (ON_TIME,),
    "left out": (LEFT_OUT,),
    "tight": (TIGHT,),
    "hopeless": (HOPELESS,),
    "starved": (STARVED,),
    "mixed": (ON_TIME, LEFT_OUT, TIGHT, HOPELESS, STARVED),
}


def event_cost(new_policy: NewPolicy, kinds: Sequence[Waiting], waiting: int, events: int = 5000) -> EventCost:
    """What an event costs while ``waiting`` requests of ``kinds`` wait, all that the runtime's hub asks of the policy.

    A request arrives (as soon as less than ``waiting`` wait) or the running task ends; the running task is put back
    with what is left of it; the policy picks; where a request wins, its batch is made, leaves the queue and starts as a
    task. Predictions of batches and Python's garbage collector count as they come; it has been over the waiting
    requests once, and leaves what is older alone.
    """
    gc.freeze()
    policy, random, now_s = new_policy(), Random(0), 0.0
    running: Job[Any] | None = None
    resumed_s, times_s = now_s, []

    def new_job() -> Job[Any]:
        kind, tokens = random.choice(kinds), random.randint(16, 1024)
        arrival_s = now_s - random.uniform(*kind.ages_s)
        return Job(tokens, arrival_s, arrival_s + random.uniform(*kind.slos_s), WORK_S * tokens / 512)

    policy.pick(now_s, None)
    for _ in range(waiting):
        policy.add(new_job())
    gc.collect()
    for number in range(WARM_UP + events):
        arriving = None
        if running is not None and len(policy.waiting) >= waiting:
            now_s = resumed_s + running.remaining_s
        else:
            now_s += WORK_S / 10 * random.random()
            arriving = new_job()
        started_s = time.thread_time()
        if running is not None:
            policy.remove(running)
            running.remaining_s = max(0.0, running.remaining_s - (now_s - resumed_s))
            if arriving is not None:
                policy.add(running)
            else:
                running = None
        if arriving is not None:
            policy.add(arriving)
        winner = policy.pick(now_s, running)
        assert winner is not None
        if isinstance(winner.item, int):
            members = policy.batch(winner, now_s, int, lambda items: WORK_S / 512 * sum(items))
            for member in members:
                policy.remove(member)
            work_s = sum(member.remaining_s for member in members)
            winner = Job(
                members, winner.arrival_s, winner.deadline_s, work_s, len(members), winner.number, started=True
            )
            policy.add(winner)
        running, resumed_s = winner, now_s
        if number >= WARM_UP:
            times_s.append(time.thread_time() - started_s)
    gc.unfreeze()
    times_s.sort()
    return EventCost(times_s[events // 2], times_s[events * 99 // 100], times_s[-1])
