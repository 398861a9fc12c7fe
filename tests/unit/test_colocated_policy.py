"""The policy of a server that prefills and decodes, by itself: whether a step or a prefill runs now, and bounds that
hold with exact times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.policy import Act, ColocatedPolicy, DecodeLimits, Job, Limits, Stream, make_policy
from sgl_flowprefill.policy.decode import MARGIN_FACTOR, NO_LOAD, DecodeLoad
from sgl_flowprefill.policy.forecast import Forecast
from sgl_flowprefill.policy.orders.feasible import Charged, FeasibleSet, largest_feasible

LIMITS = Limits(max_suspended=4, max_batch_tokens=2048)
STEPS = StepCost(0.010, 0.001)
TINY_S = 1e-9


# ---- one object decides ---------------------------------------------------------------------------------------------


def request(name: str, deadline_s: float, work_s: float = 1.0, arrival_s: float = 0.0) -> Job[str]:
    return Job(name, arrival_s, deadline_s, work_s)


def started(name: str, deadline_s: float, work_s: float = 1.0, requests: int = 1) -> Job[str]:
    return Job(name, 0.0, deadline_s, work_s, requests, started=True)


def colocated(order: str = "feasible", limits: DecodeLimits | None = None) -> ColocatedPolicy[str, str]:
    return ColocatedPolicy(make_policy(order, LIMITS, 1e9), STEPS, limits or DecodeLimits(margin_s=0.0))


@pytest.mark.parametrize("order", ["feasible", "s-edf", "edf", "fcfs"])
def test_without_streams_it_is_the_prefill_policy(order: str) -> None:
    random = Random(order)
    policy, alone = colocated(order), make_policy(order, LIMITS, 1e9)
    running = None
    for number in range(400):
        now_s = 0.2 * number
        arrivals = [(now_s + random.uniform(0.1, 9), random.uniform(0.05, 1.0)) for _ in range(random.randint(0, 2))]
        for deadline_s, work_s in arrivals:
            policy.prefills.add(Job("", now_s, deadline_s, work_s, number=number))
            alone.add(Job("", now_s, deadline_s, work_s, number=number))
        admit = random.random() < 0.8
        turn, picked = policy.next(now_s, running, admit), alone.pick(now_s, running, admit)
        assert turn.ask_again_s == math.inf
        if picked is None:
            assert turn.act is Act.NOTHING
            continue
        assert turn.act is (Act.TASK if picked.started else Act.START)
        assert (turn.job.deadline_s, turn.job.work_s) == (picked.deadline_s, picked.work_s)
        policy.prefills.remove(turn.job)
        alone.remove(picked)


def test_a_step_runs_when_it_has_to_start_and_when_no_prefill_can_run() -> None:
    policy = colocated()
    policy.joined([Stream(0.1, 10, 0.0)])
    assert policy.next(0.0, None).act is Act.STEP, "nothing to prefill"
    waiting = request("a", 50.0)
    policy.prefills.add(waiting)
    turn = policy.next(0.0, None)
    assert (turn.act, turn.job, turn.ask_again_s) == (Act.START, waiting, pytest.approx(0.089))
    assert policy.next(0.0, None, admit=False).act is Act.STEP, "no KV cache for what waits"
    assert policy.next(turn.ask_again_s, None).act is Act.STEP
    policy.began(0.089)
    policy.stepped(0.1)
    assert policy.next(0.1, None).act is Act.START
    policy.prefills.remove(waiting)
    task = started("a", 50.0)
    policy.prefills.add(task)
    assert policy.next(0.1, task).act is Act.TASK
    assert policy.next(0.2 - 0.011, task).act is Act.STEP


def test_no_step_is_asked_for_while_one_runs() -> None:
    policy = colocated(limits=DecodeLimits(margin_s=0.0, ahead=True))
    policy.joined([Stream(0.1, 10, 0.0)])
    policy.began(0.0)
    for now_s in (0.0, 1.0):
        assert policy.next(now_s, None).act is Act.NOTHING
        assert policy.next(now_s, None, admit=False).act is Act.NOTHING
    waiting = request("a", 50.0)
    policy.prefills.add(waiting)
    turn = policy.next(1.0, None)
    assert (turn.act, turn.job, turn.ask_again_s) == (Act.START, waiting, math.inf)
    policy.stepped(1.0)
    assert policy.next(1.2, None).act is Act.STEP


def test_a_stream_that_joins_while_a_step_runs_gets_its_token_of_the_next_one() -> None:
    policy = colocated()
    policy.joined([Stream(0.5, 10, 0.0)])
    policy.began(0.0)
    late = Stream(0.1, 100, 0.005)
    policy.joined([late])
    assert policy.may_join(78, 0)
    assert not policy.may_join(79, 0), "its objective counts where others want to join"
    policy.stepped(0.02, took_s=0.011)
    assert (policy.streams.requests, policy.streams.context_tokens) == (2, 111)
    assert policy.load.start_by_s == pytest.approx(0.005 + 0.1 - 0.012), "due by its own first token; no step was slow"
    policy.began(0.09)
    policy.stepped(0.102, [late])
    assert (policy.streams.requests, policy.streams.context_tokens) == (1, 12)
    assert policy.load.start_by_s == pytest.approx(0.102 + 0.5 - 0.011)


def test_the_margin_is_of_the_sum_of_start_and_step_of_steps_that_had_to_start() -> None:
    policy: ColocatedPolicy[str, str] = ColocatedPolicy(make_policy("fcfs", LIMITS, 60.0), STEPS)
    policy.joined([Stream(0.1, 10, 0.0)])
    begin_s = policy.load.start_by_s - 0.01
    policy.began(begin_s)
    policy.stepped(begin_s + 5.0)
    assert policy.margin.value_s() == MARGIN_FACTOR * 0.01, "one that ran early shows no lateness"
    start_by_s, step_s = policy.load.start_by_s, policy.load.step_s
    policy.began(start_by_s + 0.003)
    policy.stepped(start_by_s + 0.003 + step_s + 0.042)
    assert policy.margin.value_s() == pytest.approx(MARGIN_FACTOR * 0.045)
    assert policy.margin_s == pytest.approx(0.05), "at most half of the tightest objective"
    policy.began(policy.load.start_by_s + 5.0)
    policy.stepped(policy.load.start_by_s + 6.0)
    policy.joined([Stream(0.06, 10, 1.0)])
    assert policy.margin_s == pytest.approx(0.03), "half of 60 ms, which would have brought neither in time"


def test_an_objective_that_no_step_can_keep_teaches_no_lateness() -> None:
    policy: ColocatedPolicy[str, str] = ColocatedPolicy(make_policy("fcfs", LIMITS, 60.0), STEPS)
    policy.joined([Stream(1e-6, 10, 5.0)])
    assert policy.load.start_by_s == 5.0, "not before the token that precedes it"
    policy.began(5.0)
    policy.stepped(5.0 + policy.load.step_s + 0.002)
    assert policy.margin.value_s() == MARGIN_FACTOR * 0.01


def test_decoding_ahead_serves_streams_while_the_winner_waits_for_kv_cache() -> None:
    for ahead in (False, True):
        policy = colocated(limits=DecodeLimits(margin_s=0.0, ahead=ahead))
        policy.joined([Stream(1.0, 10, 0.0)])
        policy.prefills.add(request("urgent", 3.0))
        task = started("patient", 50.0)
        policy.prefills.add(task)
        assert policy.next(0.0, task, admit=False).act is (Act.STEP if ahead else Act.TASK)
        policy.began(0.0)
        policy.stepped(0.011)
        assert policy.next(0.0111, task, admit=False).act is Act.TASK, "prefills keep their share"


def test_a_retracted_stream_starts_before_all_other_requests_but_not_in_place_of_a_step() -> None:
    policy = colocated()
    policy.joined([Stream(0.1, 10, 0.0)])
    urgent, returned = request("urgent", 2.0), request("returned", 0.5)
    policy.prefills.add(urgent)
    policy.prefills.add(returned)
    assert policy.next(0.0, None).job is urgent
    policy.returned(returned)
    assert policy.next(0.0, None).job is returned
    assert policy.next(0.0, None, admit=False).act is Act.STEP, "no KV cache for it"
    assert policy.next(0.2, None).act is Act.STEP
    policy.prefills.remove(returned)
    policy.waits_no_longer(returned)
    assert policy.next(0.0, None).job is urgent


@pytest.mark.parametrize(("slo_s", "until_s"), [(0.0, 10.05), (1e-12, 10.05), (600.0, 12.0)])
def test_turns_of_a_retracted_stream_are_neither_too_short_nor_too_long(slo_s: float, until_s: float) -> None:
    policy = colocated()
    urgent, returned = request("urgent", 20.0), request("returned", 10.0 + slo_s, arrival_s=10.0)
    for job in (urgent, returned):
        policy.prefills.add(job)
    policy.returned(returned)
    assert policy.next(10.0, None).job is returned
    assert policy.shut_until_s(returned, 10.0) == pytest.approx(until_s)
    assert policy.next(until_s + 0.01, None).job is urgent


def test_a_retracted_stream_without_kv_cache_and_the_others_go_first_in_turns() -> None:
    policy = colocated()
    urgent, returned = request("urgent", 1e6), request("returned", 12.0, arrival_s=10.0)
    for job in (urgent, returned):
        policy.prefills.add(job)
    policy.returned(returned)
    for now_s, first, until_s in ((10.0, returned, 12.0), (11.9, returned, 12.0), (15.0, returned, 16.0)):
        assert policy.next(now_s, None).job is first
        assert policy.shut_until_s(first, now_s) == until_s
    for now_s in (12.0, 13.9, 16.0, 17.9):
        assert policy.next(now_s, None).job is urgent
        assert policy.shut_until_s(urgent, now_s) == math.inf
    policy.prefills.remove(urgent)
    assert policy.next(13.0, None).job is returned, "nobody else waits"


def test_tasks_that_are_hardly_begun_and_not_kept_are_given_back_first() -> None:
    policy = colocated()
    done_s = {"half": 1.1, "late": 0.4, "kept, costly": 0.3, "kept, cheap": 0.3}
    held = {"half": 10, "late": 10, "kept, costly": 1000, "kept, cheap": 10}
    deadlines_s = {"half": 0.5, "late": 0.5, "kept, costly": 90.0, "kept, cheap": 90.0}
    for name, deadline_s in deadlines_s.items():
        policy.prefills.add(started(name, deadline_s))

    def given(tokens: int) -> list[str]:
        return [job.item for job in policy.give_back(0.0, tokens, held.__getitem__, done_s.__getitem__)]

    assert given(0) == []
    assert given(10) == ["late"]
    assert given(11) == ["late", "kept, costly"]
    assert given(1011) == ["late", "kept, costly", "kept, cheap"]
    assert given(10_000) == ["late", "kept, costly", "kept, cheap", "half"]
    held["late"] = 0
    assert given(10) == ["kept, costly"], "what holds none where it is lacking goes on"
    assert given(10_000) == ["kept, costly", "kept, cheap", "half"]


# ---- decode time is charged to the feasible set ---------------------------------------------------------------------


def feasible(jobs: Iterable[Job[None]], load: DecodeLoad) -> bool:
    """Whether ``jobs`` all end in time: earliest deadline first between the steps, one after the other by the clock."""
    now_s = 0.0
    step_at_s = load.start_by_s
    for job in sorted(jobs, key=lambda job: job.deadline_s):
        left_s = job.work_s
        while left_s > TINY_S:
            if now_s >= step_at_s - TINY_S:
                now_s += load.step_s
                step_at_s += load.period_s
                continue
            ran_s = min(left_s, step_at_s - now_s)
            now_s += ran_s
            left_s -= ran_s
        if now_s > job.deadline_s + 1e-6:
            return False
    return True


def beside(step: int, rest: int, first: int) -> tuple[DecodeLoad, FeasibleSet[None, None]]:
    """Steps, and a policy that plans beside them."""
    load = DecodeLoad(float(step), float(step + rest), float(first))
    policy: FeasibleSet[None, None] = FeasibleSet(LIMITS, 1e9, math.inf)
    policy.charge(load)
    return load, policy


drawn_jobs = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=7)
drawn_loads = st.tuples(st.integers(1, 4), st.integers(1, 12), st.integers(0, 10))


@settings(max_examples=300, deadline=None)
@given(drawn_jobs, drawn_loads)
def test_what_is_kept_beside_steps_is_a_largest_feasible_set(
    drawn: list[tuple[int, int]], steps: tuple[int, int, int]
) -> None:
    load, policy = beside(*steps)
    jobs: list[Job[None]] = [Job(None, 0.0, deadline + 0.5, float(work)) for deadline, work in drawn]
    for job in jobs:
        policy.add(job)
    policy.charge(DecodeLoad(load.step_s, load.period_s, load.start_by_s))  # planned anew, as behind a step
    policy.pick(0.0, None)
    best = max(size for size in range(len(jobs) + 1) if any(feasible(some, load) for some in combinations(jobs, size)))
    assert feasible(policy.kept, load)
    assert len(policy.kept) == best
    by_deadline = sorted(jobs, key=lambda job: (job.deadline_s, job.number))
    assert len(largest_feasible(by_deadline, 0.0, Charged(Forecast(math.inf), load, 0.0)).jobs) == best


@settings(max_examples=200, deadline=None)
@given(drawn_jobs, drawn_loads)
def test_jobs_that_come_one_by_one_beside_steps_can_all_be_met(
    drawn: list[tuple[int, int]], steps: tuple[int, int, int]
) -> None:
    load, policy = beside(*steps)
    policy.pick(0.0, None)
    for deadline, work in drawn:
        policy.add(Job(None, 0.0, deadline + 0.5, float(work)))
        policy.pick(0.0, None)
        assert feasible(policy.kept, load)


def test_a_job_that_only_steps_make_late_gives_way() -> None:
    policy: FeasibleSet[str, str] = FeasibleSet(LIMITS, 1e9, math.inf)
    policy.add(request("a", 3.0, 2.0))
    policy.add(request("b", 3.2, 1.0))
    policy.pick(0.0, None)
    assert [job.item for job in policy.kept] == ["a", "b"]
    policy.charge(DecodeLoad(0.2, 1.0, 0.5))
    policy.pick(0.0, None)
    assert [job.item for job in policy.kept] == ["b"]
    policy.charge(NO_LOAD)
    policy.pick(0.0, None)
    assert [job.item for job in policy.kept] == ["a", "b"]


# ---- a server made of the policy alone, with exact times -------------------------------------------------------------


@dataclass(eq=False)
class Served:
    """A request: a prefill of ``work_s``, which becomes a stream of ``tokens``."""

    arrival_s: float
    work_s: float
    slo_s: float
    tbt_s: float
    tokens: int
    token_times_s: list[float] = field(default_factory=list)


@dataclass
class Server:
    """Runs the policy with exact times. A prefill can stop every ``quantum_s``."""

    policy: ColocatedPolicy[Served, Served]
    quantum_s: float
    model: StepCost
    now_s: float = 0.0
    steps: list[tuple[float, float, bool]] = field(default_factory=list)
    """Begin and end of each, and whether a prefill could have run."""
    late_s: float = 0.0
    """The longest time for which a step was put off behind its latest start."""
    live: dict[Served, Stream] = field(default_factory=dict)

    def run(self, requests: Iterable[Served], turns: int = 200_000) -> None:
        coming = sorted(requests, key=lambda request: request.arrival_s, reverse=True)
        running: Job[Served] | None = None
        for _ in range(turns):
            while coming and coming[-1].arrival_s <= self.now_s:
                request = coming.pop()
                self.policy.prefills.add(
                    Job(request, request.arrival_s, request.arrival_s + request.slo_s, request.work_s)
                )
            turn = self.policy.next(self.now_s, running)
            if turn.act is Act.STEP:
                self._step()
            elif turn.job is not None:
                running = self._run(turn.job, min(turn.ask_again_s, coming[-1].arrival_s if coming else math.inf))
            elif coming:
                self.now_s = coming[-1].arrival_s
            else:
                return
        raise AssertionError("the server does not come to an end")

    def _step(self) -> None:
        begin_s, load = self.now_s, self.policy.load
        wanted = bool(len(self.policy.prefills.started) + len(self.policy.prefills.waiting))
        if wanted:
            self.late_s = max(self.late_s, begin_s - load.start_by_s)
        streams = self.policy.streams
        self.now_s += self.model.predict_s(streams.requests, streams.context_tokens)
        self.policy.began(begin_s)
        self.steps.append((begin_s, self.now_s, wanted))
        for request in self.live:
            request.token_times_s.append(self.now_s)
        over = [request for request in self.live if len(request.token_times_s) == request.tokens]
        self.policy.stepped(self.now_s, [self.live.pop(request) for request in over])

    def _run(self, job: Job[Served], until_s: float) -> Job[Served] | None:
        """Run ``job`` to its end, or to the first place to stop behind ``until_s``."""
        self.policy.prefills.remove(job)
        job.started = True
        done_s, ran_s = job.item.work_s - job.work_s, job.work_s
        if until_s < math.inf:
            whole = math.floor((done_s + max(0.0, until_s - self.now_s)) / self.quantum_s + TINY_S)
            ran_s = min(ran_s, (whole + 1) * self.quantum_s - done_s)
        self.now_s += ran_s
        job.work_s -= ran_s
        if job.work_s > TINY_S:
            self.policy.prefills.add(job)
            return job
        request = job.item
        request.token_times_s.append(self.now_s)
        if request.tokens > 1:
            self.live[request] = Stream(request.tbt_s, 100, self.now_s)
            self.policy.joined([self.live[request]])
        return None


drawn_requests = st.lists(
    st.builds(
        Served,
        arrival_s=st.floats(0, 3),
        work_s=st.floats(0.01, 0.6),
        slo_s=st.floats(0.05, 3.0),
        tbt_s=st.sampled_from([0.03, 0.05, 0.1, 0.2]),
        tokens=st.integers(1, 40),
    ),
    min_size=1,
    max_size=25,
)
QUANTUM_S = 0.004


def server(order: str, share: float, margin_s: float) -> Server:
    model = StepCost(0.008, 0.0005)
    limits = DecodeLimits(max_share=share, margin_s=margin_s)
    return Server(ColocatedPolicy(make_policy(order, LIMITS, 60.0), model, limits), QUANTUM_S, model)


def gaps(request: Served) -> list[float]:
    times_s = request.token_times_s
    return [after_s - before_s for before_s, after_s in pairwise(times_s)]


@settings(max_examples=150, deadline=None)
@given(drawn_requests, st.sampled_from(["feasible", "s-edf", "fcfs"]), st.sampled_from([0.5, 0.9]))
def test_no_gap_exceeds_the_period_by_more_than_the_margin(requests: list[Served], order: str, share: float) -> None:
    """With exact times, and a margin of what can put a step off: a prefill runs up to QUANTUM_S on, and a step grows by
    what joins meanwhile. Nobody starves: all requests get all their tokens.
    """
    model = StepCost(0.008, 0.0005)
    margin_s = QUANTUM_S + 2 * model.per_request_s
    run = server(order, share, margin_s)
    run.run(requests)
    for request in requests:
        assert len(request.token_times_s) == request.tokens
    assert run.late_s <= margin_s + TINY_S, "the condition"
    longest_step_s = model.predict_s(len(requests), 0)
    for request in requests:
        for gap_s in gaps(request):
            assert gap_s <= max(request.tbt_s, longest_step_s / share + margin_s) + TINY_S


@settings(max_examples=100, deadline=None)
@given(drawn_requests, st.sampled_from(["feasible", "fcfs"]))
def test_objectives_that_leave_room_for_steps_are_always_met(requests: list[Served], order: str) -> None:
    """Where no step is longer than the period allows, no token is late at all."""
    margin_s = QUANTUM_S + 2 * 0.0005
    longest_step_s = 0.008 + 0.0005 * len(requests)
    assume(min(request.tbt_s for request in requests) >= longest_step_s / 0.9 + margin_s)
    run = server(order, 0.9, margin_s)
    run.run(requests)
    for request in requests:
        assert all(gap_s <= request.tbt_s + TINY_S for gap_s in gaps(request))


@settings(max_examples=100, deadline=None)
@given(drawn_requests, st.sampled_from([0.3, 0.5, 0.9]))
def test_prefills_get_their_share_between_any_two_steps(requests: list[Served], share: float) -> None:
    run = server("feasible", share, 0.002)
    run.run(requests)
    for (_, before_s, _), (begin_s, end_s, wanted) in pairwise(run.steps):
        step_s, rest_s = end_s - begin_s, begin_s - before_s
        if wanted:  # with nothing to prefill, steps follow one another
            assert rest_s >= (1 - share) * (step_s + rest_s) - TINY_S


def test_streams_that_ask_for_more_than_there_is_leave_a_prefill_its_share() -> None:
    run = server("feasible", 0.9, 0.0)
    talker, prompt = Served(0.0, 0.01, 1.0, 0.001, 2000), Served(0.5, 0.5, 60.0, 0.1, 1)
    run.run([talker, prompt])
    assert len(talker.token_times_s) == 2000
    [end_s] = prompt.token_times_s
    assert end_s <= 0.5 + 0.5 / 0.1 + 0.1


def test_prompts_without_end_leave_a_stream_its_tokens() -> None:
    run = server("fcfs", 0.9, QUANTUM_S + 0.001)
    talker = Served(0.0, 0.01, 1.0, 0.1, 30)
    run.run([talker, *(Served(0.001, 0.3, 0.1, 0.1, 1) for _ in range(40))])
    assert max(gaps(talker)) <= 0.1 + TINY_S
