"""An event costs hardly more when many wait, whatever kind of requests they are."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from functools import partial
from random import Random
from statistics import median
from types import FrameType
from typing import Any

import pytest

from sgl_flowprefill.bench.simulator.speed import KINDS, EventClock, event_cost
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job, Limits, Policy, make_policy
from sgl_flowprefill.policy.forecast import Forecast


@pytest.mark.parametrize("policy", ["feasible", "s-edf"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_event_with_many_waiting_costs_no_more_than_a_few_with_some(policy: str, kind: str) -> None:
    """CPU time of this process, the best of three: other processes do not count, and one odd run does not either."""
    new_policy = partial(make_policy, policy, Limits(16, 2048), 60.0)

    def times_s(waiting: int) -> tuple[float, float]:
        cost = event_cost(new_policy, KINDS[kind], waiting, events=500)
        return cost.p50_s, cost.p99_s

    few_p50_s, few_p99_s = map(min, *(times_s(100) for _ in range(3)))
    many_p50_s, many_p99_s = times_s(20_000)
    for _ in range(2):
        if many_p50_s >= 10 * few_p50_s or many_p99_s >= 10 * few_p99_s:  # odd, or more than it may be
            many_p50_s, many_p99_s = map(min, (many_p50_s, many_p99_s), times_s(20_000))
    assert many_p50_s < 10 * few_p50_s
    assert many_p99_s < 10 * few_p99_s


def calls(work: Callable[[], object], kinds: tuple[str, ...] = ("call",)) -> int:
    """Functions that ``work`` calls: those of Python, with "c_call" the built-in ones."""
    called: list[FrameType] = []

    def note(frame: FrameType, event: str, arg: object) -> None:
        if event in kinds:
            called.append(frame)

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return len(called)


def test_an_event_at_which_paces_have_changed_calls_no_function_for_each_job_that_it_looks_at() -> None:
    """It plans the first 32 anew and looks at 64 that may be met at another pace: more calls than all the rest."""
    paces = [Pace() for _ in range(16)]
    policy: Policy[Any, Any] = make_policy("feasible", Limits(16, 2048), 1e9)
    for number in range(1000):
        deadline_s = 1.0 if number % 2 else 1e6 + number
        policy.add(Job(number, 0.0, deadline_s, 2.0, pace=paces[number % 16]))
    policy.pick(0.0, None)
    assert policy.infeasible_waiting == 500

    def event() -> None:
        for pace in paces:
            pace.factor = 1.1
        policy.repaced()
        assert policy.pick(1e-3, None) is not None

    assert calls(event) <= 90


def test_where_nothing_can_join_the_winner_no_others_are_looked_at() -> None:
    policy: Policy[int, Any] = make_policy("feasible", Limits(16, 2048), 60.0)
    for number in range(100):
        policy.add(Job(500, 0.0, 1.0 + number, 0.2))
    winner, looked_at = policy.pick(0.0, None), list[int]()

    def new_tokens(item: int) -> int:
        looked_at.append(item)
        return item

    assert winner is not None
    assert policy.batch(winner, 0.0, new_tokens, lambda items: 0.2 * len(items)) == [winner]
    assert len(looked_at) == 2


def test_the_first_arrival_of_a_part_of_the_window_forgets_the_oldest_part_of_its_own_pace_alone() -> None:
    """Else each event that begins a part would cost as much as there are paces."""

    def calls_of_the_first_arrival(paces: int) -> int:
        forecast, kinds = Forecast(60.0), [Pace() for _ in range(paces)]
        for number in range(6300):  # 300 in each of 21 parts, of which the first is forgotten next
            forecast.arrived(number / 100, 0.01, 1.0, kinds[number % paces])
        return calls(partial(forecast.arrived, 63.0, 0.01, 1.0, kinds[0]), ("call", "c_call"))

    assert calls_of_the_first_arrival(16) == calls_of_the_first_arrival(4)


def test_the_first_request_of_a_kind_copies_nothing_of_the_kinds_that_are_known() -> None:
    """Their sums are megabytes, of memory that is seldom in the cache."""
    forecast, took_bytes = Forecast(60.0), list[int]()
    for number in range(15):  # of lone requests there are no more kinds
        tracemalloc.start()
        forecast.arrived(0.0, 0.01 * number, 1.0, Pace())
        took_bytes.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert took_bytes[-1] < 1.1 * took_bytes[1]


def test_the_forecast_never_looks_at_all_that_arrived_at_once() -> None:
    """60,000 requests in the window: sorting every one of them takes tens of milliseconds. Paces change, too.

    Of the 4,000 events that are looked at, some are held up by the machine itself: the median of the ten worst counts.
    """

    def worst_s() -> float:
        forecast, random, now_s, took_s = Forecast(60.0), Random(0), 0.0, list[float]()
        paces = [Pace() for _ in range(16)]
        while now_s < 64.0:
            now_s += random.expovariate(1000)
            work_s, slo_s = random.expovariate(2000), random.choice((0.25, 0.5, 4.0, 6.0))
            pace = random.choice(paces)
            started_s = time.thread_time()
            forecast.arrived(now_s, work_s, slo_s, pace)
            if random.random() < 0.01:  # a task of its kind ends
                pace.factor = random.choice((0.7, 1.0, 1.4))
                forecast.repaced()
            if now_s > 60.0:
                took_s.append(time.thread_time() - started_s)
        return median(sorted(took_s)[-10:])

    gc.disable()
    try:
        assert min(worst_s() for _ in range(3)) < 1e-3
    finally:
        gc.enable()


def test_an_event_that_waits_for_the_core_counts_by_what_it_computed_and_is_told_from_the_others() -> None:
    clock, cores = EventClock(), os.sched_getaffinity(0)
    rival = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        for pid in (0, rival.pid):
            os.sched_setaffinity(pid, {min(cores)})
        clock.start()
        since_s = time.perf_counter()
        while time.perf_counter() < since_s + 0.5:
            pass
        clock.stop()
    finally:
        os.sched_setaffinity(0, cores)
        rival.kill()
        rival.wait()
    cost = clock.cost()
    assert cost.preempted == 1
    assert cost.wall_max_s >= 0.5
    assert cost.max_s < 0.9 * cost.wall_max_s
    assert cost.undisturbed_max_s == 0.0
