"""Timelines: what event logs tell, put together, and what Perfetto reads of the trace that is made of it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent

from sgl_flowprefill.bench.__main__ import main as bench
from sgl_flowprefill.bench.reports.timeline import bars, busiest_s
from sgl_flowprefill.cluster.cli import EXIT_CANNOT_START, main
from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    EventLog,
    Fail,
    GiveBack,
    Leave,
    Log,
    Ready,
    Resume,
    Step,
    Suspend,
)
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.timeline import History, Request, write_timeline
from sgl_flowprefill.timeline.trace import depths, least_slacks
from tests.told import arrival, complete, start, suspend
from tests.trace_processor import trace_processor


def ready(t_s: float, rid: str, predicted_s: float) -> Ready:
    return Ready(t_s, rid, t_s - 0.01, 1000, 0, predicted_s)


PREEMPTED: list[AnyEvent] = [
    arrival(10.0, "long", 11.5, tokens=3000),
    ready(10.02, "long", 1.0),
    start(10.1, 0, "long"),
    arrival(10.5, "short", 11.0),
    ready(10.52, "short", 0.1),
    suspend(10.53, 0, "long", "short", readable_s=10.51),
    start(10.53, 1, "short", predicted_s=0.1),
    complete(10.63, 1, "short", forward_s=0.1),
    Resume(10.63, 0, ["long"], 7),
    Leave(10.7, "short"),
    complete(11.6, 0, "long", forward_s=1.395),
    Leave(11.8, "long"),
]
"""A prefill server: a long prefill is suspended for a short one, and so misses its objective by a tenth of a second."""


def by_rid(history: History) -> dict[str, Request]:
    return {request.rid: request for request in history.requests}


def doings(parts: Sequence[tuple[str, float, float, object]]) -> list[tuple[str, float, float]]:
    return [(part[0], pytest.approx(part[1]), pytest.approx(part[2])) for part in parts]


def written(path: Path, events: Sequence[AnyEvent]) -> Path:
    log = EventLog(path)
    for event in events:
        log.write(type(event), **msgspec.structs.asdict(event))
    log.flush()
    return path


def test_each_stretch_of_a_suspended_request_is_told() -> None:
    long, short = History.of(PREEMPTED).requests
    assert doings(long.parts) == [
        ("on the way to the scheduler", 9.99, 10.0),
        ("waiting for the decode server", 10.0, 10.01),
        ("waiting", 10.01, 10.1),
        ("running", 10.1, 10.525),
        ("suspended", 10.525, 10.63),
        ("running", 10.63, 11.6),
        ("KV cache is sent", 11.6, 11.8),
    ]
    assert [what for what, *_ in short.parts][2:] == ["waiting", "running", "KV cache is sent"]
    assert long.tasks[0].ran_s == pytest.approx(1.395)
    assert long.others_s == pytest.approx(0.1)
    assert short.others_s == pytest.approx(0.015), "until it had stopped, the long one went on"


def test_a_request_is_in_time_when_its_kv_cache_is_at_the_decode_server() -> None:
    long, short = History.of(PREEMPTED).requests
    assert (short.verdict.met, short.late_s) == (True, pytest.approx(-0.3))
    assert (long.verdict.met, long.late_s) == (False, pytest.approx(0.3))
    assert long.verdict.cause is Cause.MISPREDICTION, "it took 0.4 s longer than predicted"
    events = [
        arrival(10.0, "a", 11.0),
        ready(10.0, "a", 0.5),
        start(10.1, 0, "a"),
        complete(10.9, 0, "a", forward_s=0.5),
    ]
    [sent_late] = History.of([*events, Leave(11.1, "a")]).requests
    assert sent_late.verdict == (False, Cause.TRANSFER)
    [in_time] = History.of([*events, Leave(10.95, "a")]).requests
    assert in_time.verdict == (True, None)
    [lost] = History.of([*events, Leave(10.95, "a", "Decode transfer failed")]).requests
    assert lost.verdict == (False, Cause.FAILED)


def test_on_a_server_that_decodes_the_first_token_is_there_when_the_prefill_is_over() -> None:
    history = History.of(
        [
            arrival(10.0, "a", 11.0),
            ready(10.0, "a", 0.5),
            start(10.1, 0, "a"),
            Step(10.3, 3, 10.2, None),
            complete(10.9, 0, "a", forward_s=0.7),
            Step(12.0, 4, 11.9, None),
            Leave(12.0, "a"),
        ]
    )
    [request] = history.requests
    assert request.verdict == (True, None)
    assert doings(request.parts)[1:] == [
        ("waiting", 10.0, 10.1),
        ("running", 10.1, 10.2),
        ("decode step", 10.2, 10.3),
        ("running", 10.3, 10.9),
        ("decoding", 10.9, 12.0),
    ]
    assert request.steps_s == pytest.approx(0.1)
    assert request.others_s == pytest.approx(0.0)


def test_a_task_that_is_done_runs_until_the_next_one_does_though_its_result_comes_later() -> None:
    history = History.of(
        [
            arrival(10.0, "a", 20.0),
            arrival(10.0, "b", 20.0),
            start(10.1, 0, "a"),
            start(11.0, 1, "b"),
            complete(11.2, 0, "a"),
            complete(12.0, 1, "b"),
        ]
    )
    first, second = history.tasks
    assert (doings(first.parts), first.end_s) == ([("running", 10.1, 11.0)], 11.2)
    assert doings(second.parts) == [("running", 11.0, 12.0)]


def test_a_task_that_gave_back_its_kv_cache_and_a_member_that_left_its_batch() -> None:
    history = History.of(
        [
            arrival(10.0, "stays", 20.0),
            ready(10.0, "stays", 1.0),
            arrival(10.0, "leaves", 20.0),
            ready(10.0, "leaves", 1.0),
            start(10.1, 0, "stays", "leaves"),
            Abort(10.2, ["leaves"]),
            GiveBack(10.4, 0, ["stays", "leaves"], 5),
            ready(10.4, "stays", 1.0),
            start(11.0, 1, "stays"),
            Step(11.5, 1, 11.4, None),
            complete(12.0, 1, "stays"),
            Leave(12.0, "stays"),
        ]
    )
    requests = by_rid(history)
    assert [what for what, *_ in requests["stays"].parts][1:] == [
        "waiting", "running", "waiting", "running", "decode step", "running",
    ]  # fmt: skip
    assert doings(requests["leaves"].parts)[-1] == ("running", 10.1, 10.2)
    assert requests["leaves"].verdict == (None, Cause.ABORTED)
    assert [task.end and task.end.kind for task in history.tasks] == ["give_back", "complete"]


def test_requests_without_a_place_at_the_decode_server_wait_for_it_to_the_end() -> None:
    history = History.of(
        [
            arrival(10.0, "never", 11.0),
            arrival(10.0, "refused", 11.0),
            arrival(10.0, "late", 11.0),
            Fail(10.1, ["refused"], 400, "too long"),
            ready(11.5, "late", 0.1),
            start(11.5, 0, "late"),
            complete(11.6, 0, "late", forward_s=0.1),
            Leave(11.7, "late"),
        ]
    )
    verdicts = {rid: request.verdict for rid, request in by_rid(history).items()}
    assert verdicts == {
        "never": (False, Cause.NOT_READY),
        "refused": (None, Cause.INVALID),
        "late": (False, Cause.NOT_READY),
    }
    assert doings(by_rid(history)["never"].parts)[-1] == ("waiting for the decode server", 10.0, 11.7)


def test_a_server_that_was_started_again_has_lost_what_it_had() -> None:
    history = History.of(
        [
            Log(9.0, "0.1.0", decodes=True),
            arrival(9.5, "decoded", 30.0),
            ready(9.5, "decoded", 0.4),
            start(9.5, 0, "decoded"),
            complete(9.9, 0, "decoded", forward_s=0.4),
            arrival(10.0, "ran", 30.0),
            arrival(10.1, "waited", 30.0),
            ready(10.1, "waited", 1.0),
            start(10.2, 1, "ran"),
            Log(19.0, "0.1.0", decodes=True),
            arrival(19.9, "waits", 30.0),
            arrival(20.0, "warm-up", 30.0),
            start(20.1, 0, "warm-up"),
            complete(20.3, 0, "warm-up", forward_s=0.2),
        ]
    )
    requests = by_rid(history)
    lost_s = {rid: request.lost_s for rid, request in requests.items()}
    assert lost_s == {"decoded": 19.0, "ran": 19.0, "waited": 19.0, "waits": None, "warm-up": None}
    assert doings(requests["waited"].parts)[-1] == ("waiting", 10.1, 19.0)
    assert doings(requests["decoded"].parts)[-1] == ("decoding", 9.9, 19.0)
    assert requests["warm-up"].verdict.met is True
    assert [task.end is None for task in history.tasks] == [False, True, False]


def test_what_a_server_is_is_said_by_its_first_line_and_not_by_what_has_happened_there() -> None:
    computed = [arrival(10.0, "a", 11.0), ready(10.0, "a", 0.5), start(10.1, 0, "a"), complete(10.9, 0, "a")]
    [decodes] = History.of([Log(9.0, "0.1.0", decodes=True), *computed]).requests
    assert decodes.verdict == (True, None), "before its first decode step"
    [prefills] = History.of([Log(9.0, "0.1.0", decodes=False), *computed]).requests
    assert prefills.verdict == (None, None), "before anything has been sent"
    assert doings(prefills.parts)[:1] == doings(decodes.parts)[:1]


@pytest.mark.parametrize("decoded", [False, True])
def test_a_server_that_was_started_again_may_be_of_the_other_kind(decoded: bool) -> None:
    """Each request is judged by the server that had it: when its first token is there, and what it did meanwhile."""

    def course(at_s: float, rid: str) -> list[AnyEvent]:
        return [
            arrival(at_s, rid, at_s + 1.0),
            ready(at_s + 0.1, rid, 0.5),
            start(at_s + 0.1, 0, rid),
            complete(at_s + 0.6, 0, rid, forward_s=0.5),
            Leave(at_s + 5.0, rid),
        ]

    begins = Log(9.0, "0.1.0", decodes=decoded), Log(29.0, "0.1.0", decodes=not decoded)
    history = History.of([begins[0], *course(10.0, "before"), begins[1], *course(30.0, "after")])
    for rid, decodes in (("before", decoded), ("after", not decoded)):
        request = by_rid(history)[rid]
        assert request.verdict == ((True, None) if decodes else (False, Cause.TRANSFER))
        assert request.parts[-1].what == ("decoding" if decodes else "KV cache is sent")
        assert request.parts[1].what == ("not ready" if decodes else "waiting for the decode server")


def test_only_on_a_prefill_server_does_a_request_that_cannot_be_run_wait_for_a_decode_server() -> None:
    events = [arrival(10.0, "never", 11.0), arrival(12.0, "later", 20.0)]
    for decodes, what in ((True, "not ready"), (False, "waiting for the decode server")):
        never, _ = History.of([Log(9.0, "0.1.0", decodes), *events]).requests
        assert never.verdict == (False, Cause.NOT_READY)
        assert "decode server" not in str(never.verdict.cause)
        assert doings(never.parts)[-1] == (what, 10.0, 12.0)


def test_a_stream_that_is_computed_again_waited_for_the_others_that_ran_before_its_first_token() -> None:
    history = History.of(
        [
            Log(9.0, "0.1.0", decodes=True),
            arrival(9.9, "other", 20.0),
            ready(9.9, "other", 0.2),
            start(10.0, 0, "other"),
            arrival(10.0, "stream", 20.0),
            ready(10.01, "stream", 0.3),
            complete(10.2, 0, "other"),
            start(10.2, 1, "stream"),
            complete(10.5, 1, "stream"),
            start(12.0, 2, "stream"),  # it was retracted
            complete(13.0, 2),
            Leave(14.0, "stream"),
        ]
    )
    assert by_rid(history)["stream"].others_s == pytest.approx(0.2)


def test_what_runs_is_one_thing_at_a_time_though_a_step_begins_while_what_was_queued_before_it_runs(
    tmp_path: Path,
) -> None:
    events = [
        start(10.1, 0, "long"),
        suspend(10.25, 0, "long", "short", readable_s=10.24),
        start(10.25, 1, "short"),
        Step(10.3, 2, 10.2, None),
        complete(10.4, 1, "short"),
        Resume(10.4, 0, ["long"], 7),
        complete(11.0, 0, "long"),
    ]
    write_timeline([written(tmp_path / "events.jsonl", events)], tmp_path / "it.pftrace")
    read = Trace()
    read.ParseFromString((tmp_path / "it.pftrace").read_bytes())
    [track] = [packet.track_descriptor.uuid for packet in read.packet if packet.track_descriptor.name == "what runs"]
    on_it = [packet for packet in read.packet if packet.track_event.track_uuid == track]
    times = [packet.timestamp for packet in on_it]
    assert times == sorted(times)
    assert len(times) == 2 * 4, "long, the step behind it, short, and long again"


def test_only_news_makes_an_arrow() -> None:
    [preemption] = History.of(PREEMPTED).preemptions
    assert preemption.winner is not None
    assert (preemption.loser.start.task, preemption.winner.rid) == (0, "short")
    assert preemption.winner_task is not None
    assert preemption.winner_task.start.task == 1
    without_news = [suspend(10.53, 0, "long", "short", readable_s=None) if isinstance(event, Suspend) else event
                    for event in PREEMPTED]  # fmt: skip
    history = History.of(without_news)
    assert history.preemptions == []
    assert history.tasks[0].suspensions == 1


def test_the_picture_has_a_line_a_request_with_what_it_did_its_deadline_and_who_was_suspended_for_it() -> None:
    figure = bars(History.of(PREEMPTED), 10.4, 11.7)
    drawn = {trace.name: trace for trace in figure.data}
    suspended, running = drawn["suspended"], drawn["running"]
    assert (suspended.y, suspended.base, suspended.x) == ((0,), pytest.approx((0.125,)), pytest.approx((0.105,)))
    assert (running.y, running.base) == ((0, 0, 1), pytest.approx((0.0, 0.23, 0.13)))
    assert drawn["KV cache is sent"].x == pytest.approx((0.1, 0.07))
    assert (drawn["deadline, missed"].x, drawn["deadline, kept"].x) == (pytest.approx((1.1,)), pytest.approx((0.6,)))
    [arrow] = figure.layout.annotations
    assert (arrow.ay, arrow.y, arrow.ax, arrow.x) == (1, 0, pytest.approx(0.1), pytest.approx(0.125))
    assert figure.layout.yaxis.ticktext == ("3,000 tokens, misprediction", "1,000 tokens")


def test_the_picture_is_of_the_seconds_with_the_most_preemptions(tmp_path: Path) -> None:
    def preempted(begin_s: float, *after_s: float) -> list[AnyEvent]:
        task = round(100 * begin_s)
        events: list[AnyEvent] = [arrival(begin_s, f"long {task}", 99.0), start(begin_s, task, f"long {task}")]
        for number, at_s in enumerate(after_s, start=1):
            events += [
                suspend(begin_s + at_s, task, f"long {task}", "short", readable_s=begin_s + at_s - 0.01),
                start(begin_s + at_s, task + number, "short"),
                complete(begin_s + at_s + 0.1, task + number, "short"),
                Resume(begin_s + at_s + 0.1, task, [f"long {task}"], 7),
            ]
        return [*events, complete(begin_s + 9.0, task, f"long {task}")]

    events = [*preempted(10.0, 1.0, 8.0), *preempted(20.0, 2.0, 3.0), *preempted(30.0, 1.0)]
    assert busiest_s(History.of(events), 4.0) == pytest.approx(21.6)
    page = tmp_path / "made" / "timeline.html"
    assert bench(["events", str(written(tmp_path / "events.jsonl", events)), "--page", str(page)]) == 0
    assert "5 s of events.jsonl" in page.read_text()
    assert bench(["events", str(written(tmp_path / "none.jsonl", [])), "--page", str(page)]) == 0


def test_an_empty_log_has_an_empty_timeline(tmp_path: Path) -> None:
    [(name, history)] = write_timeline([written(tmp_path / "events.jsonl", [])], tmp_path / "made" / "it.pftrace")
    assert (name, history.requests, history.tasks) == ("events", [], [])
    assert (tmp_path / "made" / "it.pftrace").exists()


@pytest.mark.parametrize("seed", range(20))
def test_counters_are_what_counting_anew_at_each_time_finds(seed: int) -> None:
    rng = random.Random(seed)
    begins_s = [rng.randrange(20) for _ in range(12)]
    waits = [(begin_s, begin_s + rng.randrange(1, 9), rng.uniform(-5, 30)) for begin_s in begins_s]
    counted = dict(depths((begin_s, end_s) for begin_s, end_s, _ in waits))
    depth = 0
    for time_s in range(30):
        depth = counted.get(time_s, depth)
        assert depth == sum(begin_s <= time_s < end_s for begin_s, end_s, _ in waits)
    slacks = dict(least_slacks(waits))
    assert slacks.keys() == {time_s for wait in waits for time_s in wait[:2]}
    for time_s, slack_s in slacks.items():
        latest_s = [latest_s for begin_s, end_s, latest_s in waits if begin_s <= time_s < end_s]
        assert slack_s == (min(latest_s) - time_s if latest_s else 0.0)


def test_pieces_of_one_servers_log_are_one_server_and_what_they_have_in_common_is_told_once(tmp_path: Path) -> None:
    head = Log(9.0, "0.1.0", decodes=False)
    later, earlier = [head, *PREEMPTED[5:]], [head, *PREEMPTED[:6]]
    other = [Log(9.5, "0.1.0", decodes=False), arrival(11.0, "other", 12.0)]
    logs = [
        written(tmp_path / f"{name}.jsonl", events)
        for name, events in (("later", later), ("other", other), ("earlier", earlier))
    ]
    whole, [other_one] = History.of([head, *PREEMPTED]), History.of(other).requests
    told = dict(write_timeline(logs, tmp_path / "all.pftrace"))
    assert list(told) == ["later", "other"]
    assert [request.rid for request in told["other"].requests] == [other_one.rid]
    for one, same in zip(told["later"].requests, whole.requests, strict=True):
        assert (one.rid, one.verdict, one.parts) == (same.rid, same.verdict, same.parts)
    assert len(told["later"].preemptions) == 1


def test_where_times_go_back_another_server_begins_and_where_they_hardly_do_none_does(tmp_path: Path) -> None:
    """As a machine that was started again, or several servers, write one file."""
    hardly = [arrival(10.0, "a", 11.0), arrival(10.5, "b", 11.0), arrival(10.499, "c", 11.0)]
    log = written(tmp_path / "events.jsonl", [*hardly, arrival(3.0, "again", 4.0)])
    told = write_timeline([log], tmp_path / "it.pftrace")
    assert [(name, [request.rid for request in history.requests]) for name, history in told] == [
        ("events", ["a", "b", "c"]),
        ("events 2", ["again"]),
    ]


# ---- the trace ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Two servers of one machine: PREEMPTED on one, one of its requests and another on a server that decodes."""
    folder = tmp_path_factory.mktemp("timeline")
    decoding = [
        arrival(12.0, "long", 14.0),
        ready(12.0, "long", 0.5),
        start(12.1, 0, "long"),
        arrival(12.2, "waits", 12.9),
        ready(12.2, "waits", 0.2),
        Step(12.4, 2, 12.3, None),
        complete(12.9, 0, "long", forward_s=0.7),
        start(12.9, 1, "waits", predicted_s=0.2),
        complete(13.1, 1, "waits", forward_s=0.2),
        Step(13.3, 2, 13.2, 13.1),
        Leave(13.3, "waits"),
        Leave(13.4, "long"),
    ]
    logs = [written(folder / "prefill.jsonl", PREEMPTED), written(folder / "unified.jsonl", decoding)]
    write_timeline(logs, folder / "timeline.pftrace")
    return (folder / "timeline.pftrace").read_bytes()


