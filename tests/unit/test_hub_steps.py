"""Decode steps of the hub, among prefills: when they run, and which requests wait for the streams that get them."""

from __future__ import annotations

import math
from array import array
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import DecodeStep, Tasks
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Act, ColocatedPolicy, DecodeLimits, Limits, Stream, make_policy
from sgl_flowprefill.profiling.steps import LinearSteps
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


class Steps:
    """The decode steps of a hub on the simulated device: 10 ms each."""

    def __init__(self, hub: Any, late: bool) -> None:
        """``late``: their results come when the device has run them; otherwise the host waits."""
        self._hub = hub
        self._late = late
        self.begun_s: list[float] = []

    def step(self) -> DecodeStep:
        device = self._hub.device
        self.begun_s.append(device.now_s)
        self._hub.work.colocated.began(device.now_s)
        device.launch("step", 0.01)
        result = SimpleNamespace(copy_done=None)
        if self._late:
            device.fetch(None, result)
        else:
            device.synchronize()
        return DecodeStep(result)

    def finish_step(self, step: DecodeStep) -> None:
        assert self._hub.device.now_s >= self.begun_s[-1] + 0.01
        self._hub.work.colocated.stepped(self._hub.device.now_s)

    def missing_tokens(self) -> int:
        return 0

    def give_back(self, task: Any) -> None:
        raise AssertionError("nothing is missing")


@pytest.mark.parametrize("late", [False, True])
def test_streams_get_their_steps_while_started_tasks_run_to_their_ends(late: bool) -> None:
    model = Model(100, lambda tokens: 0.01, lambda tokens: 0.01)
    requests = [SimulatedRequest("r", 0.0, 100, 60.0)]
    hub = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests).hub
    hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits(margin_s=0.02))
    hub.decoder = steps = Steps(hub, late)
    hub.executor.interrupted = hub.executor.ends_waiting = hub.has_news  # type: ignore[attr-defined]
    hub.work.colocated.joined([Stream(0.1, 100, 0.0)])
    assert hub.turn()
    [task] = hub.work.tasks.live
    assert 0.06 <= hub.now_s() <= 0.09, "it came back for the step, and ran until then"
    hub.finish_started()
    assert task.done
    assert not hub.work.tasks
    gaps_s = [later - earlier for earlier, later in pairwise(steps.begun_s)]
    assert len(gaps_s) >= 20
    assert max(gaps_s) <= 0.1
    asked = 2 * len(steps.begun_s) if late else len(steps.begun_s)
    assert len(task.spans) <= asked + 2, "it comes back for a step or its result, not at each preemption checkpoint"


def test_kv_cache_that_a_step_frees_is_used_at_once() -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    request = SimulatedRequest("r", 0.0, 100, 60.0)
    server = SimulatedServer(SimulatedDevice(2, HostCosts()), model, [request])
    hub, engine, stream = server.hub, server.engine, Stream(0.1, 100, 0.0)
    colocated = hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits())
    make_batch = engine.make_batch
    freed: list[bool] = []

    class LastStep(Steps):
        def finish_step(self, step: DecodeStep) -> None:
            colocated.stepped(hub.now_s(), [stream])
            freed.append(True)

    engine.make_batch = lambda reqs: None if colocated.streams.requests else make_batch(reqs)  # type: ignore[method-assign, assignment, return-value]
    engine.take_news = lambda stalls_due: bool(freed and freed.pop())  # type: ignore[method-assign]
    hub.decoder = LastStep(hub, late=True)
    colocated.joined([stream])
    for _ in range(20):
        if request.answered_s < math.inf:
            return
        assert hub.turn(), "it sleeps, although there is KV cache for what waits"
    raise AssertionError("the request is not answered")


@pytest.mark.parametrize("streams", [1, 2])
def test_a_step_that_lacks_kv_cache_waits_for_the_result_of_a_prefill_where_no_stream_can_give_up_its_own(
    streams: int,
) -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    request = SimulatedRequest("r", 0.0, 100, 60.0)
    hub = SimulatedServer(SimulatedDevice(2, HostCosts()), model, [request]).hub
    colocated = hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.0, 0.0), DecodeLimits())

    class Short(Steps):
        def missing_tokens(self) -> int:
            return len(hub.work.tasks.finishing)

    hub.decoder = steps = Short(hub, late=True)
    colocated.joined([Stream(0.1, 100, 0.0) for _ in range(streams)])
    colocated.began(0.0)
    colocated.stepped(0.0)
    while not hub.work.tasks.finishing:
        assert hub.turn()
    assert request.answered_s == math.inf
    hub.step()
    assert (request.answered_s <= steps.begun_s[0]) == (streams == 1)


