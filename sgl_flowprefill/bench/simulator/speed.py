"""How fast the policy is by itself: requests through the policy objects, with nothing around them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.policy import Job, PrefillPolicy

NewPolicy = Callable[[], PrefillPolicy[Any, Any]]


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
            policy.tasks.remove(running)
            running = None
        else:
            assert arriving is not None
            now_s = arriving.ready_s
            if running is not None:
                policy.tasks.remove(running)
                running.remaining_s -= now_s - resumed_s
                policy.tasks.add(running)
            policy.requests.add(Job(arriving, arriving.arrival_s, arriving.deadline_s, arriving.predicted_s))
            arriving = next(arrivals, None)
        events += 1
        winner = policy.pick(now_s, running)
        if winner is None:
            continue
        if isinstance(winner.item, SimRequest):
            policy.requests.remove(winner)
            winner = Job((winner.item,), winner.arrival_s, winner.deadline_s, winner.remaining_s, number=winner.number)
            policy.tasks.add(winner)
        running, resumed_s, end_s = winner, now_s, now_s + winner.remaining_s
    elapsed_s = time.perf_counter() - started_s
    return PolicySpeed(len(requests) / elapsed_s, events / elapsed_s)


def event_cost_s(new_policy: NewPolicy, waiting: int) -> float:
    """Seconds of one event (a request arrives, the policy picks, the winner leaves) with ``waiting`` requests."""
    policy = new_policy()
    events = max(20, min(2000, 1_000_000 // waiting))
    for index in range(waiting):
        policy.requests.add(Job(index, 0.0, 1e6 + index * 7919 % waiting, 0.1))
    policy.pick(0.0, None)
    started_s = time.perf_counter()
    for index in range(events):
        policy.requests.add(Job(index, 0.0, 1e6 + index * 7919 % waiting, 0.1))
        winner = policy.pick(index * 1e-6, None)
        assert winner is not None
        policy.requests.remove(winner)
    return (time.perf_counter() - started_s) / events
