"""The event log of a decode server."""

from __future__ import annotations

import fcntl
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.events import Decoded, Log, read_events
from sgl_flowprefill.runtime.decode_log import DecodeLog
from sgl_flowprefill.runtime.decode_scheduler import DecodeScheduler, DecodeStreamer
from tests.decode_streamer import decode_streamer, decoding

WAITED: Final = {
    "decode_prealloc_queue_entry_time": 100.01,
    "decode_transfer_queue_entry_time": 100.02,
    "wait_queue_entry_time": 100.2,
}
"""SGLang's times of a request whose KV cache has come."""
NEVER: Final = dict.fromkeys(WAITED, 0.0)


@pytest.fixture
def clock_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the streamer and the log see."""
    now_s = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now_s[0])
    return now_s


@pytest.fixture
def sent() -> list[Any]:
    """What clients get."""
    return []


@pytest.fixture
def streamer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock_s: list[float], sent: list[Any]) -> DecodeStreamer:
    """One whose log is ``told`` of."""
    monkeypatch.setenv("FLOWPREFILL_ANSWER_REPORT", "false")
    made = decode_streamer(monkeypatch, sent)
    made.log = DecodeLog(tmp_path / "events.jsonl")
    return made


def told(tmp_path: Path) -> list[Decoded]:
    """Without being asked to, the log has written all."""
    head, *events = read_events(tmp_path / "events-decode.jsonl")
    assert isinstance(head, Log)
    assert (head.decodes, head.prefills) == (True, False)
    assert all(isinstance(event, Decoded) for event in events)
    return [event for event in events if isinstance(event, Decoded)]


def test_a_decode_server_tells_of_a_request_once_when_its_answer_is_over(
    streamer: DecodeStreamer, tmp_path: Path, clock_s: list[float], sent: list[Any]
) -> None:
    """With overlapped decode steps, SGLang hands on a request that is over a second time. Answers have no reports."""
    req = decoding("a", 100.0, **WAITED)
    for at_s in (100.25, 101.0, 103.0, 103.1):
        assert told(tmp_path) == [] or at_s > 103.0
        clock_s[0] = at_s
        if at_s <= 103.0:
            req.output_ids.append(5)
        req.finished_reason = FINISH_LENGTH(3) if at_s >= 103.0 else None
        streamer.stream_output([req], False)
    assert told(tmp_path) == [Decoded(103.0, "a", 7, 100.0, 100.01, 100.02, 100.2, 100.25, 3)]
    assert [message.customized_info for message in sent] == [None]


def test_what_ends_in_a_step_is_written_with_one_write(
    streamer: DecodeStreamer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decode loop waits for each write."""
    log = streamer.log
    assert log is not None
    flush, flushes = log.flush, 0

    def counted() -> None:
        nonlocal flushes
        flushes += 1
        flush()

    monkeypatch.setattr(log, "flush", counted)
    reqs = [decoding(rid, 99.0, **NEVER) for rid in "abc"]
    for req in reqs:
        req.output_ids.append(5)
        req.finished_reason = FINISH_LENGTH(1)
    streamer.stream_output(reqs, False)
    assert [one.rid for one in told(tmp_path)] == ["a", "b", "c"]
    assert flushes == 1


def test_what_was_later_than_the_first_token_is_of_a_retraction_and_left_out(
    streamer: DecodeStreamer, tmp_path: Path, clock_s: list[float]
) -> None:
    req = decoding("a", 100.0, **WAITED)
    for at_s in (100.25, 105.0):
        clock_s[0] = at_s
        req.output_ids.append(5)
        if at_s > 100.25:
            req.retraction_count, req.time_stats.wait_queue_entry_time = 1, 102.0
            req.finished_reason = FINISH_LENGTH(2)
        streamer.stream_output([req], False)
    [one] = told(tmp_path)
    assert (one.place_s, one.kv_s, one.first_token_s, one.retractions) == (100.02, None, 100.25, 1)


