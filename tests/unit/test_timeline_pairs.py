"""Timelines of a prefill server and its decode server: what a request did at both, joined by its bootstrap room."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import pytest

from sgl_flowprefill.cluster.cli import main
from sgl_flowprefill.events import AnyEvent, Decoded, EventLog, Leave, Log, Ready
from sgl_flowprefill.timeline import write_timeline
from sgl_flowprefill.timeline.history import DecodedRequest, History
from sgl_flowprefill.timeline.pairs import by_room, clock_behind_s
from tests.told import arrival, complete, start
from tests.trace_processor import TraceProcessor, trace_processor

HERE, ELSEWHERE = "machine 1", "machine 2"
AHEAD_S: Final = 5000.0
"""By how much the other machine's clock is ahead."""

PREFILLING: Final[list[AnyEvent]] = [
    Log(9.0, "0.1.0", decodes=False, boot=HERE),
    arrival(9.5, "warm-up", 20.0, room=0),
    arrival(10.0, "named", 11.5, room=71),
    arrival(10.0, "nameless here", 11.5, room=72),
    arrival(10.0, "placeless", 11.5, room=73),
    Ready(10.1, "named", 10.1, 1000, 0, 0.2),
    Ready(10.1, "nameless here", 10.1, 1000, 0, 0.2),
    start(10.1, 0, "named", "nameless here"),
    complete(10.5, 0, "named", "nameless here", forward_s=0.4),
    Leave(10.6, "named"),
    Leave(10.62, "nameless here"),
]
DECODED: Final[list[Decoded]] = [
    Decoded(9.4, "warm-up", 0, 9.3, 9.31, 9.32, 9.33, 9.34, 1),
    Decoded(11.7, "nameless there", 72, 9.99, 10.01, 10.09, 10.63, 10.65, 8, retractions=1),
    Decoded(12.6, "named", 71, 9.99, 10.01, 10.08, 10.61, 10.65, 16),
    Decoded(13.0, "placeless", 73, 9.99, 10.01, reason="Decode handshake failed"),
]
"""What a decode server tells by the clock of the prefill server."""


def decoding(boot: str, ahead_s: float = 0.0) -> list[AnyEvent]:
    """The log of a decode server, whose clock is ahead."""
    told = [
        {name: value + ahead_s if name.endswith("_s") and value is not None else value
         for name, value in msgspec.structs.asdict(event).items()}
        for event in DECODED
    ]  # fmt: skip
    return [Log(9.0 + ahead_s, "0.1.0", decodes=True, prefills=False, boot=boot), *(Decoded(**one) for one in told)]


def written(path: Path, events: Sequence[AnyEvent]) -> Path:
    log = EventLog(path)
    for event in events:
        log.write(type(event), **msgspec.structs.asdict(event))
    log.flush()
    return path


def traced(tmp_path: Path, decode: Sequence[AnyEvent]) -> bytes:
    """The trace of both servers."""
    logs = [written(tmp_path / "events.jsonl", PREFILLING), written(tmp_path / "events-decode.jsonl", decode)]
    write_timeline(logs, tmp_path / "pair.pftrace")
    return (tmp_path / "pair.pftrace").read_bytes()


def assert_joined(perfetto: TraceProcessor) -> None:
    """What a request did at the decode server is by the clock, and under the rid, of the prefill server."""
    assert perfetto.query("SELECT name, value FROM stats WHERE severity != 'info' AND value > 0") == []
    arrows = perfetto.query(
        "SELECT tail.name AS tail, tail.ts / 1000000 AS tail_ms, head.name AS head, head.ts / 1000000 AS head_ms "
        "FROM flow JOIN slice AS tail ON slice_out = tail.id JOIN slice AS head ON slice_in = head.id "
        "ORDER BY tail.ts, head.ts"
    )
    assert arrows == [("KV cache is sent", 10500, "decoding", 10650)] * 2
    requests = perfetto.query(
        "SELECT extract_arg(arg_set_id, 'debug.rid') AS rid, extract_arg(arg_set_id, 'debug.rid_here') AS rid_here, "
        "name, extract_arg(arg_set_id, 'debug.bootstrap_room') AS room, "
        "extract_arg(arg_set_id, 'debug.tokens') AS tokens, extract_arg(arg_set_id, 'debug.ttft_s') AS ttft_s "
        "FROM slice WHERE extract_arg(arg_set_id, 'debug.tokens') > 1 ORDER BY ts + dur"
    )
    assert requests == [
        ("nameless here", "nameless there", "decoded", "0x48", 8, 0.66),
        ("named", None, "decoded", "0x47", 16, 0.66),
    ]