def test_the_trace_is_of_perfettos_schema_and_whole(trace: bytes) -> None:
    read = Trace()
    read.ParseFromString(trace)
    tracks = {packet.track_descriptor.uuid: packet.track_descriptor for packet in read.packet
              if packet.HasField("track_descriptor")}  # fmt: skip
    roots = [track for track in tracks.values() if not track.parent_uuid]
    assert [track.process.process_name for track in roots] == ["prefill", "unified"]
    assert {track.parent_uuid for track in tracks.values()} <= {0, *tracks}
    events = [packet for packet in read.packet if packet.HasField("track_event")]
    assert {packet.track_event.track_uuid for packet in events} <= tracks.keys()
    open_slices: defaultdict[int, list[int]] = defaultdict(list)
    flows: defaultdict[int, int] = defaultdict(int)
    for packet in events:
        event, begun = packet.track_event, open_slices[packet.track_event.track_uuid]
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            begun.append(packet.timestamp)
        elif event.type == TrackEvent.TYPE_SLICE_END:
            assert begun.pop() < packet.timestamp
        for flow in (*event.flow_ids, *event.terminating_flow_ids):
            flows[flow] += 1
    assert not any(open_slices.values())
    assert sorted(flows.values()) == [2, 3], "a request in two servers; arrival, suspension, start"


