"""``bench breakdown``: where the time of an isolated request goes, from the client's call to its first token.

Times come from the client, FlowPrefill's event log (both on the machine's monotonic clock) and SGLang's request time
statistics (``--enable-request-time-stats-logging``), joined by request id and bootstrap room. Requests go alternately
through the gateway and, for what it adds, to the servers themselves.
"""

from __future__ import annotations

import asyncio
import dataclasses
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import aiohttp
import numpy as np
import orjson
from rich import box
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Breakdown
from sgl_flowprefill.bench.cli.requested import requested_servers
from sgl_flowprefill.bench.loadgen.client import JSON_HEADERS, Outcome, get_json
from sgl_flowprefill.bench.systems.catalog import SYSTEMS
from sgl_flowprefill.bench.systems.serving import Served, serve
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.events import AnyEvent, Arrival, Complete, read_events
from sgl_flowprefill.provenance import result, write_result

LOG_OPTION: Final = "--enable-request-time-stats-logging"
OUTPUT_TOKENS: Final = 2
PAUSE_S: Final = 0.05
"""Between requests: each finds servers that sleep."""

STAGES: Final[Mapping[str, str]] = {
    "request": "client and gateway, up to the prefill's HTTP server",
    "tokenizer": "prefill's HTTP server and tokenizer, up to its scheduler",
    "handshake": "bootstrap: the decode server reserves KV cache and says where",
    "queue": "handshake done, up to the start of the forward",
    "forward": "the prefill itself",
    "transfer": "KV cache to the decode server, until its scheduler has seen it",
    "decode": "decode scheduler and HTTP server, up to the first event",
    "answer": "back through gateway and client",
}
STATS: Final = re.compile(
    r"ReqTimeStats\(rid=(?P<rid>[^,]+), bootstrap_room=(?P<room>\d+), .*?type=(?P<type>\w+)\): (?P<durations>.*)"
)
DURATION: Final = re.compile(r"(\w+)=([\d.]+)(ms)?\b")


class Sent(NamedTuple):
    """An isolated request as its client saw it."""

    tokens: int
    through_gateway: bool
    sent_s: float
    first_token_s: float
    left_server_s: float
    """When the decode's HTTP server sent the first event."""