@pytest.mark.parametrize(
    ("policy_name", "waited_s", "passed_over"),
    [("feasible", 0.0, True), ("s-edf", 0.0, True), ("feasible", 70.0, False), ("fcfs", 0.0, False)],
)
def test_small_requests_do_not_wait_for_streams_to_end_with_one_that_may_not_join_them_unless_it_has_starved(
    policy_name: str, waited_s: float, passed_over: bool
) -> None:
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: 1e-3 * sum(shape.new_tokens for shape in shapes), pace=lambda shapes: Pace(1.0)
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(0.030, 3e-4, 4e-7), DecodeLimits())
    work = Work(colocated, ttft, unlimited, Progress([]), Tasks())
    streams = [Stream(0.1, 1000, 0.0) for _ in range(60)]
    colocated.joined(streams)  # 72 ms a step of the 90 that it may take
    work.add(Arrival("large", array("q", range(200)), PrefillShape(200, 100_000), 0, 5.0, 0.0))
    work.add(Arrival("small", array("q", range(300)), PrefillShape(300, 0), 1, 100.0, 0.0))
    work.add(Arrival("least", array("q", range(100)), PrefillShape(100, 0), 2, 101.0, 0.0))
    colocated.began(waited_s)  # so that the steps' own turn is not the question

    def chosen() -> list[str]:
        choice = work.choose(waited_s, admit=True, last=False)
        return [job.item.req for job in choice] if isinstance(choice, list) else []

    for _ in range(3):
        assert chosen() == (["small"] if passed_over else [])
        assert policy.first_waiting(waited_s, 1)[0].item.req == "large"
    colocated.left(streams[15:])
    assert chosen() == ["large"]


@pytest.mark.parametrize(
    ("policy_name", "waited_s", "retracted", "waits"),
    [
        ("feasible", 0.0, False, True),
        ("feasible", 0.0, True, False),
        ("feasible", 70.0, False, False),
        ("fcfs", 0.0, False, False),
    ],
    ids=["", "was a stream", "has starved", "is in line"],
)
def test_a_request_waits_for_a_load_of_streams_at_which_its_own_objective_holds_unless_others_would_wait_for_it(
    policy_name: str, waited_s: float, retracted: bool, waits: bool
) -> None:
    ttft: Any = SimpleNamespace(
        predict_s=lambda shapes: 1e-3 * sum(shape.new_tokens for shape in shapes), pace=lambda shapes: Pace(1.0)
    )
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    policy = make_policy(policy_name, Limits(16, 1), 60.0)
    colocated = ColocatedPolicy(policy, LinearSteps(0.030, 3e-4, 0.0), DecodeLimits())
    work = Work(colocated, ttft, unlimited, Progress([]), Tasks())
    streams = [Stream(1.0, 1000, 0.0) for _ in range(60)]
    colocated.joined(streams)  # with one more, 48.3 ms a step
    tight = Arrival("tight", array("q", range(200)), PrefillShape(200, 0), 0.0, 5.0, 0.0)
    work.add(tight._replace(retracted=retracted, objective=Objective(5.0, 0.05)))
    lax = Arrival("lax", array("q", range(300)), PrefillShape(300, 0), 0.0, 100.0, 0.0)
    work.add(lax._replace(objective=Objective(100.0, 1.0)))
    colocated.began(waited_s)  # so that the steps' own turn is not the question

    def chosen() -> list[str]:
        choice = work.choose(waited_s, admit=True, last=False)
        return [job.item.req for job in choice] if isinstance(choice, list) else []

    assert chosen() == (["lax"] if waits else ["tight"])
    colocated.left(streams[45:])  # 43.8 ms a step, of 45
    assert chosen() == ["tight"]


def test_a_prefill_whose_result_is_on_its_way_counts_among_the_streams_to_come() -> None:
    model = Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3)
    requests = [SimulatedRequest(f"r{number}", 0.0, 100, 60.0) for number in range(2)]
    hub = SimulatedServer(SimulatedDevice(2, HostCosts()), model, requests).hub
    hub.work.colocated = ColocatedPolicy(hub.work.policy, LinearSteps(0.01, 0.012, 0.0), DecodeLimits(margin_s=0.0))
    hub.work.colocated.joined([Stream(0.1, 100, 0.0) for _ in range(5)])  # 82 ms a step with one more, of 90
    assert hub.turn()
    assert [task.rids for task in hub.work.tasks.prefills] == [["r0"]]
    assert not hub.work.tasks.live
    assert hub.work.choose(hub.now_s(), admit=True, last=True) is Act.STEP
