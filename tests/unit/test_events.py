"""The event log, and what becomes of it on a full disk."""

from __future__ import annotations

import json
import logging
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from msgspec import UNSET

from sgl_flowprefill import __version__
from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.events import rows
from sgl_flowprefill.bench.metrics.event_log import summarise_log
from sgl_flowprefill.events import (
    Abort,
    AnyEvent,
    Arrival,
    Complete,
    Decoded,
    EventLog,
    EventLogError,
    Fail,
    GiveBack,
    Leave,
    Log,
    Points,
    Ready,
    RecentEvents,
    Resume,
    Shed,
    Start,
    Step,
    Suspend,
    decode_events,
    of_decode_server,
    read_events,
    table,
)
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.slo import Objective
from sgl_flowprefill.ttft import Prediction, PrefillShape


def arrival(t_s: float, rid: str, deadline_s: float) -> Arrival:
    return Arrival(t_s, rid, 1000, deadline_s - t_s, deadline_s, t_s)


def start(t_s: float, task: int, *rids: str, new_tokens: int) -> Start:
    return Start(t_s, task, list(rids), new_tokens, 0, 0.1)


def suspend(t_s: float, task: int, rid: str, blocking_s: float | None) -> Suspend:
    return Suspend(t_s, task, [rid], 3, ["winner"], None if blocking_s is None else t_s - blocking_s, t_s, blocking_s)


def complete(t_s: float, task: int, rid: str, forward_s: float, expected_s: float, profiled_s: float) -> Complete:
    return Complete(t_s, task, [rid], 9, forward_s, expected_s, expected_s, profiled_s)


TWO_REQUESTS: list[AnyEvent] = [
    arrival(10.0, "long", 20.0),
    start(10.1, 0, "long", new_tokens=3000),
    arrival(10.5, "short", 10.6),
    suspend(10.51, 0, "long", 0.01),
    start(10.51, 1, "short", new_tokens=1000),
    arrival(10.6, "left", 12.0),
    Abort(10.65, ["left"]),
    complete(10.7, 1, "short", 0.2, 0.1, 0.1),
    Resume(10.71, 0, ["long"], 3),
    complete(11.0, 0, "long", 0.6, 0.6, 0.3),
    start(19.0, 2, "HEALTH_CHECK_1", new_tokens=1),
    complete(20.0, 2, "HEALTH_CHECK_1", 0.2, 0.2, 0.1),
]


def written(path: Path, events: Sequence[AnyEvent]) -> Path:
    log = EventLog(path)
    for event in events:
        log.write(type(event), **msgspec.structs.asdict(event))
    log.flush()
    return path


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "made" / "events.jsonl"
    log = EventLog(path)
    log.write(Resume, 1.00000049, task=1, rids=["a"], checkpoint=3)
    log.write(Abort, 2.0, rids=["a"], task=1, checkpoint=3)
    log.flush()
    with open(path, "a") as file:
        file.write('{"event": "cut o')
    assert list(read_events(path)) == [Resume(1.0, 1, ["a"], 3), Abort(2.0, ["a"], 1, 3)]
    assert [json.loads(line) for line in path.read_text().splitlines()[:-1]] == [
        {"event": "resume", "t_s": 1.0, "task": 1, "rids": ["a"], "checkpoint": 3},
        {"event": "abort", "t_s": 2.0, "rids": ["a"], "task": 1, "checkpoint": 3},
    ]


def test_every_kind_of_event_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    events = [
        Log(9.0, "0.1.0", decodes=True),
        *TWO_REQUESTS,
        suspend(21.0, 4, "x", None),
        Points(21.5, 4, ["model.layers.0.self_attn", ""], [21.2, 21.4]),
        Fail(22.0, ["y"], None, "lost"),
        Fail(23.0, ["z"], 400, "", 5, 6),
        GiveBack(24.0, 7, ["v", "w"], 8),
        Ready(24.1, "v", 24.05, 900, 100, 0.09),
        Leave(24.2, "a"),
        Leave(24.3, "b", "Decode transfer failed"),
        Leave(24.4, "c", "Prefill transfer failed", aborted=True),
        Step(25.0, 3, 24.9, 24.8),
        Step(26.0, 3, 25.9, None),
        Shed(27.0, "u", 0.5, 4.2, 5),
        Decoded(28.0, "a", 7, 10.0, 10.1, 10.2, 11.0, 11.1, tokens=12, retractions=1),
        Decoded(29.0, "b", None, 10.0, reason="Decode handshake failed"),
    ]
    assert {type(event) for event in events} == set(get_args(AnyEvent))
    assert list(read_events(written(tmp_path / "events.jsonl", events))) == events


