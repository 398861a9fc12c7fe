"""The event log, and what becomes of it on a full disk."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.event_log import summarise_log
from sgl_flowprefill.events import EventLog, read_events


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
