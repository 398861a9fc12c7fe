"""The event log, and what becomes of it on a full disk."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from sgl_flowprefill.events import EventLog, read_events


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