def test_a_log_begins_with_what_server_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for decodes in (False, True):  # started again
        log = EventLog(path, RecentEvents(1))
        log.begin(decodes)
        for event in TWO_REQUESTS[:2]:
            log.write(lambda event=event: event)  # type: ignore[misc]
        log.flush()
    heads = [event for event in read_events(path) if isinstance(event, Log)]
    assert all(head.prefills for head in heads)
    assert heads[0].boot == heads[1].boot != "", "they are by one clock"
    assert [(head.version, head.decodes) for head in heads] == [(__version__, False), (__version__, True)]
    assert log.recent is not None
    assert decode_events(log.recent.head) == heads[1:], "it is kept though later events are not"
    with_head, without = summarise_log([Log(0.0, "0.1.0", decodes=True), *TWO_REQUESTS]), summarise_log(TWO_REQUESTS)
    assert with_head == without


@pytest.mark.parametrize(
    ("asked", "written_to"),
    [
        ("out/events.jsonl", "out/events-decode.jsonl"),
        ("out/run.pftrace.jsonl", "out/run.pftrace-decode.jsonl"),
        ("out/events-decode-1.jsonl", "out/events-decode-1.jsonl"),
        ("/dev/null", "/dev/null"),
    ],
)
def test_a_decode_server_writes_another_file_than_a_prefill_server_that_is_told_the_same(
    asked: str, written_to: str
) -> None:
    assert of_decode_server(Path(asked)) == Path(written_to)


def test_what_a_decode_server_did_counts_for_none_of_a_prefill_servers_figures() -> None:
    decoded = Decoded(20.5, "long", 7, 10.0, 10.1, 10.2, 11.0, 11.1, 12)
    assert summarise_log([*TWO_REQUESTS, decoded]) == summarise_log(TWO_REQUESTS)


def test_what_is_absent_or_null_is_so_in_the_line(tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", [Fail(1.0, ["a"], None, "lost"), suspend(2.0, 0, "b", None)])
    fail, switch = (json.loads(line) for line in path.read_text().splitlines())
    assert fail == {"event": "fail", "t_s": 1.0, "rids": ["a"], "http_status": None, "reason": "lost"}
    assert (switch["readable_s"], switch["blocking_s"]) == (None, None)


def test_a_log_has_numpys_numbers_and_the_oddest_request_ids(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.write(Start, np.float64(1.5), task=1, rids=["half \ud800 a character"], new_tokens=np.int64(3),  # type: ignore[arg-type]
              cached_tokens=0, predicted_s=np.float64(0.25))  # fmt: skip
    log.flush()
    assert list(read_events(path)) == [Start(1.5, 1, ["half ? a character"], 3, 0, 0.25)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"ttft_s": 1}', "missing required field `event`"),
        ('{"event": "restart", "t_s": 1.0}', "'restart'"),
        (
            '{"event": "resume", "t_s": 1.0, "task": "one", "rids": [], "checkpoint": 0}',
            "Expected `int`, got `str` - at `$.task`",
        ),
        ('{"event": "resume", "t_s": 1.0, "task": 1, "rids": []}', "missing required field `checkpoint`"),
        ("not JSON", "JSON is malformed"),
        ("", "truncated"),
    ],
)
def test_a_line_that_is_no_event_is_named_with_the_remedy(tmp_path: Path, line: str, problem: str) -> None:
    path = written(tmp_path / "events.jsonl", TWO_REQUESTS[:2])
    with open(path, "a") as file:
        file.write(f"{line}\n")
    with pytest.raises(EventLogError) as caught:
        list(read_events(path))
    said = str(caught.value)
    assert said.startswith(f"{path} is no event log: line 3: ")
    assert problem in said
    assert said.endswith("name the file of --flowprefill-event-log")


def test_a_piece_of_a_log_may_begin_within_a_line(tmp_path: Path) -> None:
    path = written(tmp_path / "events.jsonl", TWO_REQUESTS)
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for at in range(1, first_line):
        path.write_bytes(whole[at:])
        assert list(read_events(path)) == TWO_REQUESTS[1:]
    for text in ("no line of a log\n", "no line of a log\nnor this\n"):
        path.write_text(text)
        with pytest.raises(EventLogError):
            list(read_events(path))