def run(options: Breakdown, console: Console) -> int:
    """Measure, print the table, write ``breakdown.json``. Raises ClusterError or ConfigError."""
    servers = requested_servers(options.servers)
    servers = dataclasses.replace(servers, server_args=(*servers.server_args, LOG_OPTION))

    def say(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    with serve(SYSTEMS["flowprefill"], servers, options.out, say) as served:
        sent = asyncio.run(_send_all(served, options, say))
        served.come_to_rest()  # the event log is complete when its server is idle
        assert served.event_log is not None
        logs = [served.cluster.config.log_dir / f"{name}.log" for name in ("prefill", "decode")]
        stages = [
            (request, split(request, list(read_events(served.event_log)), *(time_stats(log) for log in logs)))
            for request in sent
        ]
    rows = [row(tokens, [pair for pair in stages if pair[0].tokens == tokens]) for tokens in options.tokens]
    figures = {
        "rows": rows,
        "stages": STAGES,
        "repeats": options.repeats,
        "model": servers.model,
    }
    write_result(options.out / "breakdown.json", result("breakdown", figures))
    console.print(_table(rows))
    say(f"Figures: {options.out / 'breakdown.json'}")
    return 0


def split(
    request: Sent,
    events: Sequence[AnyEvent],
    prefill: Mapping[str, Mapping[str, Any]],
    decode: Mapping[str, Mapping[str, Any]],
) -> dict[str, float]:
    """Seconds of each of STAGES; they add up to the request's TTFT.

    ``prefill`` and ``decode`` are the time statistics of the servers' logs by bootstrap room, ``events`` those of the
    event log. Raises ValueError if the request is in none.
    """
    arrivals = [
        event
        for event in events
        if isinstance(event, Arrival) and request.sent_s <= event.received_s < request.first_token_s
    ]
    if len(arrivals) != 1:
        raise ValueError(f"{len(arrivals)} requests arrived during an isolated one: something else uses the servers")
    arrival = arrivals[0]
    (complete,) = (event for event in events if isinstance(event, Complete) and arrival.rid in event.rids)
    (room,) = (room for room, stats in prefill.items() if stats["rid"] == arrival.rid)
    handshake_s = prefill[room]["bootstrap_duration"]
    there_s = decode[room]["entry_time"] + sum(
        decode[room].get(name, 0.0)
        for name in ("bootstrap_duration", "alloc_wait_duration", "prealloc_queue_duration", "transfer_duration")
    )
    ends_s = {
        "request": arrival.received_s,
        "tokenizer": arrival.t_s,
        "handshake": arrival.t_s + handshake_s,
        "queue": complete.t_s - complete.forward_s,
        "forward": complete.t_s,
        "transfer": there_s,
        "decode": request.left_server_s,
        "answer": request.first_token_s,
    }
    begins_s = [request.sent_s, *ends_s.values()]
    return {stage: end_s - begin_s for (stage, end_s), begin_s in zip(ends_s.items(), begins_s, strict=False)}


def row(tokens: int, stages: Sequence[tuple[Sent, Mapping[str, float]]]) -> dict[str, Any]:
    """Medians over the requests of a length: TTFT, its stages, all but the forward, and what the gateway adds."""

    def median_s(of: Callable[[Sent, Mapping[str, float]], float], through_gateway: bool = True) -> float:
        return float(np.median([of(sent, split) for sent, split in stages if sent.through_gateway == through_gateway]))

    def outside_s(sent: Sent, split: Mapping[str, float]) -> float:
        return sent.first_token_s - sent.sent_s - split["forward"]

    return {
        "tokens": tokens,
        "ttft_s": median_s(lambda sent, split: sent.first_token_s - sent.sent_s),
        "stages_s": {stage: median_s(lambda sent, split, stage=stage: split[stage]) for stage in STAGES},  # type: ignore[misc]
        "outside_forward_s": median_s(outside_s),
        "outside_forward_direct_s": median_s(outside_s, through_gateway=False),
        "gateway_s": median_s(outside_s) - median_s(outside_s, through_gateway=False),
    }


async def _send_all(served: Served, options: Breakdown, say: Callable[[str], None]) -> list[Sent]:
    prompts = PromptBuilder(options.seed)
    info = await get_json(f"{served.cluster.prefill_url}/server_info")
    bootstrap = {"bootstrap_host": "127.0.0.1", "bootstrap_port": info["disaggregation_bootstrap_port"]}
    sent = []
    index = 0
    async with served.client.session() as session:
        for tokens in options.tokens:
            for repeat in range(options.repeats + 1):
                for through_gateway in (True, False):
                    body = orjson.loads(served.client.api.body(prompts.unique(tokens, index), OUTPUT_TOKENS, None))
                    index += 1
                    await asyncio.sleep(PAUSE_S)
                    if through_gateway:
                        one = await _first_token(session, served.client.url, body, tokens, True)
                    else:
                        body |= bootstrap | {"bootstrap_room": random.getrandbits(63)}
                        prefill = asyncio.create_task(_drain(session, served.cluster.prefill_url, body))
                        one = await _first_token(session, served.cluster.decode_url, body, tokens, False)
                        await prefill
                    if repeat:  # the first ones warm up
                        sent.append(one)
            say(f"{tokens} tokens: {options.repeats} requests through the gateway, {options.repeats} without")
    return sent


async def _first_token(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any], tokens: int, through_gateway: bool
) -> Sent:
    to_monotonic_s = time.monotonic() - time.time()
    outcome = Outcome(sent_s=time.monotonic())
    first: dict[str, Any] | None = None
    async with session.post(f"{url}/generate", data=orjson.dumps(body), headers=JSON_HEADERS) as response:
        async for line in response.content:
            if line.startswith(b"data: {") and first is None:
                outcome.first_token_s = time.monotonic()
                first = orjson.loads(line[6:])
    if first is None or "error" in first or outcome.first_token_s is None:
        raise ClusterError(f"an isolated request of {tokens} tokens to {url} failed: {first or response.status}")
    left_server_s = first["meta_info"]["response_sent_to_client_ts"] + to_monotonic_s
    return Sent(tokens, through_gateway, outcome.sent_s, outcome.first_token_s, left_server_s)


async def _drain(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(f"{url}/generate", data=orjson.dumps(body), headers=JSON_HEADERS) as response:
        await response.read()


def time_stats(log: Path) -> dict[str, dict[str, Any]]:
    """SGLang's request time statistics of a server's log, by bootstrap room; durations in s, entry_time monotonic."""
    to_monotonic_s = time.monotonic() - time.time()
    found = {}
    for match in STATS.finditer(log.read_text(errors="replace")):
        stats: dict[str, Any] = {
            name: float(value) / (1e3 if unit else 1) for name, value, unit in DURATION.findall(match["durations"])
        }
        stats["entry_time"] += to_monotonic_s
        found[match["room"]] = stats | {"rid": match["rid"]}
    return found


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Median ms of an isolated request", title_justify="left")
    table.add_column("")
    for entry in rows:
        table.add_column(f"{entry['tokens']} tokens", justify="right")
    for stage, what in STAGES.items():
        table.add_row(what, *(f"{entry['stages_s'][stage] * 1e3:.1f}" for entry in rows))
    table.add_section()
    for key, what in (
        ("ttft_s", "time to first token"),
        ("outside_forward_s", "all but the forward"),
        ("outside_forward_direct_s", "the same without the gateway"),
    ):
        table.add_row(what, *(f"{entry[key] * 1e3:.1f}" for entry in rows))
    return table
