"""What the hub does, as metrics count it: on the simulated device, with the recorder of servers."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from sgl_flowprefill.hub.device import HostStamp
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer
from tests.unit.test_metrics_table import LABELS, samples

OPERATOR_S = 1e-3
LAYERS = 20
DECISION_S = 100e-6
COSTS = HostCosts(decision_s=DECISION_S)
TOKEN_BYTES = 1000.0


class Measured:
    """A server on the simulated device whose recorder has metrics."""

    def __init__(self, requests: list[SimulatedRequest]) -> None:
        model = Model(LAYERS, lambda tokens: tokens * OPERATOR_S / 100, lambda tokens: tokens * OPERATOR_S / 100)
        self.server = SimulatedServer(SimulatedDevice(0, COSTS), model, requests)
        self.registry = CollectorRegistry()
        self.recorder = EventRecorder(None, Metrics(LABELS, registry=self.registry))
        self.recorder.watch(self.server.hub.work, TOKEN_BYTES)
        self.server.hub.recorder = self.recorder

    def samples(self) -> dict[str, float]:
        return {name.removeprefix("flowprefill:"): value for name, value in samples(self.registry).items()}


def test_a_preemption_counts_with_how_long_it_blocked_and_the_suspended_prefill_with_how_long() -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 100.0), SimulatedRequest("urgent", 0.1, 100, 0.2)]
    measured = Measured(requests)
    measured.server.run_all()
    measured.recorder.flush()
    found = measured.samples()
    assert found["preemptions_total"] == found["blocking_seconds_count"] == found["stop_wait_seconds_count"] == 1
    assert 0 < found["stop_wait_seconds_sum"] < found["blocking_seconds_sum"]
    assert found["stop_wait_seconds_sum"] < 10 * OPERATOR_S + HostCosts.launch_s, "the rest of an operator"
    assert found["suspension_seconds_count"] == 1
    assert found["suspension_seconds_sum"] == pytest.approx(2 * LAYERS * OPERATOR_S, rel=0.2), "while the other ran"
    assert found["forward_seconds_total"] == pytest.approx(2 * LAYERS * OPERATOR_S * 11, rel=0.05)


def test_a_suspended_prefill_that_is_run_to_its_end_before_the_weights_change_goes_on() -> None:
    requests = [("long", 0.0, 1000, 100.0), ("urgent", 0.1, 500, 0.5), ("later", 0.12, 100, 200.0)]
    measured = Measured([SimulatedRequest(*request) for request in requests])
    hub = measured.server.hub
    hub.turn()
    hub.turn()
    assert hub.work.tasks.running is hub.work.tasks.live[1], "the other one is suspended"
    hub.finish_started()
    assert not hub.work.tasks
    measured.recorder.flush()
    assert measured.samples()["suspension_seconds_count"] == 1


def test_an_event_costs_what_the_hub_takes_from_a_stop_to_what_runs_next() -> None:
    measured = Measured([SimulatedRequest("long", 0.0, 1000, 100.0), SimulatedRequest("urgent", 0.1, 100, 0.2)])
    measured.server.run_all()
    measured.recorder.flush()
    found = measured.samples()
    events = found["scheduling_event_seconds_count"]
    assert events == 4, "a start, a preemption, the other's end, after which the first goes on, and the other's result"
    expected_s = events * DECISION_S + 2 * COSTS.admission_s + COSTS.finish_s
    assert found["scheduling_event_seconds_sum"] == pytest.approx(expected_s)


def test_gauges_show_what_is_suspended_and_what_waits() -> None:
    requests = [SimulatedRequest("long", 0.0, 10_000, 100.0), SimulatedRequest("urgent", 0.7, 2000, 1.5)]
    requests += [SimulatedRequest("late", 0.8, 2000, 1e-3), SimulatedRequest("lax", 0.8, 500, 90.0)]
    requests.append(SimulatedRequest("tightest", 1.4, 600, 0.4))
    measured = Measured(requests)
    shown = []
    while measured.server.hub.turn():
        found = measured.samples()
        shown.append(
            (
                found["num_suspended_tasks"],
                found["suspended_bytes"],
                found["num_queue_reqs{state=feasible}"],
                found["num_queue_reqs{state=infeasible}"],
            )
        )
    assert shown[0] == (0, 0, 0, 0)
    assert (2, 12_000 * TOKEN_BYTES, 1, 1) in shown, "both long ones for the tightest, while the others wait"
    measured.recorder.flush()
    found = measured.samples()
    assert found["num_suspended_tasks"] == found["suspended_bytes"] == found["oldest_suspended_seconds"] == 0
    assert found["num_queue_reqs{state=feasible}"] == found["num_queue_reqs{state=infeasible}"] == 0


class Req:
    """What the recorder reads of SGLang's Req."""

    bootstrap_room = 7

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.origin_input_ids = self.origin_input_ids_unpadded = [1, 2, 3]


