"""What the hub learns of how long prefills take, and what follows it: paces, predictions, tiles, batches."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.device import HostStamp
from sgl_flowprefill.hub.parts import Learning
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.shedding import Shedding
from sgl_flowprefill.hub.task import PrefillTask, Tasks
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.hub.work import Work
from sgl_flowprefill.policy import ColocatedPolicy, Limits, make_policy
from sgl_flowprefill.runtime.memory import Activations, TaskMemory
from sgl_flowprefill.ttft import YARDSTICK, AdaptiveTTFT, PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer


def test_tasks_with_log_probabilities_of_prompts_say_nothing_of_how_long_prefills_take() -> None:
    ttft = AdaptiveTTFT(0.5, SimpleNamespace(predict_s=lambda batch: 0.1))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    work = Work(ColocatedPolicy(make_policy("fcfs", Limits(16, 1), 60.0)), ttft, unlimited, Progress([]), Tasks())

    def run(logprob_rows: int) -> None:
        shape = PrefillShape(100)
        request = WaitingRequest("r", 0, range(100), shape, 0.0, logprob_rows)
        task = PrefillTask(0, None, [request], [shape], 0.0, 1.0, 0.1, spans=[(HostStamp(0.0), HostStamp(0.5))])
        assert work.observe(task).raw_s == 0.1

    for _ in range(20):
        run(logprob_rows=100)
    assert ttft.correction == 1.0
    for _ in range(20):
        run(logprob_rows=0)
    assert ttft.correction == pytest.approx(5.0)


def test_a_task_that_took_twice_as_long_is_seen_by_what_waits_and_by_what_is_suspended() -> None:
    model = SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch))
    ttft = AdaptiveTTFT(0.5, model)
    small, large = [PrefillShape(100)], [PrefillShape(2000)]
    waiting, suspended = ttft.pace(small), ttft.pace(large)
    assert not ttft.follow()
    for _ in range(40):
        ttft.observe(small, 0.2)
    assert ttft.follow()
    assert waiting.factor == pytest.approx(2.0)
    assert suspended.factor == pytest.approx(2.0)
    for _ in range(40):
        ttft.observe(small, 0.202)
    assert not ttft.follow(), "one percent is not worth to look at all again"
    assert waiting.factor == pytest.approx(2.0)


@pytest.mark.parametrize(("took_s", "slo_s", "was_infeasible"), [(0.5, 0.3, False), (0.02, 0.05, True)])
def test_what_waits_can_be_met_or_not_by_how_long_tasks_took_as_soon_as_they_end(
    took_s: float, slo_s: float, was_infeasible: bool
) -> None:
    ttft = AdaptiveTTFT(0.5, SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch)))
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    work = Work(ColocatedPolicy(make_policy("s-edf", Limits(16, 1), 60.0)), ttft, unlimited, Progress([]), Tasks())
    shape = PrefillShape(100)
    waits = work.add(Arrival(-1, range(100), shape, 0.0, slo_s, 0.0))
    work.policy.pick(0.0, None)
    assert waits.remaining_s == pytest.approx(0.1)
    assert work.policy.infeasible_waiting == was_infeasible
    for number in range(20):
        winner = work.add(Arrival(number, range(100), shape, 0.0, slo_s, 0.0))
        task = work.start(0.0, winner, None, [number], [shape], None)
        task.spans.append((HostStamp(0.0), HostStamp(took_s)))
        work.end(task)
        work.observe(task)
        work.computed(task)
    assert waits.remaining_s == pytest.approx(took_s)
    work.policy.pick(0.0, None)
    assert work.policy.infeasible_waiting == (not was_infeasible)


def test_all_that_waits_or_is_suspended_is_predicted_by_the_model_that_is_adopted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sgl_flowprefill.hub.work.PREDICTED_AT_ONCE", 15)
    wrong = SimpleNamespace(predict_s=lambda batch: 1e-3 * sum(shape.new_tokens for shape in batch))
    right = SimpleNamespace(predict_s=lambda batch: sum(2e-4 * new + 4e-7 * new**2 for new, _ in batch))
    ttft = AdaptiveTTFT(0.5, wrong)
    unlimited: Any = TaskMemory(Activations(1, 1, 1, None), math.inf)
    colocated = ColocatedPolicy(make_policy("feasible", Limits(16, 1), 60.0))
    shedding = Shedding()
    work = Work(colocated, ttft, unlimited, Progress([True, False] * 4), Tasks(), shedding=shedding)
    shapes = [PrefillShape(100 + 400 * number) for number in range(21)]
    jobs = [work.add(Arrival(number, range(10), shape, 0.0, 100.0, 0.0)) for number, shape in enumerate(shapes)]
    suspended = work.start(0.0, jobs.pop(), None, [20], shapes[20:], None)
    suspended.has_run, suspended.operators_passed = True, 2
    work.update(suspended)
    for _ in range(40):
        ttft.observe([PrefillShape(600)], right.predict_s([PrefillShape(600)]))
    work.follow()
    assert jobs[0].remaining_s > 1.5 * right.predict_s(shapes[:1]), "so far, short prompts seem long"
    assert jobs[19].remaining_s < right.predict_s(shapes[19:20]) / 2, "and long ones short"

    ttft.replace(right)
    work.adopted()
    expected_s = [right.predict_s([shape]) for shape in shapes]
    former_s = [job.remaining_s for job in jobs]
    work.predict_some()
    assert [job.remaining_s for job in jobs] == pytest.approx([*expected_s[:15], *former_s[15:]]), (
        "an event does a part"
    )
    work.predict_some()
    work.predict_some()
    assert [job.remaining_s for job in jobs] == pytest.approx(expected_s[:20])
    assert suspended.predicted_s == pytest.approx(expected_s[20])
    assert suspended.job.remaining_s == pytest.approx(0.75 * expected_s[20]), "two of eight operators have run"
    assert shedding.backlog.work_s == pytest.approx(sum(expected_s[:20]) + 0.75 * expected_s[20])
    assert sorted(job.number for job in work.policy.waiting) == list(range(20))
    assert list(work.policy.started) == [suspended.job]


class ToldTiles:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.yardsticks_s: list[float] = []

    def follow(self, yardstick_s: float) -> None:
        self.yardsticks_s.append(yardstick_s)


class OneOffer(Learning):
    """Has a better model to offer, once it is told so."""

    def __init__(self) -> None:
        self.has_offer = False

    def look_for_offer(self) -> bool:
        return self.has_offer

    def adopt(self) -> None:
        self.has_offer = False


@pytest.mark.parametrize("wrong", [0.25, 8.0])
def test_tiles_are_told_how_fast_prefills_are_and_not_what_the_profile_says(wrong: float) -> None:
    model = Model(1, lambda tokens: 40e-6 * tokens, lambda tokens: 60e-6 * tokens)
    requests = [SimulatedRequest(f"r{i}", 10.0 * i, 100 + 700 * (i % 5), 100.0) for i in range(100)]
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests)
    profiled = SimpleNamespace(predict_s=lambda batch: wrong * model.forward_s(sum(new for new, _ in batch)))
    server.hub.work.ttft = AdaptiveTTFT(0.75, profiled)
    server.hub.tiles = tiles = ToldTiles()
    server.run_all()
    right_s = model.forward_s(YARDSTICK.new_tokens)
    assert tiles.yardsticks_s[0] == pytest.approx(wrong * right_s)
    assert tiles.yardsticks_s[-1] == pytest.approx(right_s, rel=0.02)


def test_batches_are_as_large_as_the_model_in_use_says() -> None:
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), Model(1, lambda tokens: 1e-3, lambda tokens: 1e-3), [])
    hub, offer = server.hub, OneOffer()
    hub.learning, hub.work.batch_tokens = offer, lambda: 4096
    before = hub.work.policy.limits
    hub.turn()
    assert hub.work.policy.limits == before
    offer.has_offer = True
    hub.turn()
    assert hub.work.policy.limits == replace(before, max_batch_tokens=4096)
