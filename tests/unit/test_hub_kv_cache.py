"""Who starts while KV cache is short, and which tasks give theirs back."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.device import HostStamp
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import ColocatedPolicy, Job, Limits, Stream, make_policy
from sgl_flowprefill.profiling.steps import LinearSteps
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


def test_a_retracted_stream_that_does_not_fit_lets_others_start_in_the_end_and_starts_when_it_fits() -> None:
    requests = [SimulatedRequest("back", 0.0, 100, 2.0), SimulatedRequest("urgent", 0.5, 100, 60.0)]
    device = SimulatedDevice(0, HostCosts(0.0, 0.0, 0.0, 0.0, 0.0))
    server = SimulatedServer(device, Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), requests)
    hub, engine = server.hub, server.engine
    hub.work.policy.limits, hub.stall_check_s = Limits(16, 1), math.inf
    arrived, make_batch = engine.arrived, engine.make_batch
    asked: list[str] = []
    has_room = False

    def admit(reqs: Any) -> Any:
        asked.append(reqs[0].rid)
        return make_batch(reqs) if has_room or reqs[0].rid == "urgent" else None

    engine.arrived = lambda: (one._replace(retracted=one.req.rid == "back") for one in arrived())  # type: ignore[method-assign]
    engine.make_batch = admit  # type: ignore[method-assign]
    for now_s in (1.0, 1.5, 1.9):
        device.now_s = now_s
        assert hub.next_task() is None
    assert asked == ["back"], "nobody takes what may be freed for it"
    device.now_s, has_room = 2.0, True
    assert hub.next_task().rids == ["urgent"]  # type: ignore[union-attr]
    server.run_all()
    assert asked == ["back", "urgent", "back"]
    assert all(request.answered_s < math.inf for request in requests)


@pytest.mark.parametrize(("tokens", "starts"), [(10, True), (1000, False)])
def test_who_comes_while_kv_cache_is_short_for_another_starts_if_it_needs_less(tokens: int, starts: bool) -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 60.0), SimulatedRequest("comes", 1.0, tokens, 5.0)]
    device = SimulatedDevice(0, HostCosts())
    server = SimulatedServer(device, Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), requests)
    hub, make_batch = server.hub, server.engine.make_batch
    asked: list[str] = []

    def admit(reqs: Any) -> Any:
        asked.append(reqs[0].rid)
        return None if reqs[0].tokens >= 1000 else make_batch(reqs)

    server.engine.make_batch = admit  # type: ignore[method-assign]
    hub.stall_check_s = math.inf
    assert hub.next_task() is None
    device.now_s = 1.0
    assert (hub.next_task() is not None) == starts
    assert asked == (["long", "comes"] if starts else ["long"])


def test_others_start_once_the_turn_of_a_retracted_stream_is_over_although_a_prefill_runs_without_an_event() -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 100.0), SimulatedRequest("back", 1.0, 100, 2.0)]
    requests.append(SimulatedRequest("urgent", 1.5, 10, 10.0))
    model = Model(100, lambda tokens: tokens * 5e-5, lambda tokens: tokens * 5e-5)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests)
    engine = server.engine
    arrived, make_batch = engine.arrived, engine.make_batch
    engine.arrived = lambda: (one._replace(retracted=one.req.rid == "back") for one in arrived())  # type: ignore[method-assign]

    def admit(reqs: Any) -> Any:
        long_runs = any(task.rids == ["long"] for task in server.hub.work.tasks.live)
        return None if reqs[0].rid == "back" and long_runs else make_batch(reqs)

    engine.make_batch = admit  # type: ignore[method-assign]
    server.hub.stall_check_s = math.inf
    server.run_all()
    assert 3.0 < requests[2].answered_s < 3.5 < requests[0].answered_s < requests[1].answered_s < math.inf


def giving_back(policy_name: str, max_starvation_s: float) -> Work:
    """Work of which each request takes a second, beside streams."""
    ttft: Any = SimpleNamespace(predict_s=lambda shapes: 1.0, pace=lambda shapes: Pace(1.0))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), max_starvation_s)
    return Work(ColocatedPolicy(policy, LinearSteps(0.01, 0.0, 0.0)), ttft, unlimited, Progress([]), Tasks())


def test_what_a_task_would_give_back_is_what_it_computes_and_not_the_prefix_that_others_have_cached() -> None:
    work = giving_back("fcfs", max_starvation_s=60.0)
    tasks = []
    for number, shape in enumerate((PrefillShape(200, 8000), PrefillShape(6000, 0))):
        job = work.add(Arrival(number, range(100), shape, 0.0, 100.0, 0.0))
        task = work.start(0.0, job, None, [number], [shape], None)
        task.spans = [(HostStamp(0.0), HostStamp(0.1))]
        tasks.append(task)
    assert work.to_give_back(0.0, 1000) == [tasks[1]]
    assert work.to_give_back(0.0, 6001) == [tasks[1], tasks[0]]


def test_a_request_whose_prefill_is_given_back_keeps_its_turn_and_counts_once_among_what_arrives() -> None:
    work, shape = giving_back("feasible", max_starvation_s=10.0), PrefillShape(100)

    def come(rid: str, deadline_s: float, number: int | None = None) -> Job[WaitingRequest]:
        return work.add(Arrival(rid, range(100), shape, 0.0, deadline_s, 0.0, number=number))

    first, _, urgent = come("first", 5.0), come("second", 5.0), come("urgent", 1e6)
    assert work.policy.pick(60.0, None) is first
    task = work.start(60.0, first, None, ["first"], [shape], None)
    work.end(task)
    again = come("first", 5.0, task.members[0].number)
    assert again.item.number == again.number == first.number
    assert first.counted is not None
    assert again.counted is None
    assert work.policy.pick(60.5, None) is again
    work.forget_all_but(["second", "urgent"])
    assert work.policy.pick(61.0, None) is urgent, "the turn is over, and the next one comes later"


def test_a_prefill_gives_its_kv_cache_back_once_unless_streams_could_not_be_retracted_in_its_place() -> None:
    work, shape = giving_back("fcfs", max_starvation_s=60.0), PrefillShape(100)
    streams = [Stream(1.0, 100, 0.0) for _ in range(2)]
    work.colocated.joined(streams)
    arrival = Arrival("a", range(100), shape, 0.0, 9.0, 0.0)
    waiting = [work.add(arrival), work.add(arrival._replace(req="b", number=7))]
    fresh, again = (work.start(0.0, job, None, [job.item.req], [shape], None) for job in waiting)
    assert work.to_give_back(0.0, 1000) == [fresh, again], "the streams have nothing that nobody shares"
    work.colocated.began(0.0)
    work.colocated.stepped(0.01)
    assert work.to_give_back(0.0, 1000) == [fresh]
    work.end(fresh)
    assert work.to_give_back(0.0, 1000) == []
    assert work.to_unwind(0.0) == [], "it has not run"
    again.has_run = True
    assert work.to_unwind(0.0) == [again], "no stream could give device memory back"
    work.colocated.left(streams[1:])
    assert work.to_give_back(0.0, 1000) == [again], "the last stream would end with an error"
