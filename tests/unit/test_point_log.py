"""Operators and tiles of prefills: in the event log where somebody asks for them, and in the timeline made of it."""

from __future__ import annotations

from io import BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from sgl_flowprefill.bench.metrics.event_log import summarise_log
from sgl_flowprefill.events import (
    AnyEvent,
    Complete,
    Points,
    Ready,
    RecentEvents,
    Resume,
    Suspend,
    decode_events,
    read_events,
)
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.point_log import MOST_POINTS, PointLog
from sgl_flowprefill.timeline import History
from sgl_flowprefill.timeline.trace import write_trace
from tests.simulated_device import HostCosts, Model, SimulatedDevice, SimulatedRequest, SimulatedServer
from tests.told import arrival, complete, start, suspend
from tests.trace_processor import trace_processor

LAYERS: Final = 4
NAMES: Final = [f"{layer}.{module}" for layer in range(LAYERS) for module in ("attn", "mlp")]
PROGRESS: Final = Progress([True, False] * LAYERS, NAMES)

SUSPENDED: Final[list[AnyEvent]] = [
    arrival(10.0, "long", 20.0),
    Ready(10.02, "long", 10.01, 1000, 0, 1.0),
    start(10.1, 0, "long"),
    Points(10.4, 0, ["0.attn", "", "", "0.mlp"], [10.2, 10.25, 10.3, 10.35]),
    arrival(10.45, "short", 11.0),
    Ready(10.46, "short", 10.45, 1000, 0, 0.1),
    Points(10.505, 0, [""], [10.5]),
    suspend(10.51, 0, "long", "short", readable_s=10.45),
    start(10.51, 1, "short"),
    Points(10.6, 1, ["0.attn"], [10.55]),
    complete(10.6, 1, "short"),
    Resume(10.6, 0, ["long"], 2),
    Points(11.0, 0, ["", "1.attn"], [10.7, 10.9]),
    complete(11.0, 0, "long"),
]
"""A prefill is suspended behind the first tile of its second attention."""


def prefill(number: int) -> PrefillTask:
    return PrefillTask(number, None, [], [], 0.0, deadline_s=9.0, predicted_s=1.0)


def test_each_point_is_told_once_in_events_of_bounded_length_and_none_of_an_exploration(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    executor, task = Executor(SimpleNamespace(), lambda: False), prefill(7)
    executor.point_log = PointLog(recorder, PROGRESS)
    executor.running = prefill(NO_TASK)
    executor.checkpoint()
    executor.point_log.stopped(executor.running)
    executor.running = task
    for _ in range(MOST_POINTS):
        executor.between_tiles()
        executor.checkpoint()
    executor.checkpoint()
    executor.point_log.stopped(task)
    executor.point_log.stopped(task)
    recorder.flush()
    told: list[Any] = list(read_events(tmp_path / "events.jsonl"))
    assert [(event.kind, event.task, len(event.after)) for event in told] == [
        ("points", 7, MOST_POINTS),
        ("points", 7, MOST_POINTS),
        ("points", 7, 1),
    ]
    after = [name for event in told for name in event.after]
    assert after[1::2] == (MOST_POINTS * NAMES)[:MOST_POINTS]
    assert set(after[:-1:2]) == {""}, "tiles have no name of their own"
    assert after[-1] == NAMES[MOST_POINTS % len(NAMES)]
    times_s = [time_s for event in told for time_s in event.passed_s]
    assert all(before <= later for before, later in pairwise(times_s))


def test_points_do_not_take_the_place_of_what_is_kept_in_memory(tmp_path: Path) -> None:
    recent = RecentEvents(2)
    recorder = EventRecorder(tmp_path / "events.jsonl", recent=recent)
    recorder.write(Ready, 10.0, "r", 9.9, 1000, 0, 1.0)
    for _ in range(3):
        recorder.write(Points, 10.1, 0, ["0.attn"], [10.05])
    recorder.write(Resume, 10.2, 0, ["r"], 1)
    recorder.flush()
    kept = decode_events(recent.since(0, 10)[2])
    assert [event.kind for event in kept] == ["ready", "resume"]
    written = [event.kind for event in read_events(tmp_path / "events.jsonl")]
    assert written == ["ready", *3 * ["points"], "resume"]


def test_points_are_told_before_what_stops_the_prefill_and_all_of_them_by_its_end(tmp_path: Path) -> None:
    requests = [SimulatedRequest("long", 0.0, 1000, 100.0), SimulatedRequest("urgent", 0.035, 100, 0.2)]
    model = Model(LAYERS, lambda tokens: tokens * 1e-5, lambda tokens: tokens * 1e-5)
    server = SimulatedServer(SimulatedDevice(0, HostCosts()), model, requests)
    recorder = EventRecorder(tmp_path / "events.jsonl")
    server.hub.recorder = recorder
    executor: Any = server.hub.executor
    executor.point_log = PointLog(recorder, PROGRESS)
    server.run_all()
    recorder.flush()
    passed: dict[int, list[str]] = {}
    seen = {"suspend": 0, "complete": 0}
    for event in read_events(tmp_path / "events.jsonl"):
        if isinstance(event, Points):
            passed.setdefault(event.task, []).extend(event.after)
        elif isinstance(event, Suspend | Complete):
            seen[event.kind] += 1
            assert passed[event.task] == NAMES[: event.checkpoint]
    assert seen == {"suspend": 1, "complete": 2}


def test_the_timeline_has_modules_and_tiles_inside_of_what_ran() -> None:
    trace = BytesIO()
    write_trace([("it", History.of(SUSPENDED))], trace)
    with trace_processor(trace.getvalue()) as perfetto:
        assert perfetto.query("SELECT name, value FROM stats WHERE severity != 'info' AND value > 0") == []
        inside = perfetto.query(
            "SELECT one.name AS what, around.name AS inside, one.ts / 1000000 AS begin_ms, one.dur / 1000000 AS ms "
            "FROM slice AS one JOIN slice AS around ON one.parent_id = around.id "
            "WHERE one.name IN ('0.attn', '0.mlp', '1.attn', 'tile') ORDER BY one.ts, one.dur DESC"
        )
    assert inside == [
        ("0.attn", "running", 10100, 100),
        ("0.mlp", "running", 10200, 150),
        ("tile", "0.mlp", 10200, 50),
        ("tile", "0.mlp", 10250, 50),
        ("tile", "0.mlp", 10300, 50),
        ("1.attn", "running", 10350, 150),
        ("0.attn", "running", 10510, 40),
        ("1.attn", "running", 10600, 300),
        ("tile", "1.attn", 10600, 100),
        ("tile", "1.attn", 10700, 200),
    ]


def test_points_change_no_figure_and_no_other_track() -> None:
    without = [event for event in SUSPENDED if not isinstance(event, Points)]
    assert summarise_log(SUSPENDED) == summarise_log(without)
    for one, same in zip(History.of(SUSPENDED).tasks, History.of(without).tasks, strict=True):
        assert one.parts == same.parts
        assert list(same.modules(same.parts[0])) == []
