"""The largest feasible set: what it keeps, what it expects to arrive, and what comes after what it keeps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations
from operator import attrgetter
from random import Random
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, CostModel
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.systems import Setup, run
from sgl_flowprefill.bench.systems.catalog import simulated
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.policy import Job, Limits, make_policy
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.orders.feasible import PLANNED, FeasibleSet, largest_feasible
from sgl_flowprefill.policy.orders.slack_edf import SlackEdf

LIMITS = Limits(max_suspended=4, max_batch_tokens=2048)


def job(name: object, deadline_s: float, remaining_s: float, arrival_s: float = 0.0) -> Job[object]:
    return Job(name, arrival_s, deadline_s, remaining_s)


def task(name: object, deadline_s: float, remaining_s: float, arrival_s: float = 0.0, requests: int = 1) -> Job[object]:
    return Job(name, arrival_s, deadline_s, remaining_s, requests, started=True)


def feasible_set(*, max_starvation_s: float = 1e9, window_s: float = math.inf) -> FeasibleSet[object, object]:
    """The policy "feasible". With an endless window the past says nothing about what will arrive."""
    return FeasibleSet(LIMITS, max_starvation_s, window_s)


def names(jobs: Iterable[Job[object]]) -> list[object]:
    return [entry.item for entry in jobs]


def test_the_longest_job_gives_way_when_not_all_can_be_met() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for entry in (job("long", 10.0, 9.0), job("a", 11.0, 1.0), job("b", 11.0, 1.0), job("c", 11.0, 1.0)):
        policy.add(entry)
    assert names(policy.first_waiting(0.0, 9)) == ["a", "b", "c", "long"]


def test_tasks_and_requests_compete_for_the_same_time() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    started = task("task", 5.0, 4.0)
    policy.add(started)
    assert policy.pick(0.0, started) is started
    policy.add(job("short", 5.5, 2.0))
    picked = policy.pick(0.0, started)
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
    policy = feasible_set()
    jobs = [job(None, float(deadline), float(remaining)) for deadline, remaining in drawn]
    for entry in jobs:
        policy.add(entry)
    policy.pick(0.0, None)
    best = max(size for size in range(len(jobs) + 1) if any(feasible(some) for some in combinations(jobs, size)))
    assert len(policy.kept) == best
    assert feasible(policy.kept)


def weighted_jobs(random: Random) -> list[Job[object]]:
    """Few jobs of weights from 1 to 10, by deadline; some could not be met even alone."""
    jobs = []
    for _ in range(random.randint(1, 8)):
        entry = job(None, float(random.randint(1, 30)), float(random.randint(1, 9)))
        entry.weight = random.choice([1.0, 1.0, 2.0, 5.0, 10.0])
        jobs.append(entry)
    return sorted(jobs, key=lambda entry: (entry.deadline_s, entry.number))


def weight(jobs: Iterable[Job[object]]) -> float:
    return sum(entry.weight for entry in jobs)


def test_what_is_kept_of_weighted_jobs_is_close_to_the_heaviest_feasible_set() -> None:
    """Against all sets of up to eight jobs: what docs/overload.md says of the approximation."""
    random, shares, unweighted = Random(1), [], []
    for _ in range(2000):
        jobs = weighted_jobs(random)
        sets = [some for size in range(len(jobs) + 1) for some in combinations(jobs, size) if feasible(some)]
        best = max(map(weight, sets))
        kept = largest_feasible(jobs, 0.0, Forecast(math.inf)).jobs
        assert feasible(kept)
        if best:
            shares.append(weight(kept) / best)
            weights = [entry.weight for entry in jobs]
            for entry in jobs:
                entry.weight = 1.0
            numbers = {entry.number for entry in largest_feasible(jobs, 0.0, Forecast(math.inf)).jobs}
            pairs = zip(jobs, weights, strict=True)
            unweighted.append(sum(heavy for entry, heavy in pairs if entry.number in numbers) / best)
    print(
        f"{len(shares)} cases: mean {mean(shares):.4f}, least {min(shares):.2f}; without weights {mean(unweighted):.4f}"
    )
    assert min(shares) >= 0.8
    assert mean(shares) > 0.995
    assert sum(share == 1.0 for share in shares) > 0.97 * len(shares)
    assert mean(unweighted) < 0.97


def test_a_heavy_job_is_kept_and_lighter_ones_give_way() -> None:
    policy = feasible_set()
    heavy, light = job("heavy", 10.0, 9.0), [job(name, 11.0, 2.0) for name in "ab"]
    heavy.weight = 10.0
    for entry in (heavy, *light):
        policy.add(entry)
    assert names(policy.first_waiting(0.0, 9))[0] == "heavy"
    assert len(policy.kept) == 2
    assert policy.kept[0] is heavy


def test_a_heavy_job_that_cannot_be_met_costs_no_other_its_place() -> None:
    jobs = [job("light", 5.0, 3.0), job("hopeless", 6.0, 7.0)]
    jobs[1].weight = 100.0
    assert names(largest_feasible(jobs, 0.0, Forecast(math.inf)).jobs) == ["light"]


def missing_in_plan(drawn: Sequence[tuple[int, int, int]]) -> Iterator[int]:
    """By how many jobs the plan is smaller than a new one of all, at each event.

    Jobs (SLO, work, time to the next) come while the first of the plan runs, which is put back with what is left of it,
    as the hub does it.
    """
    policy = feasible_set()
    live: list[Job[object]] = []
    now_s = 0.0
    for slo_s, remaining_s, until_next_s in drawn:
        live.append(job(None, now_s + slo_s, float(remaining_s), now_s))
        policy.add(live[-1])
        next_s = now_s + until_next_s
        while True:
            policy.pick(now_s, None)
            by_deadline = sorted(live, key=lambda entry: (entry.deadline_s, entry.number))
            new = largest_feasible(by_deadline, now_s, Forecast(math.inf))
            yield len(new.jobs) - len(policy.kept)
            assert feasible(policy.kept, now_s)
            if not policy.kept or now_s == next_s:
                break
            running = policy.kept[0]
            policy.remove(running)
            ran_s = min(running.remaining_s, next_s - now_s)
            now_s += ran_s
            running.remaining_s -= ran_s
            if running.remaining_s:
                policy.add(running)
            else:
                live.remove(running)
        now_s = next_s


def test_the_plan_that_is_kept_up_to_date_is_hardly_ever_smaller_than_a_new_one() -> None:
    """A plan can be smaller: the job that is let go for a new one may leave room for a shorter one let go before."""
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
    policy = feasible_set()
    for number in range(9):
        policy.add(job(number, 10.0 + number, 1.0))
    policy.pick(0.0, None)

    def plan_again(*_: object) -> None:
        raise AssertionError("a new plan")

    monkeypatch.setattr("sgl_flowprefill.policy.orders.feasible.largest_feasible", plan_again)
    running = policy.kept[0]
    policy.remove(running)
    running.started = True
    policy.add(running)
    for now_s in (0.25, 0.5, 0.75):
        policy.remove(running)
        running.remaining_s -= 0.25
        policy.add(running)
        policy.pick(now_s, running)
    policy.remove(running)
    assert names(policy.kept) == list(range(1, 9))
    policy.pick(1.0, None)


def test_a_job_that_was_let_go_is_looked_at_again_when_nothing_is_kept() -> None:
    policy = feasible_set()
    short, long = job("short", 5.0, 2.0), job("long", 5.0, 4.0)
    for entry in (short, long):
        policy.add(entry)
    policy.pick(0.0, None)
    assert policy.kept == [short]
    policy.remove(short)
    policy.pick(0.5, None)
    assert policy.kept == [long]


def test_a_batch_counts_as_many_requests_as_it_has() -> None:
    policy = feasible_set()
    policy.add(task("batch of four", 10.0, 6.0, requests=4))
    policy.add(job("long", 10.5, 5.0))
    policy.pick(0.0, None)
    assert names(policy.kept) == ["batch of four"]


DRAWN = st.tuples(st.floats(0.01, 20), st.floats(0.01, 9), st.integers(1, 4), st.booleans(), st.floats(0, 2))


@settings(max_examples=200, deadline=None)
@given(st.lists(DRAWN, min_size=1, max_size=40), st.floats(1, 60))
def test_at_every_event_the_order_is_whole_and_what_is_kept_leaves_room(
    drawn: list[tuple[float, float, int, bool, float]], window_s: float
) -> None:
    policy = feasible_set(max_starvation_s=10.0, window_s=window_s)
    live: list[Job[object]] = []
    now_s = 0.0
    for slo_s, remaining_s, members, started, elapsed_s in drawn:
        now_s += elapsed_s
        live.append(Job(None, now_s, now_s + slo_s, remaining_s, members if started else 1, started=started))
        policy.add(live[-1])
        picked = policy.pick(now_s, None)
        assert picked in live
        assert feasible(policy.kept, now_s)
        order = policy.first_waiting(now_s, 99)
        for found, own in ((order, False), (policy.started, True)):
            assert sorted(map(id, found)) == sorted(id(entry) for entry in live if entry.started is own)
        assert picked.started or picked is order[0]
        for most in (1, 3):
            assert policy.first_waiting(now_s, most) == order[:most]
        of_tasks = policy.pick(now_s, None, admit=False)
        assert of_tasks is None if not len(policy.started) else of_tasks in list(policy.started)
        assert not picked.started or picked is of_tasks
        if len(live) > 12:
            policy.remove(live.pop(0))


def test_a_plan_looks_at_a_bounded_number_of_jobs_and_loses_none() -> None:
    policy = feasible_set()
    for number in range(3 * PLANNED):
        policy.add(job(number, 1e6 + number, 0.1))
    started = task("task", 2e6, 0.1)
    policy.add(started)
    assert names(policy.first_waiting(0.0, 4 * PLANNED)) == list(range(3 * PLANNED))
    assert len(policy.kept) == PLANNED
    assert policy.pick(0.0, None, admit=False) is started


def test_a_task_that_is_not_kept_goes_before_requests_that_are_not() -> None:
    policy = feasible_set()
    for entry in (task("infeasible task", 0.1, 2.0), task("infeasible task, nearly done", 0.1, 1.0)):
        policy.add(entry)
    policy.add(job("infeasible", 0.1, 0.5))
    for expected in ("infeasible task, nearly done", "infeasible task", "infeasible"):
        picked = policy.pick(0.0, None)
        assert picked is not None
        assert picked.item == expected
        policy.remove(picked)


def test_room_for_what_will_arrive_lets_long_requests_go_before_they_start() -> None:
    policy = make_policy("feasible", LIMITS, max_starvation_s=1e9)
    for second in range(100):  # urgent requests take 0.6 of the time
        urgent = job("urgent", second + 1.0, 0.6, arrival_s=float(second))
        policy.add(urgent)
        policy.remove(urgent)
    for name, remaining_s in (("long", 4.0), ("short", 2.0)):
        policy.add(job(name, 110.0, remaining_s, arrival_s=100.0))
    picked = policy.pick(100.0, None)
    assert picked is not None
    assert picked.item == "short"  # of ten seconds about 4.6 are free


def test_starved_jobs_take_turns_in_their_share_of_the_time() -> None:
    policy: SlackEdf[object, object] = SlackEdf(LIMITS, 60.0, starved_share=0.1)
    starved = [job(f"starved {n}", 1.0, 2.0, arrival_s=float(n)) for n in range(2)]
    for entry in (*starved, job("feasible", 1e6, 1.0)):
        policy.add(entry)
    assert policy.pick(100.0, None) is starved[0]
    policy.remove(starved[0])  # its two seconds are a tenth of the next twenty
    for now_s, expected in ((119.0, "feasible"), (120.0, "starved 1")):
        best = policy.pick(now_s, None)
        assert best is not None
        assert best.item == expected


@pytest.mark.parametrize("kind", ["s-edf", "feasible"])
def test_requests_that_arrived_together_starve_one_after_the_other(kind: str) -> None:
    policy = make_policy(kind, LIMITS, max_starvation_s=60.0)
    for number in range(3):
        policy.add(job(f"starved {number}", 1.0, 2.0))
    policy.add(job("feasible", 1e6, 1.0))
    order = []
    for now_s in (100.0, 150.0, 199.0, 200.0, 250.0, 300.0):  # two seconds are a fiftieth of a hundred
        waiting = policy.first_waiting(now_s, 9)
        assert len(set(map(id, waiting))) == len(waiting) == len(policy.waiting)
        winner = policy.pick(now_s, None)
        assert winner is waiting[0]
        order.append(winner.item)
        if winner.item != "feasible":
            policy.remove(winner)
    assert order == ["starved 0", "feasible", "feasible", "starved 1", "feasible", "starved 2"]


@pytest.mark.parametrize("kind", ["s-edf", "feasible"])
def test_a_turn_goes_over_from_a_request_to_its_task(kind: str) -> None:
    policy = make_policy(kind, LIMITS, max_starvation_s=60.0)
    requests = [job(f"starved {number}", 1.0, 2.0) for number in range(2)]
    for entry in requests:
        policy.add(entry)
    first, second = (Job(entry.item, 0.0, 1.0, 2.0, number=entry.number, started=True) for entry in requests)
    assert policy.pick(100.0, None) is requests[0]
    for entry, its_task in zip(requests, (first, second), strict=True):
        policy.remove(entry)
        policy.add(its_task)
    policy.add(job("feasible", 1e6, 1.0, arrival_s=100.0))
    for now_s in (100.5, 101.0):
        assert policy.pick(now_s, first) is first
        policy.remove(first)  # as the hub puts it back, behind the other
        first.remaining_s -= 0.5
        policy.add(first)
    policy.remove(first)
    picked = policy.pick(102.0, None)
    assert picked is not None
    assert picked.item == "feasible"


def test_a_job_that_turns_infeasible_during_the_turn_of_a_later_one_is_in_the_order_once() -> None:
    policy: SlackEdf[object, object] = SlackEdf(LIMITS, 60.0, starved_share=0.1)
    later, older = job("later", 1.0, 2.0, arrival_s=1.0), job("older", 110.0, 2.0, arrival_s=0.0)
    policy.add(later)
    policy.add(older)
    assert policy.first_waiting(100.0, 9) == [later, older]
    assert sorted(str(entry.item) for entry in policy.first_waiting(109.0, 9)) == ["later", "older"]


def test_what_nobody_could_meet_is_not_expected_to_arrive_again() -> None:
    """Clients that want an answer at once, in 1 ns, do not take the machine from the others."""
    policy: FeasibleSet[object, object] = FeasibleSet(LIMITS, max_starvation_s=1e9)
    for second in range(100):
        policy.add(job("at once", second + 1e-9, 2.0, arrival_s=float(second)))
    short = job("short", 100.2, 0.05, arrival_s=100.0)
    policy.add(short)
    assert policy.pick(100.0, None) is short
    assert policy.kept == [short]


@pytest.mark.parametrize("slo_s", [1e-9, 0.01])
def test_short_requests_are_met_beside_long_ones_that_nobody_could_meet(slo_s: float) -> None:
    cost = CostModel("toy", layers=10, fixed_s=0.0, per_token_s=1e-3, per_pair_s=0.0)
    setup = Setup(Machine(cost, 100_000), limits=Limits(max_suspended=16, max_batch_tokens=1), max_operator_s=0.01)
    random, requests = Random(1), []
    for name, load, tokens, ttft_slo_s in (("long", 0.6, 2000, slo_s), ("short", 0.1, 50, 0.2)):
        arrival_s = 0.0
        while (arrival_s := arrival_s + random.expovariate(load / (1e-3 * tokens))) < 600.0:
            requests.append(TraceRequest(arrival_s, tokens, 1, name, ttft_slo_s, 0.1))
    trace = Trace("toy", sorted(requests, key=attrgetter("arrival_s")))

    def met(policy: str) -> float:
        of_all = run(simulated(policy), trace, setup).requests
        short = [one.met for one in of_all if trace.requests[one.index].request_class == "short"]
        assert len(short) > 1000
        return mean(short)

    assert met("feasible") >= met("s-edf") - 0.01


@pytest.mark.parametrize("are_withdrawn", [True, False])
def test_requests_that_are_withdrawn_while_they_wait_are_not_expected_to_arrive_again(are_withdrawn: bool) -> None:
    """Clients that open long requests and leave at once do not take the machine from the others."""
    policy: FeasibleSet[object, object] = FeasibleSet(LIMITS, max_starvation_s=1e9)
    for second in range(100):
        leaves = job("leaves", second + 3.0, 2.0, arrival_s=float(second))
        policy.add(leaves)
        policy.remove(leaves)
        if are_withdrawn:
            policy.withdrawn(leaves)
    stays = job("stays", 110.0, 4.0, arrival_s=100.0)
    policy.add(stays)
    assert policy.pick(100.0, None) is stays
    assert policy.kept == ([stays] if are_withdrawn else [])


def test_a_infeasible_task_waits_for_a_request_that_can_still_be_met_though_it_is_left_out() -> None:
    policy: FeasibleSet[object, object] = FeasibleSet(LIMITS, max_starvation_s=1e9)
    for second in range(100):  # takes nearly all of the time
        urgent = job("urgent", second + 1.0, 0.9, arrival_s=float(second))
        policy.add(urgent)
        policy.remove(urgent)
    policy.add(task("infeasible task", 100.0, 2.0))
    left_out, infeasible = job("left out", 105.0, 3.0, arrival_s=100.0), job("infeasible", 100.1, 1.0, arrival_s=100.0)
    for entry in (left_out, infeasible):
        policy.add(entry)
    order = []
    while (picked := policy.pick(100.0, None)) is not None:
        order.append(picked.item)
        policy.remove(picked)
    assert order == ["left out", "infeasible task", "infeasible"]
    assert policy.kept == []


def test_a_task_that_can_still_be_met_goes_before_a_request_that_can_where_there_is_room_for_neither() -> None:
    policy: FeasibleSet[object, object] = FeasibleSet(LIMITS, max_starvation_s=1e9)
    for second in range(100):  # takes nearly all of the time
        urgent = job("urgent", second + 1.0, 0.9, arrival_s=float(second))
        policy.add(urgent)
        policy.remove(urgent)
    started = task("task", 106.0, 3.0, arrival_s=100.0)
    for entry in (started, job("left out", 105.0, 3.0, arrival_s=100.0)):
        policy.add(entry)
    assert policy.pick(100.0, None) is started
    assert policy.kept == []


def test_a_request_that_is_put_back_is_not_counted_again_among_what_arrives() -> None:
    policy = feasible_set(window_s=60.0)
    for second in range(60):
        policy.add(job("done", second + 5.0, 0.25, arrival_s=float(second)))
        policy.remove(policy.first_waiting(float(second), 1)[0])
    waits = job("waits", 70.0, 0.25, arrival_s=60.0)
    for _ in range(100):  # as after another look at its cached prefix
        policy.add(waits)
        policy.remove(waits)
    policy.add(job("long", 80.0, 12.0, arrival_s=60.0))
    policy.pick(60.0, None)
    assert names(policy.kept) == ["long"]  # of twenty seconds about four are taken


RECORDED = {
    ("qwen-like", "feasible"): (891, 346, 6681.922727),
    ("qwen-like", "s-edf"): (804, 212, 11429.763153),
    ("qwen-like", "s-edf-paper"): (832, 218, 7198.165239),
    ("qwen-like", "edf"): (58, 28, 18702.519555),
    ("qwen-like", "fcfs"): (26, 0, 21225.137065),
    ("mixed", "feasible"): (934, 64, 6838.775543),
    ("mixed", "s-edf"): (916, 24, 8607.918339),
    ("mixed", "s-edf-paper"): (923, 28, 8050.886462),
    ("mixed", "edf"): (147, 23, 19979.000747),
    ("mixed", "fcfs"): (144, 0, 19804.886746),
}
"""A thousand requests at 15 req/s, more than can be met: how many are in time, suspensions, the sum of their TTFTs."""


@pytest.mark.parametrize(("workload", "policy"), RECORDED)
def test_a_policy_picks_what_it_picked_when_its_figures_were_recorded(workload: str, policy: str) -> None:
    """Who changes a policy on purpose records anew, and the tables of docs/simulator.md too."""
    trace = WORKLOADS[workload](1000, 0, 1.0)
    result = run(
        simulated(policy), trace.scaled(rate_scale=15.0 / trace.rate_rps), Setup(Machine(LLAMA_8B, LLAMA_8B.kv_tokens))
    )
    assert result.blocking_s is not None
    met = sum(request.met for request in result.requests)
    ttfts_s = math.fsum(request.first_token_s - request.arrival_s for request in result.requests)
    switches = len(result.blocking_s) + result.switches_without_news
    assert (met, switches, round(ttfts_s, 6)) == RECORDED[workload, policy]
