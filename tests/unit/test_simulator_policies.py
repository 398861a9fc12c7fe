"""The largest feasible set: what it keeps, what it expects to arrive, and what comes after what it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.policy import Job, Limits, PrefillPolicy, SlackEdfQueue, make_policy
from sgl_flowprefill.policy.feasible import PLANNED, FeasibleRequests, FeasibleSet, FeasibleTasks, largest_feasible
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.queues import StarvationTurns

LIMITS = Limits(max_suspended=4, max_batch_tokens=2048)


def job(name: object, deadline_s: float, remaining_s: float, arrival_s: float = 0.0, requests: int = 1) -> Job[object]:
    return Job(name, arrival_s, deadline_s, remaining_s, requests)


def queues_of(
    *, max_starvation_s: float = 1e9, window_s: float = math.inf
) -> tuple[FeasibleRequests[object], FeasibleTasks[object]]:
    """Requests and tasks. With an endless window the past says nothing about what will arrive."""
    feasible, turns = FeasibleSet(Forecast(window_s)), StarvationTurns(0.02)
    requests: FeasibleRequests[object] = FeasibleRequests(feasible, max_starvation_s, turns)
    return requests, FeasibleTasks(feasible, max_starvation_s, turns)


def test_the_longest_job_gives_way_when_not_all_can_be_met() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for entry in (job("long", 10.0, 9.0), job("a", 11.0, 1.0), job("b", 11.0, 1.0), job("c", 11.0, 1.0)):
        policy.requests.add(entry)
    assert [entry.item for entry in policy.requests.first(0.0, 9)] == ["a", "b", "c", "long"]


def test_tasks_and_requests_compete_for_the_same_time() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    task = job("task", 5.0, 4.0)
    policy.tasks.add(task)
    assert policy.pick(0.0, task) is task
    policy.requests.add(job("short", 5.5, 2.0))
    picked = policy.pick(0.0, task)
    assert picked is not None
    assert picked.item == "short"


def feasible(jobs: Iterable[Job[object]], now_s: float = 0.0) -> bool:
    end_s = now_s
    for entry in sorted(jobs, key=lambda entry: entry.deadline_s):
        end_s += entry.remaining_s
        if end_s > entry.deadline_s + 1e-9:
            return False
    return True


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=8))
def test_what_is_kept_is_a_largest_feasible_set(drawn: list[tuple[int, int]]) -> None:
    queue, _ = queues_of()
    jobs = [job(None, float(deadline), float(remaining)) for deadline, remaining in drawn]
    for entry in jobs:
        queue.add(entry)
    queue.best(0.0)
    best = max(size for size in range(len(jobs) + 1) if any(feasible(some) for some in combinations(jobs, size)))
    assert len(queue.kept) == best
    assert feasible(queue.kept)


def missing_in_plan(drawn: Sequence[tuple[int, int, int]]) -> Iterator[int]:
    """By how many jobs the plan is smaller than a new one of all, at each event.

    Jobs (SLO, work, time to the next) come while the first of the plan runs, which is put back with what is left of it,
    as the hub does it.
    """
    queue, _ = queues_of()
    live: list[Job[object]] = []
    now_s = 0.0
    for slo_s, remaining_s, until_next_s in drawn:
        live.append(job(None, now_s + slo_s, float(remaining_s), now_s))
        queue.add(live[-1])
        next_s = now_s + until_next_s
        while True:
            queue.best(now_s)
            entries = [(entry.deadline_s, number, entry.remaining_s, entry, queue) for number, entry in enumerate(live)]
            new, _ = largest_feasible(sorted(entries), now_s, Forecast(math.inf))
            yield len(new) - len(queue.kept)
            assert feasible(queue.kept, now_s)
            if not queue.kept or now_s == next_s:
                break
            running = queue.kept[0]
            queue.remove(running)
            ran_s = min(running.remaining_s, next_s - now_s)
            now_s += ran_s
            running.remaining_s -= ran_s
            if running.remaining_s:
                queue.add(running)
            else:
                live.remove(running)
        now_s = next_s


def test_the_plan_that_is_kept_up_to_date_is_hardly_ever_smaller_than_a_new_one() -> None:
    """It can be: the job that is let go for a new one may leave room for a shorter one that was let go before."""
    random = Random(0)
    scripts = [
        [(random.randint(1, 30), random.randint(1, 9), random.randint(0, 6)) for _ in range(random.randint(1, 30))]
        for _ in range(1000)
    ]
    missing = [short for script in scripts for short in missing_in_plan(script)]
    assert len(missing) > 10_000
    assert set(missing) <= {0, 1}
    assert sum(missing) < 0.001 * len(missing)


def test_while_the_plan_holds_nothing_is_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    requests, tasks = queues_of()
    for number in range(9):
        requests.add(job(number, 10.0 + number, 1.0))
    requests.best(0.0)

    def plan_again(*_: object) -> None:
        raise AssertionError("a new plan")

    monkeypatch.setattr("sgl_flowprefill.policy.feasible.largest_feasible", plan_again)
    running = requests.kept[0]
    requests.remove(running)
    tasks.add(running)
    for now_s in (0.25, 0.5, 0.75):
        tasks.remove(running)
        running.remaining_s -= 0.25
        tasks.add(running)
        requests.best(now_s)
    tasks.remove(running)
    assert [entry.item for entry in requests.kept] == list(range(1, 9))
    requests.best(1.0)


def test_a_job_that_was_let_go_is_looked_at_again_when_nothing_is_kept() -> None:
    requests, _ = queues_of()
    short, long = job("short", 5.0, 2.0), job("long", 5.0, 4.0)
    for entry in (short, long):
        requests.add(entry)
    requests.best(0.0)
    assert requests.kept == [short]
    requests.remove(short)
    requests.best(0.5)
    assert requests.kept == [long]


def test_a_batch_counts_as_many_requests_as_it_has() -> None:
    requests, tasks = queues_of()
    tasks.add(job("batch of four", 10.0, 6.0, requests=4))
    requests.add(job("long", 10.5, 5.0))
    requests.best(0.0)
    assert [entry.item for entry in (*tasks.kept, *requests.kept)] == ["batch of four"]


DRAWN = st.tuples(st.floats(0.01, 20), st.floats(0.01, 9), st.integers(1, 4), st.booleans(), st.floats(0, 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(DRAWN, min_size=1, max_size=40), st.floats(1, 60))
def test_at_every_event_the_order_is_whole_and_what_is_kept_leaves_room(
    drawn: list[tuple[float, float, int, bool, float]], window_s: float
) -> None:
    requests, tasks = queues_of(max_starvation_s=10.0, window_s=window_s)
    live: list[tuple[Job[object], FeasibleRequests[object] | FeasibleTasks[object]]] = []
    now_s = 0.0
    for slo_s, remaining_s, members, started, elapsed_s in drawn:
        now_s += elapsed_s
        queue = tasks if started else requests
        live.append((job(None, now_s + slo_s, remaining_s, now_s, members if started else 1), queue))
        queue.add(live[-1][0])
        requests.best(now_s)
        tasks.best(now_s)
        assert feasible([*requests.kept, *tasks.kept], now_s)
        for own in (requests, tasks):
            order = own.first(now_s, 99)
            assert sorted(map(id, order)) == sorted(id(entry) for entry, owner in live if owner is own)
            found = own.best(now_s)
            assert found is None if not order else found is not None and found[1] is order[0]
            for most in (1, 3):
                assert own.first(now_s, most) == order[:most]
        if len(live) > 12:
            gone, owner = live.pop(0)
            owner.remove(gone)


def test_a_plan_looks_at_a_bounded_number_of_jobs_and_loses_none() -> None:
    requests, tasks = queues_of()
    for number in range(3 * PLANNED):
        requests.add(job(number, 1e6 + number, 0.1))
    task = job("task", 2e6, 0.1)
    tasks.add(task)
    assert [entry.item for entry in requests.first(0.0, 4 * PLANNED)] == list(range(3 * PLANNED))
    assert len(requests.kept) == PLANNED
    assert tasks.first(0.0, 9) == [task]


def test_a_task_that_is_not_kept_goes_before_requests_that_are_not() -> None:
    requests, tasks = queues_of()
    for entry in (job("hopeless task", 0.1, 2.0), job("hopeless task, nearly done", 0.1, 1.0)):
        tasks.add(entry)
    requests.add(job("hopeless", 0.1, 0.5))
    policy = PrefillPolicy(requests, tasks, LIMITS)
    for expected in ("hopeless task, nearly done", "hopeless task", "hopeless"):
        picked = policy.pick(0.0, None)
        assert picked is not None
        assert picked.item == expected
        (tasks if "task" in expected else requests).remove(picked)


def test_work_is_expected_at_the_rate_at_which_it_arrived_and_due_after_its_slo() -> None:
    forecast = Forecast(window_s=10.0)
    for second in range(100):
        forecast.arrived(float(second), 0.25, 1.0)
        forecast.arrived(float(second), 0.5, 4.0)
    assert forecast.due_s(0.9) == 0.0
    assert forecast.due_s(3.0) == pytest.approx(2 * 0.25, rel=0.15)
    assert forecast.due_s(8.0) == pytest.approx(7 * 0.25 + 4 * 0.5, rel=0.15)
    for second in range(200, 300):
        forecast.arrived(float(second), 0.1, 1.0)
    assert forecast.due_s(8.0) == pytest.approx(7 * 0.1, rel=0.15)


def test_a_request_that_is_announced_late_does_not_shorten_the_past() -> None:
    forecast = Forecast(window_s=60.0)
    for second in range(100):
        forecast.arrived(float(second), 0.3, 1.0)
    in_order = forecast.due_s(11.0)
    assert in_order == pytest.approx(10 * 0.3, rel=0.1)
    changes = [forecast.arrived(20.0 + number, 1e-3, 1.0) for number in range(20)]
    assert any(changes)
    assert forecast.due_s(11.0) == pytest.approx(in_order, rel=0.1)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 9), st.floats(0.01, 30)), max_size=60))
def test_no_more_work_is_expected_than_there_is_time_for(drawn: list[tuple[float, float, float]]) -> None:
    forecast, now_s = Forecast(window_s=5.0), 0.0
    for elapsed_s, work_s, slo_s in drawn:
        now_s += elapsed_s
        forecast.arrived(now_s, work_s, slo_s)
        due_s = [forecast.due_s(within_s) for within_s in (0.0, 0.5, 2.0, 9.0, 60.0)]
        assert due_s == sorted(due_s)
        assert all(due <= within * (1 + 1e-9) for due, within in zip(due_s, (0.0, 0.5, 2.0, 9.0, 60.0), strict=True))


def test_room_for_what_will_arrive_lets_long_requests_go_before_they_start() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for second in range(100):  # urgent requests take 0.6 of the time
        urgent = job("urgent", second + 1.0, 0.6, arrival_s=float(second))
        policy.requests.add(urgent)
        policy.requests.remove(urgent)
    for name, remaining_s in (("long", 4.0), ("short", 2.0)):
        policy.requests.add(job(name, 110.0, remaining_s, arrival_s=100.0))
    picked = policy.pick(100.0, None)
    assert picked is not None
    assert picked.item == "short"  # of ten seconds about 4.6 are free


def test_starved_jobs_take_turns_in_their_share_of_the_time() -> None:
    queue: SlackEdfQueue[object] = SlackEdfQueue(60.0, StarvationTurns(share=0.1))
    starved = [job(f"starved {n}", 1.0, 2.0, arrival_s=float(n)) for n in range(2)]
    for entry in (*starved, job("feasible", 1e6, 1.0)):
        queue.add(entry)
    first = queue.best(100.0)
    assert first is not None
    assert first[1] is starved[0]
    queue.remove(starved[0])  # its two seconds are a tenth of the next twenty
    for now_s, expected in ((119.0, "feasible"), (120.0, "starved 1")):
        best = queue.best(now_s)
        assert best is not None
        assert best[1].item == expected


@pytest.mark.parametrize("kind", ["s-edf", "feasible"])
def test_requests_that_arrived_together_starve_one_after_the_other(kind: str) -> None:
    policy = make_policy(kind, LIMITS, max_starvation_s=60.0)
    for number in range(3):
        policy.requests.add(job(f"starved {number}", 1.0, 2.0))
    policy.requests.add(job("feasible", 1e6, 1.0))
    order = []
    for now_s in (100.0, 150.0, 199.0, 200.0, 250.0, 300.0):  # two seconds are a fiftieth of a hundred
        waiting = policy.requests.first(now_s, 9)
        assert len(set(map(id, waiting))) == len(waiting) == len(policy.requests)
        winner = policy.pick(now_s, None)
        assert winner is waiting[0]
        order.append(winner.item)
        if winner.item != "feasible":
            policy.requests.remove(winner)
    assert order == ["starved 0", "feasible", "feasible", "starved 1", "feasible", "starved 2"]


@pytest.mark.parametrize("kind", ["s-edf", "feasible"])
def test_a_turn_goes_over_from_a_request_to_its_task(kind: str) -> None:
    policy = make_policy(kind, LIMITS, max_starvation_s=60.0)
    requests = [job(f"starved {number}", 1.0, 2.0) for number in range(2)]
    for entry in requests:
        policy.requests.add(entry)
    first, second = (Job(entry.item, 0.0, 1.0, 2.0, number=entry.number) for entry in requests)
    assert policy.pick(100.0, None) is requests[0]
    for entry, task in zip(requests, (first, second), strict=True):
        policy.requests.remove(entry)
        policy.tasks.add(task)
    policy.requests.add(job("feasible", 1e6, 1.0, arrival_s=100.0))
    for now_s in (100.5, 101.0):
        assert policy.pick(now_s, first) is first
        policy.tasks.remove(first)  # as the hub puts it back, behind the other
        first.remaining_s -= 0.5
        policy.tasks.add(first)
    policy.tasks.remove(first)
    picked = policy.pick(102.0, None)
    assert picked is not None
    assert picked.item == "feasible"


def test_a_job_that_turns_hopeless_during_the_turn_of_a_later_one_is_in_the_order_once() -> None:
    queue: SlackEdfQueue[object] = SlackEdfQueue(60.0, StarvationTurns(share=0.1))
    later, older = job("later", 1.0, 2.0, arrival_s=1.0), job("older", 110.0, 2.0, arrival_s=0.0)
    queue.add(later)
    queue.add(older)
    assert queue.first(100.0, 9) == [later, older]
    assert sorted(str(entry.item) for entry in queue.first(109.0, 9)) == ["later", "older"]


def test_what_nobody_could_meet_is_not_expected_to_arrive_again() -> None:
    """Clients that want an answer at once, in 1 ns, do not take the machine from the others."""
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for second in range(100):
        policy.requests.add(job("at once", second + 1e-9, 2.0, arrival_s=float(second)))
    short = job("short", 100.2, 0.05, arrival_s=100.0)
    policy.requests.add(short)
    assert policy.pick(100.0, None) is short
    assert policy.requests.kept == [short]  # type: ignore[attr-defined]


def test_a_hopeless_task_waits_for_a_request_that_can_still_be_met_though_it_is_left_out() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for second in range(100):  # takes nearly all of the time
        urgent = job("urgent", second + 1.0, 0.9, arrival_s=float(second))
        policy.requests.add(urgent)
        policy.requests.remove(urgent)
    policy.tasks.add(job("hopeless task", 100.0, 2.0))
    left_out, hopeless = job("left out", 105.0, 3.0, arrival_s=100.0), job("hopeless", 100.1, 1.0, arrival_s=100.0)
    for entry in (left_out, hopeless):
        policy.requests.add(entry)
    order = []
    while (picked := policy.pick(100.0, None)) is not None:
        order.append(picked.item)
        (policy.tasks if picked.item == "hopeless task" else policy.requests).remove(picked)
    assert order == ["left out", "hopeless task", "hopeless"]
    assert policy.requests.kept == []  # type: ignore[attr-defined]


def test_a_request_that_is_put_back_is_not_counted_again_among_what_arrives() -> None:
    requests, _ = queues_of(window_s=60.0)
    for second in range(60):
        requests.add(job("done", second + 5.0, 0.25, arrival_s=float(second)))
        requests.remove(requests.first(float(second), 1)[0])
    waits = job("waits", 70.0, 0.25, arrival_s=60.0)
    for _ in range(100):  # as after another look at its cached prefix
        requests.add(waits)
        requests.remove(waits)
    requests.add(job("long", 80.0, 12.0, arrival_s=60.0))
    requests.best(60.0)
    assert [entry.item for entry in requests.kept] == ["long"]  # of twenty seconds about four are taken
