"""The stages of an isolated request add up to its TTFT, each from the log that knows it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sgl_flowprefill.bench.cli.breakdown import STAGES, Sent, row, split, time_stats
from sgl_flowprefill.events import Arrival, Complete, Start

EVENTS = [
    Arrival(9.5, "before", 64, 5.0, 14.4, 9.4),
    Arrival(10.006, "r1", 64, 5.0, 15.004, 10.004),
    Start(10.013, 1, ["r1"], 64, 0, 0.02),
    Complete(10.034, 1, ["r1"], 9, 0.02, 0.02, 0.02, 0.02),
]
PREFILL = {"7": {"rid": "r1", "bootstrap_duration": 0.005}}
DECODE = {
    "7": {"rid": "r2", "entry_time": 10.007, "bootstrap_duration": 0.002, "alloc_wait_duration": 0.001,
          "transfer_duration": 0.027, "queue_duration": 9.0},
}  # fmt: skip
SENT = Sent(64, True, sent_s=10.0, first_token_s=10.045, left_server_s=10.042)


def test_stages_add_up_to_the_ttft() -> None:
    stages = split(SENT, EVENTS, PREFILL, DECODE)
    assert list(stages) == list(STAGES)
    assert sum(stages.values()) == pytest.approx(0.045)
    expected_ms = {"request": 4, "tokenizer": 2, "handshake": 5, "queue": 3, "forward": 20, "transfer": 3,
                   "decode": 5, "answer": 3}  # fmt: skip
    assert {stage: stages[stage] * 1e3 for stage in STAGES} == pytest.approx(expected_ms)


def test_a_request_that_was_not_alone_is_refused() -> None:
    other = Arrival(10.02, "r9", 64, 5.0, 15.02, 10.02)
    with pytest.raises(ValueError, match="2 requests arrived"):
        split(SENT, [*EVENTS, other], PREFILL, DECODE)


def test_what_the_gateway_adds_is_the_difference_of_medians() -> None:
    stages = split(SENT, EVENTS, PREFILL, DECODE)
    direct = SENT._replace(through_gateway=False, first_token_s=10.041, left_server_s=10.04)
    entry = row(64, [(SENT, stages), (SENT, stages), (direct, split(direct, EVENTS, PREFILL, DECODE))])
    assert entry["ttft_s"] == pytest.approx(0.045)
    assert entry["outside_forward_s"] == pytest.approx(0.025)
    assert entry["gateway_s"] == pytest.approx(0.004)


def test_time_statistics_are_read_from_sglangs_log(tmp_path: Path) -> None:
    at_s = time.time()
    log = tmp_path / "decode.log"
    log.write_text(
        "[2026-01-01 00:00:00] INFO: started\n"
        f"[2026-01-01 00:00:01] ReqTimeStats(rid=abc, bootstrap_room=123, input_len=64, cached_input_len=0, "
        f"output_len=2, attempts=1, type=decode): bootstrap_duration=1.50ms, alloc_wait_duration=0.25ms, "
        f"transfer_duration=30.00ms, queue_duration=0.10ms, forward_duration=5.00ms, entry_time={at_s:.3f}\n"
    )
    stats = time_stats(log)["123"]
    assert stats["rid"] == "abc"
    assert stats["transfer_duration"] == pytest.approx(0.03)
    assert stats["entry_time"] == pytest.approx(time.monotonic(), abs=1.0)
