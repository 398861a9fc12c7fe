"""A timeline of a prefill server and its decode server: each request is followed from one to the other."""

from __future__ import annotations

import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import requests

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import Arrival, Complete, Decoded, Leave, Log, Start, read_events
from sgl_flowprefill.timeline import write_timeline
from tests.prompts import prompt
from tests.reference import Comparison
from tests.trace_processor import trace_processor
from tests.waiting import until

TOKENS: Final = 300
ANSWER_TOKENS: Final = 4
TIMEOUT_S: Final = 120.0


def ask(url: str, comparison: Comparison, **body: Any) -> str:
    """The rid at the decode server, which answers."""
    tokens = prompt(zlib.crc32(repr(body).encode()), TOKENS)
    sampling = {"max_new_tokens": ANSWER_TOKENS, "ignore_eos": True, "temperature": 0}
    asked = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True} | body
    answer = requests.post(f"{url}/generate", json=asked, timeout=TIMEOUT_S)
    assert answer.ok, answer.text
    told = answer.json()["meta_info"]
    comparison.generated(repr(body), tokens, told)
    rid: str = told["id"]
    return rid


def decoded_since(log: Path, since_s: float) -> dict[str, Decoded]:
    return {event.rid: event for event in read_events(log) if isinstance(event, Decoded) and event.t_s >= since_s}


def assert_in_order(*times_s: float | None) -> None:
    known_s = [time_s for time_s in times_s if time_s is not None]
    assert len(known_s) == len(times_s), times_s
    assert known_s == sorted(known_s)


def test_each_request_of_a_pair_is_followed_from_the_prefill_server_to_the_decode_server(
    flowprefill_cluster: Cluster, comparison: Comparison, tmp_path: Path
) -> None:
    """One whose client names it, and one that each server gives a name of its own."""
    prefill_log, decode_log = flowprefill_cluster.event_logs
    assert decode_log.name == f"{prefill_log.stem}-decode.jsonl"
    since_s = time.monotonic()
    rids = [ask(flowprefill_cluster.url, comparison, rid="followed"), ask(flowprefill_cluster.url, comparison)]
    comparison.assert_same_with_logprobs()
    until(lambda: decoded_since(decode_log, since_s).keys() >= set(rids), TIMEOUT_S)
    decoded = [decoded_since(decode_log, since_s)[rid] for rid in rids]
    rooms = [one.bootstrap_room for one in decoded]

    told: defaultdict[object, dict[type, Any]] = defaultdict(dict)
    """By room what the prefill server tells, by the types of its events."""

    def has_left() -> bool:
        arrivals = {event.rid: event for event in read_events(prefill_log)
                    if isinstance(event, Arrival) and event.bootstrap_room in rooms}  # fmt: skip
        for event in read_events(prefill_log):
            of = event.rids if isinstance(event, Start | Complete) else [getattr(event, "rid", "")]
            for rid in arrivals.keys() & set(of):
                told[arrivals[rid].bootstrap_room][type(event)] = event
        return all(Leave in told[room] for room in rooms)

    until(has_left, TIMEOUT_S)
    for one in decoded:
        at = told[one.bootstrap_room]
        assert_in_order(one.received_s, one.queued_s, one.place_s, one.kv_s, one.first_token_s, one.t_s)
        assert_in_order(one.queued_s, at[Start].t_s, at[Complete].t_s, one.kv_s)  # each waits for the one before
        assert (one.tokens, one.retractions, one.reason) == (ANSWER_TOKENS, 0, None)
    assert told[rooms[0]][Arrival].rid == rids[0] == "followed"

    heads = [next(event for event in read_events(log) if isinstance(event, Log)) for log in (prefill_log, decode_log)]
    assert [head.prefills for head in heads] == [True, False]
    assert heads[0].boot == heads[1].boot, "one machine has one clock"

    write_timeline([prefill_log, decode_log], tmp_path / "pair.pftrace")
    with trace_processor((tmp_path / "pair.pftrace").read_bytes()) as trace:
        rows = trace.query(
            "SELECT tail.name AS tail, head.name AS head, "
            "extract_arg(whole.arg_set_id, 'debug.bootstrap_room') AS room "
            "FROM flow JOIN slice AS tail ON slice_out = tail.id JOIN slice AS head ON slice_in = head.id "
            "JOIN slice AS whole ON head.parent_id = whole.id WHERE head.name = 'decoding'"
        )
    assert {("KV cache is sent", "decoding", hex(room)) for room in rooms if room is not None} <= set(rows)