def test_perfetto_finds_everything_in_the_trace(trace: bytes) -> None:
    with trace_processor(trace) as perfetto:
        assert perfetto.query("SELECT name, value FROM stats WHERE severity != 'info' AND value > 0") == []
        ran = perfetto.query(
            "SELECT process.name AS server, slice.name AS what, ts / 1000000 AS begin_ms, dur / 1000000 AS ms "
            "FROM slice JOIN process_track ON track_id = process_track.id JOIN process USING (upid) "
            "WHERE process_track.name = 'what runs' ORDER BY ts"
        )
        assert ran == [
            ("prefill", "long", 10100, 425),
            ("prefill", "short", 10530, 100),
            ("prefill", "long", 10630, 970),
            ("unified", "long", 12100, 200),
            ("unified", "decode step", 12300, 100),
            ("unified", "long", 12400, 500),
            ("unified", "waits", 12900, 200),
            ("unified", "decode step", 13200, 100),
        ]
        why = perfetto.query(
            "SELECT extract_arg(arg_set_id, 'debug.rid') AS rid, name, "
            "extract_arg(arg_set_id, 'debug.cause') AS cause, "
            "round(extract_arg(arg_set_id, 'debug.late_s'), 3) AS late_s, dur / 1000000 AS ms "
            "FROM slice WHERE extract_arg(arg_set_id, 'debug.ttft_slo_s') IS NOT NULL ORDER BY ts"
        )
        assert why == [
            ("long", "missed: misprediction", "misprediction", 0.3, 1810),
            ("short", "in time", None, -0.3, 210),
            ("long", "in time", None, -1.1, 1410),
            ("waits", "missed: overload", "overload", 0.2, 1110),
        ]
        arrows = perfetto.query(
            "SELECT tail.name AS tail, tail.ts / 1000000 AS tail_ms, head.name AS head, head.ts / 1000000 AS head_ms "
            "FROM flow JOIN slice AS tail ON slice_out = tail.id JOIN slice AS head ON slice_in = head.id "
            "ORDER BY tail.ts, head.ts"
        )
        assert arrows == [
            ("missed: misprediction", 9990, "in time", 11990),
            ("arrival", 10500, "suspended", 10525),
            ("suspended", 10525, "running", 10530),
        ]
        place = "extract_arg(arg_set_id, 'debug.after'), extract_arg(arg_set_id, 'debug.tiles')"
        suspended = perfetto.query(
            f"SELECT {place} FROM slice WHERE extract_arg(arg_set_id, 'debug.for_rids') IS NOT NULL"
        )
        assert suspended == [("layers.3.self_attn", 2)]
        marks = perfetto.query(
            "SELECT extract_arg(arg_set_id, 'debug.rid') AS rid, ts / 1000000 AS ms FROM slice WHERE name = 'deadline' "
            "ORDER BY ts"
        )
        assert marks == [("short", 11000), ("long", 11500), ("waits", 12900), ("long", 14000)]
        waiting = perfetto.query(
            "SELECT ts / 1000000 AS ms, CAST(value AS INT) AS waiting FROM counter JOIN process_counter_track AS track "
            "ON track_id = track.id WHERE track.name = 'requests that wait' ORDER BY ts"
        )
        assert waiting == [
            (10010, 1), (10100, 0), (10510, 1), (10530, 0), (12000, 1), (12100, 0), (12200, 1), (12900, 0),
        ]  # fmt: skip
        slack = perfetto.query(
            "SELECT ts / 1000000 AS ms, round(value, 3) AS s FROM counter JOIN process_counter_track AS track "
            "ON track_id = track.id WHERE track.name LIKE 'least slack%' AND value != 0 ORDER BY ts LIMIT 2"
        )
        assert slack == [(10010, 0.49), (10510, 0.39)]


