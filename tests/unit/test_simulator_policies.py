"""The options beside S-EDF: the largest feasible set, and putting off the longest requests under overload."""

from __future__ import annotations

from itertools import combinations, count

from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.policy import Job, Limits, SlackEdfQueue, make_policy
from sgl_flowprefill.policy.feasible import FeasibleSet, FeasibleSetQueue
from sgl_flowprefill.policy.queues import StarvationTurns
from sgl_flowprefill.policy.shedding import RecentLoad

LIMITS = Limits(max_suspended=4, max_batch_tokens=2048)


def job(name: object, deadline_s: float, remaining_s: float, arrival_s: float = 0.0) -> Job[object]:
    return Job(name, arrival_s, deadline_s, remaining_s)


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


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=8))
def test_what_is_kept_is_a_largest_feasible_set(drawn: list[tuple[int, int]]) -> None:
    queue: FeasibleSetQueue[object] = FeasibleSetQueue(FeasibleSet(), 1e9)
    for deadline, remaining in drawn:
        queue.add(job(None, float(deadline), float(remaining)))
    queue.best(0.0)

    def feasible(jobs: tuple[tuple[int, int], ...]) -> bool:
        ends = count(0)
        total = next(ends)
        for deadline, remaining in sorted(jobs):
            total += remaining
            if total > deadline:
                return False
        return True

    best = max(size for size in range(len(drawn) + 1) if any(feasible(s) for s in combinations(drawn, size)))
    assert len(queue.kept) == best
    assert feasible(tuple((int(entry.deadline_s), int(entry.remaining_s)) for entry in queue.kept))


def test_without_overload_no_request_is_too_long() -> None:
    load = RecentLoad(window_s=10.0)
    for second in range(100):
        load.arrived(float(second), 0.9)
    assert load.longest_s == float("inf")


def test_under_overload_the_shortest_that_fit_are_kept() -> None:
    load = RecentLoad(window_s=10.0)
    for second in range(100):
        load.arrived(float(second), 0.5)
        load.arrived(float(second), 0.8)
    assert load.longest_s == 0.5
    for second in range(100, 200):
        load.arrived(float(second), 0.9)
        load.arrived(float(second), 3.0)
    assert load.longest_s == 0.9
    for second in range(200, 300):
        load.arrived(float(second), 0.1)
    assert load.longest_s == float("inf")


def test_shedding_puts_off_the_long_and_keeps_them_before_the_hopeless() -> None:
    policy = make_policy("shed", LIMITS, max_starvation_s=1e9)
    for second in range(100):
        for remaining_s in (0.5, 5.0):
            policy.requests.add(job((second, remaining_s), second + 1000.0, remaining_s, arrival_s=float(second)))
    policy.requests.add(job("long", 200.0, 5.0, arrival_s=100.0))
    policy.requests.add(job("hopeless", 100.0, 0.5, arrival_s=100.0))
    order = [entry.item for entry in policy.requests.first(100.0, 1000)]
    assert "long" in order
    picked = policy.pick(100.0, None)
    assert picked is not None
    assert picked.remaining_s == 0.5


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
