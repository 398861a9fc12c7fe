"""What FlowPrefill writes into the traces of requests; tests/servers/test_traces.py has the traces of a server."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.request_spans import RequestSpans, SpanRecorder
from sgl_flowprefill.ttft import PrefillShape

Written = tuple[str, float, float]


class TimeStats:
    """SGLang's, which keeps the slices that it is to write."""

    def __init__(self) -> None:
        self.written: list[Written] = []
        self.attributes: list[dict[str, Any]] = []

    def trace_slice(self, stage: Any, begin_s: float, end_s: float, attributes: dict[str, Any]) -> None:
        self.written.append((stage.stage_name.removeprefix("flowprefill_"), begin_s, end_s))
        self.attributes.append(attributes)


class Req:
    """What is read of SGLang's Req."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.time_stats = TimeStats()


def task(number: int, *rids: str) -> PrefillTask:
    shape = PrefillShape(1000, 0)
    members = [WaitingRequest(Req(rid), number, [1, 2, 3], shape, 0.0, 0) for rid in rids]
    return PrefillTask(number, None, members, [shape] * len(members), 0.0, deadline_s=10.0, predicted_s=2.0)


def written(of: PrefillTask) -> list[Written]:
    stats: TimeStats = of.reqs[0].time_stats
    return stats.written


def test_a_prefill_runs_is_suspended_for_others_and_goes_on() -> None:
    spans, long, urgent = RequestSpans(), task(0, "long"), task(1, "urgent", "joins it")
    spans.run(long, 1.0)
    long.operators_passed = 7
    spans.suspend(long, urgent, 2.0)
    spans.run(urgent, 2.25)
    spans.end(urgent, 3.0)
    spans.run(long, 3.5)
    spans.end(long, 4.0)
    assert written(long) == [("run", 1.0, 2.0), ("suspended", 2.0, 3.5), ("run", 3.5, 4.0)]
    assert long.reqs[0].time_stats.attributes == [
        {"task": 0, "requests": 1, "slack_s": 7.0},
        {"for_rids": ["urgent", "joins it"], "checkpoint": 7},
        {"task": 0, "requests": 1, "slack_s": 4.5},
    ]
    for req in urgent.reqs:
        assert req.time_stats.written == [("run", 2.25, 3.0)]
    assert len(spans) == 0


def test_a_prefill_that_is_done_ends_when_another_runs_though_its_result_comes_later() -> None:
    spans, first, second = RequestSpans(), task(0, "first"), task(1, "second")
    spans.run(first, 1.0)
    spans.run(second, 2.0)
    spans.end(first, 2.5)
    spans.end(second, 3.0)
    assert written(first) == [("run", 1.0, 2.0)]
    assert written(second) == [("run", 2.0, 3.0)]


def test_decode_steps_are_in_the_trace_of_the_prefill_that_lets_them_by_and_in_no_other() -> None:
    spans, runs, waits = RequestSpans(), task(0, "runs"), task(1, "waits")
    spans.step(0.5, 0.75, streams=2)
    spans.run(waits, 1.0)
    spans.suspend(waits, runs, 1.5)
    spans.run(runs, 2.0)
    spans.step(1.75, 2.25, streams=2)
    spans.step(3.0, 3.5, streams=2)
    spans.end(runs, 4.0)
    spans.step(4.0, 4.5, streams=3)
    assert written(runs) == [("decode_step", 2.0, 2.25), ("decode_step", 3.0, 3.5), ("run", 2.0, 4.0)]
    spans.end(waits, 5.0)
    assert written(waits) == [("run", 1.0, 1.5), ("suspended", 1.5, 5.0)]


@pytest.mark.parametrize("end", ["dropped", "given_back", "failed"])
def test_what_does_not_run_to_its_end_has_its_spans(end: str) -> None:
    recorder, one = SpanRecorder(None, decodes=True), task(0, "one")
    recorder.resumed(one, 0.0)
    one.has_run = True
    if end == "failed":
        recorder.failed(one, Failure.of(ValueError("it fails"), 3, one.rids))
    else:
        getattr(recorder, end)(one)
    assert [name for name, _, _ in written(one)] == ["run"]
    assert len(recorder.spans) == 0


def test_an_event_recorder_without_traces_writes_none() -> None:
    recorder, one, other = EventRecorder(None, decodes=True), task(0, "one"), task(1, "other")
    recorder.resumed(one, 0.0)
    recorder.suspended(one, other, 1.0, 1.0, 0.5)
    recorder.dropped(one)
    assert written(one) == []