def test_requests_that_cannot_be_run_yet_are_not_ready_and_refused_ones_are_shed() -> None:
    measured = Measured([])
    reqs = [Req(f"{number}") for number in range(4)]
    for req in reqs:
        measured.recorder.arrived(req, time.monotonic(), Objective(5.0, 0.1, "chat"))
    waiting = WaitingRequest(reqs[0], 0, [1, 2, 3], PrefillShape(2, 1), readable_s=1.5, logprob_rows=0)
    measured.recorder.ready(Job(waiting, 1.0, 6.0, 0.25))
    measured.recorder.answered(reqs[1], "The request queue is full.", 503)
    measured.recorder.flush()
    found = measured.samples()
    assert found["num_queue_reqs{state=not_ready}"] == 2
    assert found["num_shed_requests_total{slo_class=chat}"] == 1
    assert found["ttft_slo_missed_total{slo_class=chat,cause=failed}"] == 1


def test_time_in_forward_passes_counts_once_when_a_prefill_goes_on_and_however_it_ends() -> None:
    registry = CollectorRegistry()
    recorder = EventRecorder(None, Metrics(LABELS, decodes=True, registry=registry), decodes=True)

    def task(number: int, ran_s: float) -> Any:
        return SimpleNamespace(
            id=number, rids=[], reqs=[], operators_passed=3, has_run=True, spans=[(HostStamp(0.0), HostStamp(ran_s))]
        )

    def counted_s() -> float:
        recorder.flush()
        return samples(registry)["flowprefill:forward_seconds_total"]

    suspended, failed, given_back = task(0, 1.0), task(1, 10.0), task(2, 100.0)
    for _ in range(2):
        recorder.resumed(suspended, 5.0)
    assert counted_s() == 1.0
    suspended.spans.append((HostStamp(5.0), HostStamp(8.0)))
    recorder.dropped(suspended)
    assert counted_s() == 4.0
    recorder.failed(failed, Failure.of(ValueError("it fails"), 3, []))
    assert counted_s() == 14.0
    recorder.given_back(given_back)
    assert counted_s() == 114.0


class QueuedStamp:
    """A place in the queue of a device that may not have got there."""

    def __init__(self, time_s: float) -> None:
        self.time_s = time_s
        self.is_passed = False

    def seconds_until(self, later: QueuedStamp) -> float:
        assert later.is_passed, "the device would be waited for"
        return later.time_s - self.time_s


@pytest.mark.parametrize("counts", ["at rest", "when another one is done"])
@pytest.mark.parametrize("end", ["dropped", "given back", "failed"])
def test_the_device_is_not_waited_for_when_a_prefill_is_unwound_and_its_time_counts_once(end: str, counts: str) -> None:
    registry = CollectorRegistry()
    recorder = EventRecorder(None, Metrics(LABELS, decodes=True, registry=registry), decodes=True)
    first, last = (QueuedStamp(0.0), QueuedStamp(2.0)), (QueuedStamp(5.0), QueuedStamp(8.0))
    task: Any = SimpleNamespace(id=0, rids=[], reqs=[], operators_passed=3, has_run=True, spans=[first])
    first[1].is_passed = True
    recorder.resumed(task, 5.0)
    task.spans.append(last)
    if end == "dropped":
        recorder.dropped(task)
    elif end == "given back":
        recorder.given_back(task)
    else:
        recorder.failed(task, Failure.of(ValueError("it fails"), 3, []))
    last[1].is_passed = True
    if counts != "at rest":
        other: Any = SimpleNamespace(
            id=1, rids=[], reqs=[], operators_passed=9, spans=[], executed_s=0.0, predicted_s=1.0
        )
        prediction: Any = SimpleNamespace(expected_s=1.0, raw_s=1.0)
        recorder.completed(other, prediction)
        last[1].is_passed = False
    for _ in range(2):
        recorder.flush()
        assert samples(registry)["flowprefill:forward_seconds_total"] == 5.0


def test_a_switch_that_no_news_led_to_is_no_preemption() -> None:
    measured = Measured([])
    task: Any = SimpleNamespace(
        id=0,
        rids=["a"],
        operators_passed=3,
        tiles_passed=0,
        readable_s=1.0,
        has_run=True,
        new_tokens=10,
        spans=[],
    )
    measured.recorder.suspended(task, task, stopped_s=4.9, now_s=5.0, news_readable_s=float("inf"))
    measured.recorder.resumed(task, 6.0)
    measured.recorder.flush()
    found = measured.samples()
    assert found["preemptions_total"] == found["blocking_seconds_count"] == 0
    assert found["suspension_seconds_sum"] == pytest.approx(1.1)
    assert found["num_suspended_tasks"] == 0, "it goes on"