def test_a_request_that_got_no_place_has_a_reason_and_none_of_the_later_times(
    streamer: DecodeStreamer, tmp_path: Path, clock_s: list[float]
) -> None:
    req = decoding("a", 100.0, **(NEVER | {"decode_prealloc_queue_entry_time": 100.01}))
    req.finished_reason = FINISH_ABORT("Decode handshake failed " + 300 * "!")
    clock_s[0] = 107.0
    streamer.stream_output([req], False)
    [one] = told(tmp_path)
    assert one.reason is not None
    assert one.reason.startswith("Decode handshake failed")
    assert len(one.reason) == 200
    assert (one.queued_s, one.place_s, one.kv_s, one.first_token_s, one.tokens) == (100.01, None, None, None, 0)


def test_a_request_that_is_aborted_past_the_streamer_is_over_too_and_health_checks_are_no_requests(
    streamer: DecodeStreamer, tmp_path: Path
) -> None:
    scheduler = DecodeScheduler.__new__(DecodeScheduler)
    scheduler.rust_server = None
    aborts: list[Any] = []
    sender = SimpleNamespace(send_output=lambda abort_req, req: aborts.append(req.rid))
    scheduler.ipc_channels = SimpleNamespace(send_to_tokenizer=sender)
    scheduler.output_streamer = streamer
    for rid, reason in (("a", None), ("b", {"type": "abort", "message": "out of memory"}), ("HEALTH_CHECK_1", None)):
        scheduler.send_abort_output(AbortReq(rid=rid, finished_reason=reason), decoding(rid, 99.0, **NEVER))
    assert aborts == ["a", "b", "HEALTH_CHECK_1"]
    assert [(one.rid, one.reason) for one in told(tmp_path)] == [
        ("a", "aborted while it waited"),
        ("b", "out of memory"),
    ]


def test_a_rank_on_another_node_than_the_http_server_tells_when_it_had_a_request_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock_s: list[float], sent: list[Any]
) -> None:
    """Clocks of two machines have nothing to do with each other."""
    streamer = decode_streamer(monkeypatch, sent, node_rank=1)
    streamer.log = DecodeLog(tmp_path / "events.jsonl")
    req = decoding("a", 7000.0, scheduler_recv_time=100.005, **WAITED)
    clock_s[0] = 100.25
    req.output_ids.append(5)
    req.finished_reason = FINISH_LENGTH(1)
    streamer.stream_output([req], False)
    [one] = told(tmp_path)
    assert (one.received_s, one.first_token_s) == (100.005, 100.25)


def test_ranks_that_start_together_cut_a_line_once_and_keep_what_the_other_has_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = tmp_path / "events-decode.jsonl", b'{"event":"log","t_s":1.0,"version":"0","decodes":true}\n'
    path.write_bytes(b'{"event":"decoded","t_s":1.0,"rid":"a line that was longer than the one of the other rank"')
    flock = fcntl.flock

    def waits(file: Any, operation: int) -> None:
        """Until the other rank is through."""
        path.write_bytes(whole)
        flock(file, operation)

    monkeypatch.setattr("fcntl.flock", waits)
    DecodeLog(path)
    first, _ = path.read_bytes().splitlines(keepends=True)
    assert first == whole
    assert len(list(read_events(path))) == 2


@pytest.mark.parametrize(("answers", "asked"), [(True, True), (False, True), (True, False)])
def test_only_the_rank_that_answers_writes_a_log_and_only_where_one_is_asked_for(
    answers: bool, asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(scheduler: Any) -> None:
        scheduler.ipc_channels = SimpleNamespace(recv_from_tokenizer=object() if answers else None)
        scheduler.output_streamer = SimpleNamespace(log=None)

    monkeypatch.setattr(Scheduler, "__init__", init)
    if asked:
        monkeypatch.setenv("FLOWPREFILL_EVENT_LOG", str(tmp_path / "events.jsonl"))
    scheduler = DecodeScheduler()
    assert (scheduler.output_streamer.log is not None) == (answers and asked)
    assert [path.name for path in tmp_path.iterdir()] == (["events-decode.jsonl"] if answers and asked else [])
