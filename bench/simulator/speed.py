"""How fast the policy is by itself: requests through the policy objects, with nothing around them."""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final, NamedTuple

from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job, Policy

WARM_UP: Final = 100
"""Events that are not measured."""
PACES: Final = 16
"""Kinds of requests, each with a pace of its own."""
PACE_CHANGE: Final = 0.03
"""Standard deviation of the logarithm of what a pace changes by when a task of its kind ends: on a server, smaller
changes than that (``ttft.online.LEAST_CHANGE``) are none."""

NewPolicy = Callable[[], Policy[Any, Any]]


class PolicySpeed(NamedTuple):
    """What the policy does in a second of wall time on one core."""

    requests_per_s: float
    events_per_s: float


def policy_speed(new_policy: NewPolicy, requests: list[SimRequest]) -> PolicySpeed:
    """Serve ``requests`` one at a time, each at its predicted time: two events a request, arrival and completion.

    At an arrival the running task is put back with what is left of it and the winner starts or goes on, as the runtime
    does it; forward passes, preemption checkpoints and batches cost nothing here.
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
    """What events took on one core: CPU time of the thread, which is not all that passed where others want the core."""

    p50_s: float
    p99_s: float
    max_s: float
    undisturbed_p99_s: float
    """CPU time where the OS gave the core to no other thread: an event that finds the caches cold costs more."""
    undisturbed_max_s: float
    wall_max_s: float
    """Longest time that passed, waiting for the core included."""
    preempted: int
    """Events in which the OS gave the core to another thread."""


class EventClock:
    """Times events one by one, and tells those that the OS interrupted."""

    def __init__(self) -> None:
        self._events: list[tuple[float, float, bool]] = []
        self._start: tuple[int, float, float] | None = None

    def start(self) -> None:
        """An event begins."""
        self._start = _switches(), time.perf_counter(), time.thread_time()

    def stop(self) -> None:
        """The event has ended."""
        cpu_s, wall_s = time.thread_time(), time.perf_counter()
        assert self._start is not None
        switches, wall_since_s, cpu_since_s = self._start
        self._events.append((cpu_s - cpu_since_s, wall_s - wall_since_s, _switches() != switches))

    def cost(self) -> EventCost:
        """Cost of all events so far."""
        cpu_s = sorted(cpu_s for cpu_s, _, _ in self._events)
        undisturbed_s = sorted(cpu_s for cpu_s, _, preempted in self._events if not preempted) or [0.0]
        return EventCost(
            p50_s=cpu_s[len(cpu_s) // 2],
            p99_s=cpu_s[len(cpu_s) * 99 // 100],
            max_s=cpu_s[-1],
            undisturbed_p99_s=undisturbed_s[len(undisturbed_s) * 99 // 100],
            undisturbed_max_s=undisturbed_s[-1],
            wall_max_s=max(wall_s for _, wall_s, _ in self._events),
            preempted=sum(preempted for _, _, preempted in self._events),
        )


def _switches() -> int:
    """How often the OS has taken the core from this thread."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


class Waiting(NamedTuple):
    """A kind of waiting requests: drawn uniformly, for work of about WORK_S each."""

    ages_s: tuple[float, float]
    slos_s: tuple[float, float]


WORK_S: Final = 0.02
ON_TIME = Waiting(ages_s=(0.0, 1.0), slos_s=(1e6, 2e6))
LEFT_OUT = Waiting(ages_s=(0.0, 1.0), slos_s=(600.0, 1200.0))
"""Each could meet its deadline; 100,000 of them cannot."""
TIGHT = Waiting(ages_s=(0.0, 0.1), slos_s=(0.1, 2.0))
"""Most turn infeasible while they wait."""
INFEASIBLE = Waiting(ages_s=(0.0, 1.0), slos_s=(0.0, 0.001))
STARVED = Waiting(ages_s=(100.0, 1000.0), slos_s=(0.0, 50.0))
KINDS: Final = {
    "on time": (ON_TIME,),
    "left out": (LEFT_OUT,),
    "tight": (TIGHT,),
    "infeasible": (INFEASIBLE,),
    "starved": (STARVED,),
    "mixed": (ON_TIME, LEFT_OUT, TIGHT, INFEASIBLE, STARVED),
}


def event_cost(new_policy: NewPolicy, kinds: Sequence[Waiting], waiting: int, events: int = 5000) -> EventCost:
    """What an event costs while ``waiting`` requests of ``kinds`` wait, all that the runtime's hub asks of the policy.

    A request arrives (as soon as less than ``waiting`` wait) or the running task ends; the running task is put back
    with what is left of it; the policy picks; where a request wins, its batch is made, leaves the queue and starts as a
    task. Each task that ends changes the pace of its kind: the machine is never as fast as it was. Predictions of
    batches and Python's garbage collector count as they come; it has been over the waiting requests once, and leaves
    what is older alone.
    """
    gc.freeze()
    policy, random, now_s = new_policy(), Random(0), 0.0
    running: Job[Any] | None = None
    resumed_s, clock = now_s, EventClock()
    paces = [Pace() for _ in range(PACES)]

    def new_job() -> Job[Any]:
        kind, tokens = random.choice(kinds), random.randint(16, 1024)
        arrival_s = now_s - random.uniform(*kind.ages_s)
        deadline_s = arrival_s + random.uniform(*kind.slos_s)
        return Job(tokens, arrival_s, deadline_s, WORK_S * tokens / 512, pace=paces[tokens % PACES])

    policy.pick(now_s, None)
    for _ in range(waiting):
        policy.add(new_job())
    gc.collect()
    for number in range(1 + WARM_UP + events):
        arriving = None
        if running is not None and len(policy.waiting) >= waiting:
            now_s = resumed_s + running.remaining_s
        else:
            now_s += WORK_S / 10 * random.random()
            arriving = new_job()
        change = random.lognormvariate(0, PACE_CHANGE)
        clock.start()
        if running is not None:
            policy.remove(running)
            running.remaining_s = max(0.0, running.remaining_s - (now_s - resumed_s))
            if arriving is not None:
                policy.add(running)
            else:
                running.pace.factor = min(2.0, max(0.5, running.pace.factor * change))
                policy.repaced()
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
                members,
                winner.arrival_s,
                winner.deadline_s,
                work_s,
                len(members),
                winner.number,
                winner.pace,
                started=True,
            )
            policy.add(winner)
        running, resumed_s = winner, now_s
        clock.stop()
        if number == WARM_UP:
            clock = EventClock()
    gc.unfreeze()
    return clock.cost()