@pytest.mark.parametrize("left_bytes", [1, 20, 0], ids=["one byte is left", "more is left", "all is gone"])
@pytest.mark.parametrize("whole_lines", [0, 2])
def test_a_log_with_a_line_that_was_cut_off_can_be_read_after_a_restart(
    tmp_path: Path, whole_lines: int, left_bytes: int
) -> None:
    path = written(tmp_path / "events.jsonl", TWO_REQUESTS[: whole_lines + 1])
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:left_bytes])
    written(path, TWO_REQUESTS[3:])
    assert list(read_events(path)) == TWO_REQUESTS[:whole_lines] + TWO_REQUESTS[3:]


@pytest.mark.parametrize("text", ["notes without an end", "x" * (3 << 20)])
def test_a_file_that_is_no_event_log_keeps_what_it_has(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes"
    path.write_text(text)
    written(path, TWO_REQUESTS[:1])
    assert path.read_text().startswith(text)


def test_logs_of_later_versions_may_have_more_fields(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "resume", "t_s": 1.0, "task": 1, "rids": [], "checkpoint": 0, "rank": 3}\n')
    assert list(read_events(path)) == [Resume(1.0, 1, [], 0)]


def test_the_docs_have_the_table_of_the_types() -> None:
    docs = Path(__file__).parents[2] / "docs" / "operations.md"
    assert f"\n\n{table()}\n\n" in docs.read_text(), "python -m sgl_flowprefill.events prints the table"


@pytest.mark.parametrize("events", [1, 2000], ids=["at a flush", "when its buffer is full"])
def test_a_full_disk_ends_the_log_and_nothing_else(events: int, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("/dev/full")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            for number in range(events):
                log.write(Abort, 0.0, rids=[f"{number:064}"])
            log.flush()
    [record] = caplog.records
    assert "/dev/full" in record.getMessage()
    assert "No space left on device" in record.getMessage()


def test_a_log_is_summed_up() -> None:
    summary = summarise_log(TWO_REQUESTS)
    assert (summary.requests, summary.answered, summary.in_time, summary.aborted) == (3, 2, 1, 1)
    assert summary.span_s == pytest.approx(10.0)
    assert summary.busy_s == pytest.approx(1.0), "from the first arrival to the last answer"
    assert summary.forward_s == pytest.approx(0.8)
    assert (summary.forwards, summary.new_tokens) == (2, 4000)
    assert summary.between_forwards_p50_s is None, (
        "a task went on after the first forward, nobody waited after the other"
    )
    assert summary.preemption.preemptions == 1
    assert summary.preemption.blocking_max_s == pytest.approx(0.01)
    assert summary.prediction_error_p50 == pytest.approx(0.25)
    assert summary.over_profile == pytest.approx(2.0)


def test_time_between_forwards_counts_where_a_request_waits() -> None:
    events = [
        arrival(0.0, "a", 9.0),
        start(0.0, 0, "a", new_tokens=1),
        arrival(0.5, "b", 9.0),
        complete(1.0, 0, "a", 1.0, 1.0, 1.0),
        Leave(1.0005, "a"),
        arrival(1.001, "c", 9.0),
        Ready(1.002, "c", 1.002, 1, 0, 0.1),
        start(1.004, 1, "b", "c", new_tokens=2),
    ]
    assert summarise_log(events).between_forwards_p50_s == pytest.approx(0.004)


def served(task: int, rid: str, t_s: float) -> list[AnyEvent]:
    """A request that arrives and runs for a second."""
    return [
        arrival(t_s, rid, t_s + 5),
        start(t_s, task, rid, new_tokens=10),
        complete(t_s + 1, task, rid, 1.0, 1.0, 1.0),
    ]


def test_a_request_that_fails_is_waited_for_until_then_and_no_longer() -> None:
    events = [
        arrival(0.0, "too long", 5.0),
        Fail(0.25, ["too long"], 400, "too long"),
        *served(0, "a", 100.0),
        *served(1, "b", 200.0),
    ]
    summary = summarise_log(events)
    assert (summary.requests, summary.answered, summary.failed, summary.without_end) == (3, 2, 1, 0)
    assert summary.busy_s == pytest.approx(2.25)
    assert summary.between_forwards_p50_s is None
    assert dict(rows(summary))["requests"] == "3 arrived, 2 answered, 0 aborted, 1 failed"


def test_arrivals_without_an_end_do_not_keep_the_server_busy_and_are_counted() -> None:
    lost = arrival(0.0, "never heard of again", 5.0)
    summary = summarise_log([lost, *served(0, "a", 100.0), *served(1, "b", 200.0), *served(2, "a", 300.0)])
    assert summary.busy_s == pytest.approx(3.0)
    assert summary.between_forwards_p50_s is None
    assert summary.without_end == 1
    assert "1 without an end" in dict(rows(summary))["requests"]


def test_a_request_that_still_runs_where_the_log_ends_keeps_the_server_busy() -> None:
    running = served(1, "b", 200.0)[:2]
    tick = suspend(200.5, 1, "b", 0.01)
    summary = summarise_log([*served(0, "a", 100.0), *running, tick])
    assert summary.busy_s == pytest.approx(1.5)
    assert summary.without_end == 1


def test_what_ran_when_a_server_was_killed_does_not_keep_its_successor_busy() -> None:
    killed = served(7, "b", 100.0)[:2]
    summary = summarise_log([*killed, *served(0, "c", 200.0), *served(1, "d", 300.0)])
    assert summary.busy_s == pytest.approx(2.0)
    assert summary.without_end == 1


def test_a_switch_that_no_news_led_to_is_no_preemption() -> None:
    switch = suspend(10.52, 1, "short", None)
    summary = summarise_log([*TWO_REQUESTS[:5], switch, *TWO_REQUESTS[5:]])
    assert summary.preemption.preemptions == 1
    assert summary.preemption.blocking_mean_s == pytest.approx(0.01)
    assert dict(rows(summary))["preemptions"] == "1 (and 1 switches without news)"


def test_the_recorder_names_no_blocking_time_where_no_news_led_to_a_switch(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    running: Any = SimpleNamespace(id=0, rids=["a"], operators_passed=3, tiles_passed=0)
    winner: Any = SimpleNamespace(id=1, rids=["b"], readable_s=1.0)
    recorder.suspended(running, winner, stopped_s=4.9, now_s=5.0, news_readable_s=math.inf)
    recorder.suspended(running, winner, stopped_s=4.9, now_s=5.0, news_readable_s=4.5)
    recorder.flush()
    without_news, with_news = read_events(tmp_path / "events.jsonl")
    assert (without_news.readable_s, without_news.blocking_s) == (None, None)
    assert (with_news.readable_s, with_news.blocking_s) == (4.5, 0.5)


def test_a_suspension_says_behind_which_module_and_how_many_tiles_a_prefill_waits(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    work: Any = SimpleNamespace(progress=Progress([True, False] * 2, ["0.attn", "0.mlp", "1.attn", "1.mlp"]))
    recorder.watch(work, 0.0)
    executor = Executor(SimpleNamespace(), lambda: False)
    long, winner = (PrefillTask(number, None, [], [], 0.0, 9.0, 1.0) for number in range(2))
    executor.running = long
    for passed in (
        executor.between_tiles,
        executor.checkpoint,
        executor.checkpoint,
        executor.between_tiles,
        executor.between_tiles,
        executor.checkpoint,
        executor.checkpoint,
        executor.checkpoint,  # behind the first one again: some models run their layers more than once
    ):
        passed()
        recorder.suspended(long, winner, stopped_s=4.9, now_s=5.0, news_readable_s=4.5)
    recorder.flush()
    places = [(event.checkpoint, event.after, event.tiles) for event in read_events(tmp_path / "events.jsonl")
              if isinstance(event, Suspend)]  # fmt: skip
    assert places == [
        (0, "", 1),
        (1, "0.attn", 0),
        (2, "0.mlp", 0),
        (2, "0.mlp", 1),
        (2, "0.mlp", 2),
        (3, "1.attn", 0),
        (4, "1.mlp", 0),
        (5, "0.attn", 0),
    ]


class Req:
    """What the recorder reads of SGLang's Req."""

    bootstrap_room = 7

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.origin_input_ids = self.origin_input_ids_unpadded = [1, 2, 3]


def test_the_recorder_tells_of_each_request_once_that_it_can_be_run_and_that_it_has_left(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    sent, aborted, refused, health = Req("sent"), Req("aborted"), Req("refused"), Req("HEALTH_CHECK_1")
    for req in (sent, aborted, refused, health):
        recorder.arrived(req, received_s=1.0, objective=Objective(5.0, 0.1))
        waiting = WaitingRequest(req, 0, [1, 2, 3], PrefillShape(2, 1), readable_s=1.5, logprob_rows=0)
        recorder.ready(Job(waiting, 1.0, 6.0, 0.25))
    recorder.answered(refused, "too long", 400)
    task: Any = SimpleNamespace(
        id=0, rids=[], reqs=[sent, aborted, health], operators_passed=9, executed_s=1.0, predicted_s=1.0
    )
    recorder.abort_asked([aborted])
    recorder.completed(task, Prediction(1.0, 1.0, 1.0))
    for _ in range(2):  # an answer is told of at most once
        recorder.answered(sent, None, None)
        recorder.answered(aborted, "aborted", None)
        recorder.answered(health, None, None)
    recorder.flush()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [event.rid for event in events if isinstance(event, Ready)] == ["sent", "aborted", "refused"]
    assert {event.bootstrap_room for event in events if isinstance(event, Arrival)} == {Req.bootstrap_room}
    first = next(event for event in events if isinstance(event, Ready))
    assert (first.readable_s, first.new_tokens, first.cached_tokens, first.predicted_s) == (1.5, 2, 1, 0.25)
    [leave] = [event for event in events if isinstance(event, Leave)]
    assert (leave.rid, leave.reason) == ("sent", UNSET)
    assert [event.rids for event in events if isinstance(event, Abort)] == [["aborted"]]


def test_nothing_is_kept_of_requests_that_have_left(tmp_path: Path) -> None:
    """All are aborted: one that waits, one that runs, and a health check, of which no end is told."""
    recorder = EventRecorder(tmp_path / "events.jsonl")
    requests = [Req("waits"), Req("runs"), Req("HEALTH_CHECK_1")]
    refs = [weakref.ref(req) for req in requests]
    for req in requests:
        recorder.arrived(req, received_s=1.0, objective=Objective(5.0, 0.1))
    recorder.abort_asked(requests)
    recorder.answered(requests[0], "aborted", None)
    recorder.dropped(SimpleNamespace(id=0, reqs=requests[1:], operators_passed=9))  # type: ignore[arg-type]
    for req in requests[1:]:
        recorder.answered(req, "aborted", None)
    del req
    requests.clear()
    assert [ref() for ref in refs] == [None] * 3


def test_a_request_that_is_lost_after_its_prefill_leaves_with_the_reason(tmp_path: Path) -> None:
    recorder, req = EventRecorder(tmp_path / "events.jsonl"), Req("lost")
    recorder.arrived(req, received_s=1.0, objective=Objective(5.0, 0.1))
    task: Any = SimpleNamespace(id=0, rids=[], reqs=[req], operators_passed=9, executed_s=1.0, predicted_s=1.0)
    recorder.completed(task, Prediction(1.0, 1.0, 1.0))
    recorder.answered(req, "Decode transfer failed", 500)
    recorder.flush()
    assert list(read_events(tmp_path / "events.jsonl"))[-1].kind == "leave"
    assert '"reason":"Decode transfer failed"' in (tmp_path / "events.jsonl").read_text().splitlines()[-1]


def test_a_request_that_is_aborted_while_its_kv_cache_is_sent_leaves_so_unless_it_has_been_sent(tmp_path: Path) -> None:
    recorder, reqs = EventRecorder(tmp_path / "events.jsonl"), [Req("gone"), Req("lost"), Req("sent in time")]
    for req in reqs:
        recorder.arrived(req, received_s=1.0, objective=Objective(5.0, 0.1))
    task: Any = SimpleNamespace(id=0, rids=[], reqs=reqs, operators_passed=9, executed_s=1.0, predicted_s=1.0)
    recorder.completed(task, Prediction(1.0, 1.0, 1.0))
    recorder.abort_asked([reqs[0], reqs[2]])
    recorder.answered(reqs[0], "Prefill transfer failed", 500)
    recorder.answered(reqs[1], "Prefill transfer failed", 500)
    recorder.answered(reqs[2], None, None)
    recorder.flush()
    leaves = [event for event in read_events(tmp_path / "events.jsonl") if isinstance(event, Leave)]
    told = {leave.rid: leave.aborted for leave in leaves}
    assert told == {"gone": True, "lost": False, "sent in time": False}


def test_an_empty_log_has_no_figures() -> None:
    summary = summarise_log([])
    assert (summary.requests, summary.busy_s, summary.over_profile) == (0, 0.0, None)
    assert dict(rows(summary))["preemptions"] == "0"


def test_the_command_prints_figures_and_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "events.jsonl", TWO_REQUESTS)
    assert main(["events", str(tmp_path / "events.jsonl")]) == 0
    assert "50.0% of those answered" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text('{"ttft_s": 1}\n')
    assert main(["events", str(other)]) == 2
    assert f"{other} is no event log" in capsys.readouterr().err
    assert main(["events", str(tmp_path / "missing.jsonl")]) == 2