def test_the_command_says_what_became_of_the_requests_and_where_to_look(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "events.jsonl", PREEMPTED)
    assert main(["timeline", str(log)]) == 0
    said = capsys.readouterr().out
    assert "2 requests, 1 in time; 1 missed, misprediction\n" in said
    assert f"{tmp_path / 'events.pftrace'}: open it at" in said
    assert main(["timeline", str(log), str(log), "-o", str(tmp_path / "both.pftrace")]) == 0
    assert (tmp_path / "both.pftrace").stat().st_size > (tmp_path / "events.pftrace").stat().st_size


def test_the_command_refuses_what_is_no_event_log_and_never_writes_over_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = written(tmp_path / "events.jsonl", PREEMPTED)
    before = log.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_text('{"ttft_s": 1}\n')
    for argv, problem in (
        ([str(log), "-o", str(log)], f"-o {log} is one of the event logs: name another file"),
        ([str(other)], f"{other} is no event log: line 1"),
        ([str(tmp_path / "missing.jsonl")], "missing.jsonl: No such file or directory"),
        ([], "required: EVENTS"),
    ):
        assert main(["timeline", *argv]) == EXIT_CANNOT_START
        said = capsys.readouterr().err
        assert problem in said
        assert said.count("\n") == 1
    assert log.read_bytes() == before
