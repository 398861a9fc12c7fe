"""The policy alone: order, bounds, batching, and a simulated server in which no task is lost and none runs twice."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job, Limits, Policy, make_policy
from sgl_flowprefill.policy.base import BATCH_SHARE
from sgl_flowprefill.policy.orders.slack_edf import SlackEdf
from sgl_flowprefill.policy.slack import MOVES, MOVES_AT_ONCE, STARVED_SHARE


def job(
    name: str, deadline_s: float, remaining_s: float = 1.0, arrival_s: float = 0.0, started: bool = False
) -> Job[str]:
    return Job(name, arrival_s, deadline_s, remaining_s, started=started)


def s_edf(*jobs: Job[str], max_starvation_s: float = 1e9) -> SlackEdf[str, str]:
    """S-EDF with ``jobs``, in which every starved job has its turn at once."""
    policy: SlackEdf[str, str] = SlackEdf(Limits(4, 100), max_starvation_s, starved_share=math.inf)
    for entry in jobs:
        policy.add(entry)
    return policy


def names(policy: Policy[str, str], now_s: float) -> list[str]:
    return [entry.item for entry in policy.first_waiting(now_s, 100)]


def test_feasible_jobs_go_first_by_deadline_and_infeasible_ones_after_them_by_age() -> None:
    policy = s_edf(
        job("late", deadline_s=9.0),
        job("soon", deadline_s=3.0),
        job("infeasible", deadline_s=0.5, arrival_s=-1.0),
        job("older infeasible", deadline_s=0.7, arrival_s=-2.0),
    )
    assert names(policy, now_s=0.0) == ["soon", "late", "older infeasible", "infeasible"]


def test_as_published_the_infeasible_go_latest_deadline_first_and_wait_without_bound() -> None:
    policy: Policy[str, str] = make_policy("s-edf-paper", Limits(4, 100), max_starvation_s=1.0)
    for entry in (job("old", 0.1, arrival_s=-1e6), job("infeasible", 0.9), job("late", 9.0), job("soon", 3.0)):
        policy.add(entry)
    assert names(policy, 0.0) == ["soon", "late", "infeasible", "old"]


def test_a_job_turns_infeasible_when_its_slack_runs_out_and_not_before() -> None:
    tight, loose = job("tight", deadline_s=2.0, remaining_s=1.5), job("loose", deadline_s=10.0)
    policy = s_edf(tight, loose)
    assert policy.pick(0.5, None) is tight  # slack is exactly zero
    assert policy.pick(0.51, None) is loose


def test_a_infeasible_job_goes_first_once_it_has_waited_too_long() -> None:
    policy = s_edf(job("infeasible", deadline_s=0.5), job("feasible", deadline_s=1e6), max_starvation_s=60.0)
    assert names(policy, now_s=59.0) == ["feasible", "infeasible"]
    assert names(policy, now_s=60.0) == ["infeasible", "feasible"]
    best = policy.pick(60.0, None)
    assert best is not None
    assert best.item == "infeasible"


def test_a_job_that_ran_can_become_feasible_again() -> None:
    running = job("running", deadline_s=5.0, remaining_s=4.0)
    policy = s_edf(running, job("other", deadline_s=50.0))
    assert names(policy, now_s=2.0) == ["other", "running"]
    policy.remove(running)
    running.remaining_s = 1.0
    policy.add(running)
    assert names(policy, now_s=2.0) == ["running", "other"]


operations = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "ask"]), st.floats(0, 100), st.floats(0, 50), st.floats(0, 5)),
    max_size=60,
)


@given(operations)
@settings(max_examples=300, deadline=None)
def test_the_order_agrees_with_sorting_everything_at_every_event(
    script: list[tuple[str, float, float, float]],
) -> None:
    starvation_s = 40.0
    policy: SlackEdf[int, int] = SlackEdf(Limits(4, 100), starvation_s, starved_share=math.inf)
    live: list[Job[int]] = []
    now_s = 0.0

    def rank(entry: Job[int]) -> tuple[int, float]:
        # A job that is added with no slack left is infeasible from the first look at it.
        if entry.deadline_s - entry.remaining_s >= now_s:
            return (1, entry.deadline_s)
        return (0 if entry.arrival_s + starvation_s <= now_s else 2, entry.arrival_s)

    for number, (operation, a, b, elapsed_s) in enumerate(script):
        now_s += elapsed_s
        if operation == "add":
            entry = Job(number, now_s - a, now_s + b - a, b / 2)
            live.append(entry)
            policy.add(entry)
        elif operation == "remove" and live:
            policy.remove(live.pop(int(a) % len(live)))
        best = policy.pick(now_s, None)
        assert len(policy.waiting) == len(live)
        if not live:
            assert best is None
        else:
            assert best is not None
            assert rank(best) == min(map(rank, live))
            ordered = policy.first_waiting(now_s, len(live))
            assert [rank(entry) for entry in ordered] == sorted(map(rank, live))


def policy_of(max_suspended: int = 4, max_batch_tokens: int = 100) -> Policy[str, str]:
    return make_policy("s-edf", Limits(max_suspended, max_batch_tokens), max_starvation_s=1e9)


@pytest.mark.parametrize("name", ["feasible", "s-edf"])
def test_a_policy_by_slack_knows_how_many_cannot_be_met_any_more(name: str) -> None:
    policy: Policy[str, str] = make_policy(name, Limits(4, 100), max_starvation_s=1e9)
    for number, deadline_s in enumerate((2.0, 5.0, 9.0)):
        policy.add(job(f"{number}", deadline_s=deadline_s))
    policy.pick(0.0, None)
    assert policy.infeasible_waiting == 0
    policy.pick(7.0, None)
    assert policy.infeasible_waiting == 2


@pytest.mark.parametrize("name", ["edf", "fcfs"])
def test_a_policy_that_does_not_ask_says_so(name: str) -> None:
    assert make_policy(name, Limits(4, 100), max_starvation_s=1e9).infeasible_waiting is None


def test_a_new_request_preempts_only_within_the_bound_on_suspended_tasks() -> None:
    policy = policy_of(max_suspended=1)
    running, suspended = job("running", deadline_s=50.0, started=True), job("suspended", deadline_s=60.0, started=True)
    urgent = job("urgent", deadline_s=2.0)
    policy.add(running)
    policy.add(urgent)
    assert policy.pick(0.0, running) is urgent
    policy.add(suspended)
    assert policy.pick(0.0, running) is running, "a second suspended task would exceed the bound"
    policy.remove(suspended)
    suspended.deadline_s = 1.5
    policy.add(suspended)
    assert policy.pick(0.0, running) is suspended, "changing places does not raise the number of suspended tasks"


def test_when_nothing_may_be_admitted_a_started_task_runs() -> None:
    policy = policy_of()
    policy.add(job("urgent", deadline_s=2.0))
    assert policy.pick(0.0, None, admit=False) is None
    task = job("task", deadline_s=50.0, started=True)
    policy.add(task)
    assert policy.pick(0.0, None, admit=False) is task


@dataclass
class Sized:
    tokens: int


def batch_of(jobs: list[Job[Sized]], max_batch_tokens: int = 100, policy: str = "s-edf") -> list[Job[Sized]]:
    scheduler: Policy[Sized, str] = make_policy(policy, Limits(4, max_batch_tokens), 1e9)
    for entry in jobs:
        scheduler.add(entry)
    winner = scheduler.pick(0.0, None)
    assert winner is not None
    return scheduler.batch(
        winner,  # type: ignore[arg-type]
        0.0,
        lambda item: item.tokens,
        lambda items: sum(item.tokens for item in items) / 100,
    )


def test_a_request_joins_only_where_every_member_keeps_most_of_its_time() -> None:
    tight = Job(Sized(20), 0.0, 0.5 / BATCH_SHARE, 0.2)
    fits = Job(Sized(20), 0.0, 3.0, 0.2)
    too_slow = Job(Sized(40), 0.0, 9.0, 0.4)  # 0.8 s together is more than the first one's 0.5 s
    assert batch_of([tight, fits, too_slow]) == [tight, fits]
    assert batch_of([tight, fits, too_slow], policy="s-edf-paper") == [tight, fits, too_slow]


@dataclass
class Placed:
    tokens: int
    place: int


def joint_batch(jobs: list[Job[Placed]], max_batch_tokens: int = 100) -> list[Job[Placed]]:
    scheduler: Policy[Placed, str] = make_policy("s-edf", Limits(4, max_batch_tokens), 1e9)
    for entry in jobs:
        scheduler.add(entry)
    winner: Any = scheduler.pick(0.0, None)
    return batch_at_all_places(scheduler, winner, 0.0)


def batch_at_all_places(policy: Policy[Placed, str], winner: Job[Placed], now_s: float) -> list[Job[Placed]]:
    """The batch of ``winner``, and what other places compute beside it."""

    def tokens(item: Placed) -> int:
        return item.tokens

    def place(item: Placed) -> int:
        return item.place

    def predict_s(items: Sequence[Placed]) -> float:
        return sum(item.tokens for item in items) / 100

    batch = policy.batch(winner, now_s, tokens, predict_s, place)
    return [*batch, *policy.beside(batch, now_s, tokens, predict_s, place)]


def placed(place: int, tokens: int, deadline_s: float) -> Job[Placed]:
    return Job(Placed(tokens, place), 0.0, deadline_s, tokens / 100)


def test_other_places_compute_beside_the_winner_what_takes_no_longer_than_its_batch() -> None:
    winner = placed(0, 200, 3.0)  # fills a batch by itself, and has no more than half of its time left
    same, as_long, longer = placed(0, 20, 50.0), placed(1, 150, 60.0), placed(2, 220, 70.0)
    more, too_many = placed(1, 50, 80.0), placed(1, 1, 90.0)
    assert joint_batch([winner, same, as_long, longer, more, too_many]) == [winner, as_long, more]


def test_who_runs_beside_a_long_winner_keeps_most_of_its_time() -> None:
    winner = placed(0, 200, 3.0)
    urgent, patient = placed(1, 10, 3.5), placed(1, 10, 2.1 / BATCH_SHARE)
    assert joint_batch([winner, urgent, patient]) == [winner, patient]
    hopeless = placed(1, 100, 0.5)
    assert joint_batch([winner, hopeless]) == [winner, hopeless]


def test_a_winner_with_time_lets_others_take_longer_than_itself() -> None:
    winner, longer = placed(0, 20, 8.0), placed(1, 90, 50.0)
    longest = placed(2, 110, 50.0)  # more tokens than a batch may have
    assert joint_batch([winner, longer, longest]) == [winner, longer]
    winner.deadline_s = 0.8 / BATCH_SHARE
    assert joint_batch([winner, longer]) == [winner]


@pytest.mark.parametrize("of_winner", [200, 40])
def test_a_batch_and_what_runs_beside_it_have_no_more_requests_than_the_limits_say(of_winner: int) -> None:
    """Twice as many are looked at, and all of them would fit."""
    most = Limits(4, 1000).max_batch_requests
    jobs = [placed(int(number >= of_winner), 1, 1000.0 + number) for number in range(200)]
    assert joint_batch(jobs, max_batch_tokens=1000) == jobs[:most]


@pytest.mark.parametrize("kind", ["feasible", "s-edf"])
def test_a_starved_request_starts_alone_while_others_can_be_met(kind: str) -> None:
    """Joiners would take the time of these as well: more than its turn is worth."""
    policy: Policy[Placed, str] = make_policy(kind, Limits(4, 1000), max_starvation_s=1.0)
    starved, another = placed(0, 50, 0.1), placed(0, 50, 0.2)
    beside, longer, kept = placed(1, 40, 0.3), placed(1, 60, 0.3), placed(0, 20, 9.0)
    for entry in (starved, another, beside, longer, kept):
        policy.add(entry)

    def batch() -> list[Job[Placed]]:
        assert policy.pick(2.0, None) is starved
        return batch_at_all_places(policy, starved, 2.0)

    assert batch() == [starved, beside], "what runs at the same time and takes no longer costs nothing"
    policy.remove(kept)
    assert batch() == [starved, another, beside, longer], "nobody else would be met"


@pytest.mark.parametrize("kind", ["feasible", "s-edf"])
def test_a_starved_request_that_cannot_start_in_its_turn_lets_others_go_first_for_as_long(kind: str) -> None:
    policy: Policy[str, str] = make_policy(kind, Limits(4, 100), max_starvation_s=1.0)
    starved, kept = job("starved", 0.1, 0.5), job("kept", 1e6)
    for entry in (starved, kept):
        policy.add(entry)
    firsts = {10.0: starved, 34.9: starved, 35.0: kept, 59.9: kept, 60.0: starved, 84.9: starved}
    for now_s, first in firsts.items():
        assert policy.pick(now_s, None) is first
        assert policy.turn_ends_s(kept) == math.inf
    assert policy.turn_ends_s(starved) == 85.0


@given(
    st.lists(st.tuples(st.integers(1, 150), st.floats(0.01, 5)), min_size=1, max_size=40),
    st.integers(1, 200),
)
@settings(deadline=None)
def test_batches_keep_the_token_budget_and_every_feasible_members_deadline(
    sizes: list[tuple[int, float]], budget: int
) -> None:
    jobs = [Job(Sized(tokens), 0.0, deadline_s, tokens / 100) for tokens, deadline_s in sizes]
    members = batch_of(jobs, max_batch_tokens=budget)
    tokens = sum(member.item.tokens for member in members)
    assert len(members) == len(set(map(id, members)))
    if len(members) > 1:
        assert tokens <= budget
        for member in members:
            if member.slack_s(0.0) >= 0:
                assert tokens / 100 <= BATCH_SHARE * member.deadline_s


# ---- a server made of the policy alone ---------------------------------------------------------------------------


@dataclass
class Request:
    number: int
    arrival_s: float
    slo_s: float
    work_s: float
    kv: int


@dataclass
class Server:
    """Prefill with KV admission, driven by the policy at every event; what it must never do is asserted on the way."""

    policy: Policy[Request, list[Request]]
    kv_capacity: int
    kv_used: int = 0
    now_s: float = 0.0
    finished: list[int] = field(default_factory=list)
    running: Job[list[Request]] | None = None
    late_s: float = 0.0
    """Time for which tasks ran that were too late, while requests were still to come."""

    def run(self, arrivals: list[Request]) -> None:
        pending = sorted(arrivals, key=lambda request: request.arrival_s)
        while pending or len(self.policy.waiting) or len(self.policy.started):
            while pending and pending[0].arrival_s <= self.now_s:
                request = pending.pop(0)
                deadline_s = request.arrival_s + request.slo_s
                self.policy.add(Job(request, request.arrival_s, deadline_s, request.work_s))
            next_s = pending[0].arrival_s if pending else float("inf")
            task = self.pick()
            if task is None:
                assert self.now_s < next_s < float("inf"), "nothing runs, nothing will arrive: a deadlock"
                self.now_s = next_s
                continue
            self.running = task
            elapsed_s = min(task.remaining_s, max(next_s - self.now_s, 1e-6))
            if pending and task.latest_start_s < self.now_s - 1e-9:
                self.late_s += elapsed_s
            self.now_s += elapsed_s
            self.policy.remove(task)
            task.remaining_s -= elapsed_s
            if task.remaining_s <= 1e-9:
                self.finished += [request.number for request in task.item]
                self.kv_used -= sum(request.kv for request in task.item)
                self.running = None
            else:
                self.policy.add(task)

    def pick(self) -> Job[list[Request]] | None:
        choice = self.policy.pick(self.now_s, self.running)
        if choice is None or isinstance(choice.item, list):
            return choice
        members = self.policy.batch(
            choice,
            self.now_s,
            lambda request: request.kv,
            lambda requests: sum(request.work_s for request in requests),
        )
        kv = sum(member.item.kv for member in members)
        if self.kv_used + kv > self.kv_capacity:
            return self.policy.pick(self.now_s, self.running, admit=False)  # type: ignore[return-value]
        for member in members:
            self.policy.remove(member)
        self.kv_used += kv
        items = [member.item for member in members]
        task = Job(items, choice.arrival_s, choice.deadline_s, 0.0, len(members), choice.number, started=True)
        task.remaining_s = sum(request.work_s for request in task.item)
        self.policy.add(task)
        suspended = len(self.policy.started) - 1
        assert suspended <= self.policy.limits.max_suspended
        return task


requests = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0.05, 20), st.floats(0.01, 3), st.integers(1, 100)), min_size=1, max_size=40
)


@pytest.mark.parametrize("kind", ["feasible", "s-edf", "edf", "fcfs"])
@given(script=requests, max_suspended=st.integers(0, 5), kv_capacity=st.integers(100, 300))
@settings(max_examples=150, deadline=None)
def test_no_task_is_lost_and_none_runs_twice(
    kind: str, script: list[tuple[float, float, float, int]], max_suspended: int, kv_capacity: int
) -> None:
    arrivals = [Request(number, *fields) for number, fields in enumerate(script)]
    server = Server(make_policy(kind, Limits(max_suspended, 60), max_starvation_s=10.0), kv_capacity)
    server.run(arrivals)
    assert sorted(server.finished) == [request.number for request in arrivals]
    assert server.kv_used == 0


def within(server_kind: str, arrivals: list[Request]) -> int:
    server = Server(make_policy(server_kind, Limits(16, 1), max_starvation_s=1e9), kv_capacity=10**9)
    finished_s: dict[int, float] = {}
    pending = {request.number: request for request in arrivals}

    class Recorder(list[int]):
        def __iadd__(self, numbers: list[int]) -> Recorder:  # type: ignore[override, misc]
            for number in numbers:
                finished_s[number] = server.now_s
            self.extend(numbers)
            return self

    server.finished = Recorder()
    server.run(arrivals)
    return sum(finished_s[n] <= r.arrival_s + r.slo_s + 1e-6 for n, r in pending.items())


def test_slack_beats_deadlines_alone_when_not_everything_can_be_met() -> None:
    # Every long request is infeasible from the start; plain EDF spends its time on them and loses the short ones too.
    arrivals = [Request(2 * i, 1.0 * i, 0.5, 0.9, 1) for i in range(20)]
    arrivals += [Request(2 * i + 1, 1.0 * i + 0.01, 0.6, 0.2, 1) for i in range(20)]
    assert within("s-edf", arrivals) == 20
    assert within("feasible", arrivals) == 20
    assert within("edf", arrivals) < 10


@pytest.mark.parametrize("kind", ["feasible", "s-edf"])
def test_starved_requests_get_their_share_of_the_time_and_no_more(kind: str) -> None:
    """Twice as much comes as there is time for, and a batch may have many of them."""
    random, work_s, until_s = Random(0), 0.1, 100.0
    arrivals = [Request(i, 0.05 * (i + random.random()), 1.0, work_s, 1) for i in range(round(until_s / 0.05))]
    server = Server(make_policy(kind, Limits(16, 1000), max_starvation_s=1.0), kv_capacity=10**9)
    server.run(arrivals)
    assert STARVED_SHARE * until_s / 2 <= server.late_s <= STARVED_SHARE * until_s + work_s
    assert len(server.finished) == len(arrivals)


def test_the_policy_needs_neither_torch_nor_sglang() -> None:
    script = (
        "import sys; import sgl_flowprefill.policy, sgl_flowprefill.ttft, sgl_flowprefill.slo;"
        "assert not {'torch', 'sglang'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("kind", ["feasible", "s-edf"])
def test_a_machine_that_slows_down_by_two_is_seen_by_all_that_wait_at_the_next_event(kind: str) -> None:
    pace = Pace()
    policy: Policy[str, str] = make_policy(kind, Limits(4, 100), max_starvation_s=1e9)
    for number in range(20):
        policy.add(Job(f"tight {number}", 0.0, 0.3 + number / 1000, 0.2, pace=pace))
    loose = Job("loose", 0.0, 9.0, 2.0, pace=pace)
    policy.add(loose)
    first = policy.pick(0.0, None)
    assert first is not None
    assert first.item.startswith("tight")
    assert first.remaining_s == 0.2
    pace.factor = 2.0
    policy.repaced()
    assert policy.pick(0.01, None) is loose
    assert loose.remaining_s == 4.0
    pace.factor = 1.0
    policy.repaced()
    again = policy.pick(0.02, None)
    assert again is not None
    assert again.item.startswith("tight")


def urgent_then_slow(factor: float) -> Policy[str, str]:
    """For 100 s urgent requests have taken 0.3 of the time, then it became ``factor`` times as much."""
    pace = Pace()
    policy: Policy[str, str] = make_policy("feasible", Limits(4, 100), max_starvation_s=1e9)
    for second in range(100):
        urgent = Job("urgent", float(second), second + 1.0, 0.3, pace=pace)
        policy.add(urgent)
        policy.pick(float(second), None)
        policy.remove(urgent)
    pace.factor = factor
    policy.repaced()
    return policy


@pytest.mark.parametrize(("factor", "first"), [(1.0, "long"), (2.0, "short")])
def test_room_for_what_will_arrive_is_left_at_the_present_pace(factor: float, first: str) -> None:
    policy = urgent_then_slow(factor)
    policy.add(job("long", 110.0, 4.0, arrival_s=100.0))
    policy.add(job("short", 110.0, 2.0, arrival_s=100.0))
    picked = policy.pick(100.0, None)
    assert picked is not None
    assert picked.item == first  # of ten seconds about 6.6 are free, or 4.2


@pytest.mark.parametrize("kind", ["feasible", "s-edf"])
def test_of_many_that_can_be_met_again_an_event_moves_no_more_than_it_may_however_often_it_asks(kind: str) -> None:
    pace = Pace()
    policy: Policy[str, str] = make_policy(kind, Limits(4, 100), max_starvation_s=1e9)
    for number in range(1000):
        policy.add(Job(f"{number}", 0.0, 3.0 + number / 1e4, 2.0, pace=pace))
    policy.pick(0.0, None)
    pace.factor = 2.0
    policy.repaced()
    now_s = 0.0
    while policy.infeasible_waiting != 1000:
        now_s += 1e-4
        policy.pick(now_s, None)
    for _ in range(MOVES_AT_ONCE):  # events that move none
        now_s += 1e-4
        policy.pick(now_s, None)
    pace.factor = 1.0
    policy.repaced()
    for moved in (MOVES_AT_ONCE, MOVES_AT_ONCE + MOVES, MOVES_AT_ONCE + 2 * MOVES):
        now_s += 1e-4
        for _ in range(3):
            policy.pick(now_s, None)
            policy.first_waiting(now_s, 1)
        assert policy.infeasible_waiting == 1000 - moved


def test_many_that_turn_infeasible_together_are_moved_a_few_at_an_event_and_none_is_lost() -> None:
    pace, policy = Pace(), s_edf()
    jobs = [Job(f"{number}", 0.0, 3.0 + number / 1e4, 2.0, pace=pace) for number in range(500)]
    for entry in jobs:
        policy.add(entry)
    loose = job("loose", 9.0, 2.0)
    policy.add(loose)
    policy.pick(0.0, None)
    pace.factor = 2.0
    policy.repaced()
    for event in range(1, 300):
        best = policy.pick(event * 1e-3, None)
        assert best is not None
        assert len(policy.waiting) == len(policy.first_waiting(event * 1e-3, 999)) == 501
    assert best is loose
    pace.factor = 1.0
    policy.repaced()
    for event in range(300, 600):
        policy.pick(event * 1e-3, None)
    assert names(policy, 0.6)[:3] == ["0", "1", "2"]
    for entry in jobs:
        policy.remove(entry)
    assert names(policy, 0.6) == ["loose"]