def test_perfetto_shows_what_a_request_did_at_both_servers_and_where_its_kv_cache_went(tmp_path: Path) -> None:
    with trace_processor(traced(tmp_path, decoding(HERE))) as perfetto:
        assert_joined(perfetto)
        did = perfetto.query(
            "SELECT whole.name AS whole, part.name AS what, part.ts / 1000000 AS begin_ms, part.dur / 1000000 AS ms "
            "FROM slice AS part JOIN slice AS whole ON part.parent_id = whole.id "
            "WHERE extract_arg(whole.arg_set_id, 'debug.rid') = 'named' AND part.dur > 0 ORDER BY whole.name, part.ts"
        )
        assert did == [
            ("decoded", "on the way to the scheduler", 9990, 20),
            ("decoded", "waiting for a place", 10010, 70),
            ("decoded", "waiting for its KV cache", 10080, 530),
            ("decoded", "waiting", 10610, 40),
            ("decoded", "decoding", 10650, 1950),
            ("in time", "on the way to the scheduler", 9990, 10),
            ("in time", "waiting for the decode server", 10000, 100),
            ("in time", "running", 10100, 400),
            ("in time", "KV cache is sent", 10500, 100),
        ]
        failed = perfetto.query(
            "SELECT extract_arg(arg_set_id, 'debug.rid') AS rid, extract_arg(arg_set_id, 'debug.reason') AS reason "
            "FROM slice WHERE name = 'failed'"
        )
        assert failed == [("placeless", "Decode handshake failed")]
        streams = perfetto.query(
            "SELECT ts / 1000000 AS ms, CAST(value AS INT) AS streams FROM counter JOIN process_counter_track AS track "
            "ON track_id = track.id WHERE track.name = 'streams' AND ts > 10000000000 ORDER BY ts"
        )
        assert streams == [(10650, 2), (11700, 1), (12600, 0)]


def test_a_decode_server_on_another_machine_is_shown_by_the_clock_of_its_prefill_server(tmp_path: Path) -> None:
    """As both see when KV caches come: here at the same time, but for 10 ms."""
    behind_s = clock_behind_s(History.of(decoding(ELSEWHERE, AHEAD_S)), by_room([History.of(PREFILLING)]))
    assert behind_s == pytest.approx(-AHEAD_S - 0.01)
    decode = [
        msgspec.structs.replace(event, kv_s=event.kv_s - 0.01)
        if isinstance(event, Decoded) and event.kv_s is not None
        else event
        for event in decoding(ELSEWHERE, AHEAD_S)
    ]
    with trace_processor(traced(tmp_path, decode)) as perfetto:
        assert_joined(perfetto)
        names = perfetto.query("SELECT name FROM process WHERE name LIKE 'events%' ORDER BY name")
        assert names == [("events",), ("events-decode (another machine's clock, set by KV caches)",)]


def test_behind_prefill_servers_on_several_machines_no_clock_is_set_and_the_trace_says_so(tmp_path: Path) -> None:
    others = [Log(9.0, "0.1.0", decodes=False, boot="machine 3"), arrival(70.0, "of another", 71.5, room=72)]
    logs = {"events": PREFILLING, "others": others, "decode": decoding(ELSEWHERE, AHEAD_S)}
    prefilled = by_room([History.of(PREFILLING), History.of(others)])
    assert clock_behind_s(History.of(logs["decode"]), prefilled) is None
    write_timeline([written(tmp_path / f"{name}.jsonl", told) for name, told in logs.items()], tmp_path / "it.pftrace")
    with trace_processor((tmp_path / "it.pftrace").read_bytes()) as perfetto:
        names = perfetto.query("SELECT name FROM process WHERE name LIKE 'decode%'")
        assert names == [("decode (its prefill servers have clocks of several machines)",)]


@pytest.mark.parametrize(
    "boots", [(HERE, HERE), ("", ELSEWHERE), (HERE, "")], ids=["one machine", "unknown", "old log"]
)
def test_a_clock_is_left_as_it_is_on_one_machine_and_where_logs_do_not_say_whose_it_is(boots: tuple[str, str]) -> None:
    prefill, decode = boots
    head = Log(9.0, "0.1.0", decodes=False, boot=prefill)
    prefilled = by_room([History.of([head, *PREFILLING[1:]])])
    assert clock_behind_s(History.of(decoding(decode, AHEAD_S)), prefilled) == 0.0
    assert clock_behind_s(History.of(decoding(ELSEWHERE, AHEAD_S)), {}) == 0.0, "no prefill server's log"


def test_of_a_retracted_request_the_time_without_a_known_place_counts_with_what_was_before_it() -> None:
    parts = DecodedRequest(Decoded(12.0, "a", 7, 10.0, queued_s=10.1, first_token_s=10.5, retractions=1)).parts
    assert [(part.what, part.begin_s, part.end_s) for part in parts] == [
        ("on the way to the scheduler", 10.0, 10.1),
        ("waiting for a place", 10.1, 10.5),
        ("decoding", 10.5, 12.0),
    ]


def test_a_history_since_a_time_has_the_requests_that_ended_later() -> None:
    history = History.of(decoding(HERE)).since(12.0)
    assert [one.event.rid for one in history.decoded] == ["named", "placeless"]
    assert history.boot == HERE


def test_the_command_says_how_many_requests_were_decoded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = written(tmp_path / "events-decode.jsonl", decoding(HERE))
    assert main(["timeline", str(log)]) == 0
    assert "events-decode: 4 requests, 3 decoded, 1 failed\n" in capsys.readouterr().out
