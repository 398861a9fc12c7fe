"""The event log, and what becomes of it on a full disk."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli.events import summarise_log
from sgl_flowprefill.events import EventLog, read_events
from sgl_flowprefill.runtime.event_recorder import EventRecorder


def complete(t_s: float, task: int, rid: str, forward_s: float, expected_s: float, profiled_s: float) -> dict[str, Any]:
    times_s = {"forward_s": forward_s, "expected_s": expected_s, "profiled_s": profiled_s}
    return {"event": "complete", "t_s": t_s, "task": task, "rids": [rid], **times_s}


TWO_REQUESTS: list[dict[str, Any]] = [
    {"event": "arrival", "t_s": 10.0, "rid": "long", "deadline_s": 20.0},
    {"event": "start", "t_s": 10.1, "task": 0, "rids": ["long"], "new_tokens": 3000},
    {"event": "arrival", "t_s": 10.5, "rid": "short", "deadline_s": 10.6},
    {"event": "suspend", "t_s": 10.51, "task": 0, "rids": ["long"], "blocking_s": 0.01},
    {"event": "start", "t_s": 10.51, "task": 1, "rids": ["short"], "new_tokens": 1000},
    {"event": "arrival", "t_s": 10.6, "rid": "left", "deadline_s": 12.0},
    {"event": "abort", "t_s": 10.65, "rids": ["left"]},
    complete(10.7, 1, "short", 0.2, 0.1, 0.1),
    {"event": "resume", "t_s": 10.71, "task": 0, "rids": ["long"]},
    complete(11.0, 0, "long", 0.6, 0.6, 0.3),
    {"event": "start", "t_s": 19.0, "task": 2, "rids": ["HEALTH_CHECK_1"], "new_tokens": 1},
    complete(20.0, 2, "HEALTH_CHECK_1", 0.2, 0.2, 0.1),
]


def test_events_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "made" / "events.jsonl"
    log = EventLog(path)
    log.write("start", 1.00000049, task=1)
    log.write("complete", 2.0, task=1)
    log.flush()
    with open(path, "a") as file:
        file.write('{"event": "cut o')
    assert list(read_events(path)) == [
        {"event": "start", "t_s": 1.0, "task": 1},
        {"event": "complete", "t_s": 2.0, "task": 1},
    ]


@pytest.mark.parametrize("events", [1, 2000], ids=["at a flush", "when its buffer is full"])
def test_a_full_disk_ends_the_log_and_nothing_else(events: int, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog("/dev/full")
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            for number in range(events):
                log.write("arrival", 0.0, rid=f"{number:064}")
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
        {"event": "arrival", "t_s": 0.0, "rid": "a", "deadline_s": 9.0},
        {"event": "start", "t_s": 0.0, "task": 0, "rids": ["a"], "new_tokens": 1},
        {"event": "arrival", "t_s": 0.5, "rid": "b", "deadline_s": 9.0},
        complete(1.0, 0, "a", 1.0, 1.0, 1.0),
        {"event": "arrival", "t_s": 1.001, "rid": "c", "deadline_s": 9.0},
        {"event": "start", "t_s": 1.004, "task": 1, "rids": ["b", "c"], "new_tokens": 2},
    ]
    assert summarise_log(events).between_forwards_p50_s == pytest.approx(0.004)


def served(task: int, rid: str, t_s: float) -> list[dict[str, Any]]:
    """A request that arrives and runs for a second."""
    return [
        {"event": "arrival", "t_s": t_s, "rid": rid, "deadline_s": t_s + 5},
        {"event": "start", "t_s": t_s, "task": task, "rids": [rid], "new_tokens": 10},
        complete(t_s + 1, task, rid, 1.0, 1.0, 1.0),
    ]


def test_a_request_that_fails_is_waited_for_until_then_and_no_longer() -> None:
    events = [
        {"event": "arrival", "t_s": 0.0, "rid": "too long", "deadline_s": 5.0},
        {"event": "fail", "t_s": 0.25, "rids": ["too long"], "http_status": 400, "reason": "too long"},
        *served(0, "a", 100.0),
        *served(1, "b", 200.0),
    ]
    summary = summarise_log(events)
    assert (summary.requests, summary.answered, summary.failed, summary.without_end) == (3, 2, 1, 0)
    assert summary.busy_s == pytest.approx(2.25)
    assert summary.between_forwards_p50_s is None
    assert dict(summary.rows())["requests"] == "3 arrived, 2 answered, 0 aborted, 1 failed"


def test_arrivals_without_an_end_do_not_keep_the_server_busy_and_are_counted() -> None:
    lost = {"event": "arrival", "t_s": 0.0, "rid": "never heard of again", "deadline_s": 5.0}
    summary = summarise_log([lost, *served(0, "a", 100.0), *served(1, "b", 200.0), *served(2, "a", 300.0)])
    assert summary.busy_s == pytest.approx(3.0)
    assert summary.between_forwards_p50_s is None
    assert summary.without_end == 1
    assert "1 without an end" in dict(summary.rows())["requests"]


def test_a_request_that_still_runs_where_the_log_ends_keeps_the_server_busy() -> None:
    running = served(1, "b", 200.0)[:2]
    tick = {"event": "suspend", "t_s": 200.5, "task": 1, "rids": ["b"], "blocking_s": 0.01}
    summary = summarise_log([*served(0, "a", 100.0), *running, tick])
    assert summary.busy_s == pytest.approx(1.5)
    assert summary.without_end == 1


def test_what_ran_when_a_server_was_killed_does_not_keep_its_successor_busy() -> None:
    killed = served(7, "b", 100.0)[:2]
    summary = summarise_log([*killed, *served(0, "c", 200.0), *served(1, "d", 300.0)])
    assert summary.busy_s == pytest.approx(2.0)
    assert summary.without_end == 1


@pytest.mark.parametrize("blocking_s", [None, 0.0], ids=["as it is logged", "as it was logged once"])
def test_a_switch_that_no_news_led_to_is_no_preemption(blocking_s: float | None) -> None:
    switch = {"event": "suspend", "t_s": 10.52, "task": 1, "rids": ["short"], "blocking_s": blocking_s}
    summary = summarise_log([*TWO_REQUESTS[:5], switch, *TWO_REQUESTS[5:]])
    assert summary.preemption.preemptions == 1
    assert summary.preemption.blocking_mean_s == pytest.approx(0.01)
    assert dict(summary.rows())["preemptions"] == "1 (and 1 switches without news)"


def test_the_recorder_names_no_blocking_time_where_no_news_led_to_a_switch(tmp_path: Path) -> None:
    recorder = EventRecorder(tmp_path / "events.jsonl")
    running: Any = SimpleNamespace(id=0, rids=["a"], checkpoint=3)
    winner: Any = SimpleNamespace(id=1, rids=["b"], readable_s=1.0)
    recorder.suspended(running, winner, stopped_s=4.9, now_s=5.0, news_readable_s=math.inf)
    recorder.suspended(running, winner, stopped_s=4.9, now_s=5.0, news_readable_s=4.5)
    recorder.flush()
    without_news, with_news = read_events(tmp_path / "events.jsonl")
    assert (without_news["readable_s"], without_news["blocking_s"]) == (None, None)
    assert (with_news["readable_s"], with_news["blocking_s"]) == (4.5, 0.5)


def test_an_empty_log_has_no_figures() -> None:
    summary = summarise_log([])
    assert (summary.requests, summary.busy_s, summary.over_profile) == (0, 0.0, None)
    assert dict(summary.rows())["preemptions"] == "0"


def test_the_command_prints_figures_and_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for event in TWO_REQUESTS:
        log.write(event["event"], event["t_s"], **{name: event[name] for name in event.keys() - {"event", "t_s"}})
    log.flush()
    assert main(["events", str(tmp_path / "events.jsonl")]) == 0
    assert "50.0% of those answered" in capsys.readouterr().out
    other = tmp_path / "other.jsonl"
    other.write_text('{"ttft_s": 1}\n')
    assert main(["events", str(other)]) == 2
    assert f"{other} is no event log" in capsys.readouterr().err
    assert main(["events", str(tmp_path / "missing.jsonl")]) == 2
