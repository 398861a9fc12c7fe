"""SGLang's OpenTelemetry traces of requests (``--enable-trace``), with FlowPrefill's spans in them."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final, NamedTuple

import pytest
import requests

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.cluster.top_command import documents
from sgl_flowprefill.events import Arrival, decode_events
from sgl_flowprefill.live import EVENTS
from sgl_flowprefill.live.state import State
from tests.otlp import Collector, Span
from tests.prompts import prompt
from tests.reference import Comparison

LONG_TOKENS: Final = 9000
SHORT_TOKENS: Final = 300
STREAM_TOKENS: Final = 200
TIMEOUT_S: Final = 120.0
CLOCKS_APART_S: Final = 0.05
"""SGLang makes wall-clock times of monotonic ones with a difference that it measures anew for each request."""


class Asked(NamedTuple):
    """A request, and what its answer says of itself."""

    trace: str
    prompt: list[int]
    meta_info: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.meta_info["flowprefill"]
        return report


def ask(url: str, rid: str, tokens: int, slo_s: float, output_tokens: int = 2) -> Asked:
    """Answered as part of a trace that its client has begun."""
    trace = f"{zlib.crc32(rid.encode()):032x}"
    sampling = {
        "max_new_tokens": output_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "custom_params": {"ttft_slo": slo_s, "tbt_slo": 0.1},
    }
    ids = prompt(zlib.crc32(rid.encode()), tokens)
    body = {"rid": rid, "input_ids": ids, "sampling_params": sampling, "return_logprob": True}
    headers = {"traceparent": f"00-{trace}-00000000000000aa-01"}
    answer = requests.post(f"{url}/generate", json=body, headers=headers, timeout=TIMEOUT_S).json()
    return Asked(trace, ids, answer["meta_info"])


def wait_until(url: str, what: Callable[[State], bool]) -> None:
    """Wait until ``what`` is true of the scheduler."""
    begin_s = time.monotonic()
    for document in documents(url, None):
        if any(server.state is not None and what(server.state) for server in document.servers):
            return
        assert time.monotonic() - begin_s < TIMEOUT_S, document


def asked_together(url: str) -> dict[str, Asked]:
    """A stream, a long prompt while it has tokens to come, and while that runs short ones, which are due before it."""
    with ThreadPoolExecutor(2) as clients:
        stream = clients.submit(ask, url, "stream", SHORT_TOKENS, 60.0, STREAM_TOKENS)
        wait_until(url, lambda state: state.streams > 0)
        long = clients.submit(ask, url, "long", LONG_TOKENS, 100.0)
        wait_until(url, lambda state: any(task.runs and task.rids == ["long"] for task in state.tasks))
        shorts = {f"short-{i}": ask(url, f"short-{i}", SHORT_TOKENS, 20.0) for i in range(3)}
        return shorts | {"stream": stream.result(TIMEOUT_S), "long": long.result(TIMEOUT_S)}


def collected(collector: Collector, traces: set[str], servers: int = 1) -> dict[str, list[Span]]:
    """The spans of ``traces``, as soon as each has the span of the whole request of each of ``servers``, which ends
    last, and those of their schedulers, which come from processes of their own. In the order of their begins."""
    of_schedulers = {"prefill_forward"} if servers == 1 else {"prefill_forward", "decode_transferred"}
    deadline_s = time.monotonic() + TIMEOUT_S
    while True:
        found = {trace: [span for span in collector.spans if span.trace == trace] for trace in traces}
        names = [{span.name for span in spans} for spans in found.values()]
        if all(of_schedulers <= of_trace and sum("Req" in name for name in of_trace) >= servers for of_trace in names):
            return {trace: sorted(spans, key=lambda span: span.begin_ns) for trace, spans in found.items()}
        assert time.monotonic() < deadline_s, names
        time.sleep(0.2)


def test_a_request_trace_says_where_its_prefill_was_suspended_and_what_became_of_it(
    unified_server: Cluster, collector: Collector, comparison: Comparison
) -> None:
    asked = asked_together(unified_server.url)
    for rid in asked.keys() - {"long"}:  # transformers would take as long as the rest of the test
        comparison.generated(rid, asked[rid].prompt, asked[rid].meta_info)
    comparison.assert_same_with_logprobs()
    spans = collected(collector, {one.trace for one in asked.values()})
    by_name = {rid: {span.name: span for span in spans[one.trace]} for rid, one in asked.items()}

    for rid, one in asked.items():
        [root] = [span for span in spans[one.trace] if span.parent == f"{0xAA:016x}"]
        told = {name.removeprefix("flowprefill."): value for name, value in root.attributes.items()
                if name.startswith("flowprefill.")}  # fmt: skip
        assert told == {name: value for name, value in one.report.items() if value is not None}, rid
        [can_run] = [event for event in by_name[rid]["prefill_waiting"].events if event.name == "flowprefill_can_run"]
        assert can_run.attributes["slack_s"] == pytest.approx(one.report["slack_at_admission_s"], abs=CLOCKS_APART_S)

    forward = by_name["long"]["prefill_forward"]
    inside = [span for span in spans[asked["long"].trace] if span.parent == forward.id]
    pieces = [span for span in inside if span.name in ("flowprefill_run", "flowprefill_suspended")]
    assert [span.name for span in pieces[::2]] == ["flowprefill_run"] * len(pieces[::2]), "it runs first and last"
    assert all(before.end_ns == pytest.approx(after.begin_ns, abs=1e9 * CLOCKS_APART_S)
               for before, after in pairwise(pieces))  # fmt: skip
    suspended = [span for span in pieces if span.name == "flowprefill_suspended"]
    assert len(suspended) == asked["long"].report["suspensions"] >= 1
    assert len(pieces) == 2 * len(suspended) + 1
    suspended_s = sum(span.end_ns - span.begin_ns for span in suspended) / 1e9
    assert suspended_s == pytest.approx(asked["long"].report["suspended_s"], abs=1e-3)
    for_rids = {rid for span in suspended for rid in span.attributes["for_rids"]}
    assert for_rids <= {"short-0", "short-1", "short-2"}
    for rid in for_rids:
        [run] = [span for span in spans[asked[rid].trace] if span.name == "flowprefill_run"]
        assert any(span.begin_ns <= run.begin_ns and run.end_ns <= span.end_ns for span in suspended), rid
    steps = [span for span in inside if span.name == "flowprefill_decode_step"]
    assert steps, "the stream gets its tokens meanwhile"
    print(f"{len(collector.spans)} spans; of the long prompt {len(pieces)} pieces, {len(steps)} decode steps")


def test_a_trace_of_a_pair_has_what_both_servers_did_with_a_request(
    flowprefill_cluster: Cluster, collector: Collector, comparison: Comparison
) -> None:
    """The gateway hands the client's header on to both. Without one, each server begins a trace of its own, and the
    bootstrap room says which belong together."""
    asked = ask(flowprefill_cluster.url, "pair", SHORT_TOKENS, 60.0)
    comparison.generated("pair", asked.prompt, asked.meta_info)
    comparison.assert_same_with_logprobs()
    spans = collected(collector, {asked.trace}, servers=2)[asked.trace]
    roots = {span.name.split()[0]: span for span in spans if span.parent == f"{0xAA:016x}"}
    assert set(roots) == {"prefill", "decode"}
    lines = requests.get(f"{flowprefill_cluster.prefill_url}{EVENTS}?seconds=300", timeout=TIMEOUT_S).content
    [room] = [
        event.bootstrap_room for event in decode_events(lines) if isinstance(event, Arrival) and event.rid == "pair"
    ]
    assert room is not None
    assert {root.attributes["bootstrap_room"] for root in roots.values()} == {hex(room)}, "as a timeline says it, too"

    told = {name.removeprefix("flowprefill."): value for name, value in roots["decode"].attributes.items()
            if name.startswith("flowprefill.")}  # fmt: skip
    assert told == {name: value for name, value in asked.report.items() if value is not None}
    assert roots["prefill"].attributes["flowprefill.met"] is True
    assert roots["prefill"].attributes["flowprefill.predicted_s"] > 0

    by_name = {span.name: span for span in spans}
    assert by_name["flowprefill_run"].parent == by_name["prefill_forward"].id
    waits, runs, arrives = (by_name[name] for name in ("decode_bootstrap", "prefill_forward", "decode_transferred"))
    assert waits.begin_ns <= runs.begin_ns + 1e9 * CLOCKS_APART_S, "for a place at the decode server"
    assert runs.begin_ns <= arrives.end_ns + 1e9 * CLOCKS_APART_S, "its KV cache"
