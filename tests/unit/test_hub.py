"""Which requests the hub starts together, and what it makes of them."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import ColocatedPolicy, Limits, make_policy
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.runtime.scheduler_role import input_logprobs
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


def test_a_recorder_hears_of_decisions_by_when_it_wants_to_while_a_prefill_runs_without_an_event() -> None:
    request = SimulatedRequest("long", 0.0, 1000, 100.0)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), Model(40, lambda _: 0.05, lambda _: 0.05), [request])
    told_s: list[float] = []

    def decided(cost_s: float, now_s: float) -> float:
        told_s.append(now_s)
        return now_s + 0.5

    server.recorder.decided = decided  # type: ignore[method-assign]
    server.run_all()
    assert 4.0 < server.device.now_s < 4.5
    assert len(told_s) >= 8
    assert all(0.5 <= after - before < 0.65 for before, after in pairwise(told_s))


@pytest.mark.parametrize("decides", [True, False])
def test_the_rank_that_decides_keeps_what_others_tell_it_when_ranks_have_met_and_they_what_they_have_told_no_longer(
    decides: bool,
) -> None:
    """One that has met the first rank may have looked before the first one does, and have news since then."""
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), Model(1, lambda _: 1e-3, lambda _: 1e-3), []).hub
    notified = {"before they meet"}

    def meet(values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        notified.add("when they have met")
        return values

    events: Any = SimpleNamespace(clear=notified.clear)
    agreement: Any = SimpleNamespace(decides=decides, agree=meet)
    hub.events, hub.agreement = events, agreement
    hub.look()
    assert notified == ({"when they have met"} if decides else set())


def test_a_winner_starts_without_those_that_do_not_fit_beside_it() -> None:
    """Where activations of all that would join it exceed what is left beside a live task."""
    requests = [SimulatedRequest(f"r{i}", 0.0, tokens, 100.0) for i, tokens in enumerate([64, 100, 1900, 70])]
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.policy.limits = Limits(max_suspended=16, max_batch_tokens=10_000)
    hub.look()
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None)
    hub.work.tasks.live = [SimpleNamespace(new_tokens=30_000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]

    def chosen(room_tokens: int) -> list[int]:
        """Prompts that start together, beside a live task and ``room_tokens`` more."""
        budget_bytes = activations.running_bytes(30_000) + activations.suspended_bytes(room_tokens)
        hub.work.memory = TaskMemory(activations, budget_bytes)
        choice = hub.choose()
        return [job.item.req.tokens for job in choice] if isinstance(choice, list) else []

    everything = chosen(10_000)
    assert sorted(everything) == [64, 70, 100, 1900]
    for kept in range(1, 5):
        assert chosen(sum(everything[:kept])) == everything[:kept]
    assert chosen(everything[0] - 1) == []


def test_log_probabilities_of_a_long_prompt_keep_it_from_starting_where_they_would_not_fit() -> None:
    model = Model(1, lambda tokens: 1e-9, lambda tokens: 1e-9)
    activations = Activations(hidden=1, attention=20, mlp=1, mlp_tile_tokens=None, logits=1000)
    for logprob_rows in (0, 64):
        requests = [SimulatedRequest("r", 0.0, 64, 100.0, logprob_rows=logprob_rows)]
        hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
        hub.look()
        hub.work.tasks.live = [SimpleNamespace(new_tokens=1000, logprob_rows=0, shapes=[], members=[])]  # type: ignore[list-item]
        hub.work.memory = TaskMemory(activations, activations.running_bytes(1000) + activations.suspended_bytes(64))
        assert isinstance(hub.choose(), list) == (logprob_rows == 0)


def test_log_probabilities_are_asked_for_from_a_token_of_the_prompt_on() -> None:
    req = SimpleNamespace(origin_input_ids=range(64), return_logprob=True, logprob_start_len=-1)
    assert input_logprobs(req) == 0
    req.logprob_start_len = 10
    assert input_logprobs(req) == 54
    req.return_logprob = False
    assert input_logprobs(req) == 0


def test_a_task_takes_over_the_number_of_the_request_it_is_started_for() -> None:
    requests = [SimulatedRequest(f"r{i}", 0.0, 100, 1.0) for i in range(2)]
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.look()
    winner = hub.work.policy.first_waiting(0.0, 2)[1]
    task = hub.start([winner])
    assert task is not None
    assert task.job.number == winner.number


def test_requests_that_wait_no_longer_are_withdrawn_from_the_policy_and_those_that_start_are_not() -> None:
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: 1.0, pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("feasible", Limits(16, 1), 60.0)
    withdrawn: list[str] = []
    policy.withdrawn = lambda job: withdrawn.append(job.item.req)  # type: ignore[method-assign]
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    for number, rid in enumerate(("leaves", "starts", "stays")):
        work.add(Arrival(rid, array("q", range(100)), PrefillShape(100, 0), number, 1000.0, 0.0))
    winner = policy.first_waiting(0.0, 3)[1]
    work.start(0.0, winner, SimpleNamespace(reqs=["starts"]), ["starts"], [PrefillShape(100, 0)], 0)
    work.forget_all_but(["stays"])
    assert withdrawn == ["leaves"]
    assert [job.item.req for job in policy.waiting] == ["stays"]


@pytest.mark.parametrize(
    ("now_s", "due_s"),
    [(0.0, 5.0), (3.0, 6.0), (5.0, 9.0), (8.0, 6.0)],
    ids=["first of all", "of those in time", "of the only one in time", "of the winner, as none is in time"],
)
def test_a_task_is_due_when_the_first_of_its_requests_is_that_can_be_met(now_s: float, due_s: float) -> None:
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: float(len(shapes)), pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy("fcfs", Limits(16, 1000), 60.0)
    work = Work(ColocatedPolicy(policy), ttft, unlimited, Progress([]), Tasks())
    shape, deadlines_s = PrefillShape(100, 0), {"winner": 6.0, "first": 5.0, "last": 9.0}
    for number, (rid, deadline_s) in enumerate(deadlines_s.items()):
        work.add(Arrival(rid, array("q", range(100)), shape, number, deadline_s, 0.0))
    winner = policy.first_waiting(0.0, 1)[0]
    assert winner.item.req == "winner"
    task = work.start(now_s, winner, SimpleNamespace(reqs=list(deadlines_s)), list(deadlines_s), [shape] * 3, 0)
    assert (task.job.deadline_s, task.number) == (due_s, winner.number)
