"""FlowPrefill against SGLang's own scheduler over HTTP, on one machine.

All servers are up at once and take turns: those that are not measured are stopped. Each replays the same seeded trace,
at the rate at which the simulator, with the profile just measured, gives FlowPrefill an attainment of 95%.

They are prefill servers without a decode server, or unified servers. Requests to the former carry SGLang's fake
bootstrap host, so a time to first token has no KV transfer in it, and no prompt becomes a cached prefix: prompts are
those tokens that are new in the trace. Those to the latter are the same prompts with answers, shortened as the demo
does, and are judged by the times between their tokens, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson
import requests

from sgl_flowprefill.bench.loadgen.calibrate import measure_isolated_ttft, time_scale
from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi
from sgl_flowprefill.bench.loadgen.replay import RequestResult, replay
from sgl_flowprefill.bench.metrics.joint import meets, share
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.metrics.requests import blocking_times_s, events_within, summarise_steps
from sgl_flowprefill.bench.simulator.joint import attainments
from sgl_flowprefill.bench.simulator.measured import Engine, measured_setup
from sgl_flowprefill.bench.simulator.search import highest
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.systems import Setup, Simulated
from sgl_flowprefill.bench.systems.catalog import RIVAL, SYSTEMS, UNIFIED
from sgl_flowprefill.bench.systems.serving import Servers
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.answers import UNIFIED_DECODE_SHARE, Answers
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS, qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.cluster import preflight
from sgl_flowprefill.cluster.commands import Role
from sgl_flowprefill.cluster.process import Guard, Server
from sgl_flowprefill.config import FlowPrefillConfig, command_line
from sgl_flowprefill.gpu_report.phases import UNIFIED_GOODPUT
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request, quantiles_ms
from sgl_flowprefill.gpu_report.phases.operators import FILE
from sgl_flowprefill.gpu_report.tuning import choose
from sgl_flowprefill.patches import lone_prefill, made_weights

COMPARED: Final = ("flowprefill", "stock-spf-2048", "sglang")
COMPARED_UNIFIED: Final = (UNIFIED, RIVAL, "unified-sglang")
ATTAINMENT: Final = 0.95
SIMULATED_REQUESTS: Final = 500
"""Requests of the simulated trace that the rate is chosen by; the replayed ones are too few to choose it by."""
SEED: Final = 0
LONGEST_REPLAY_S: Final = 60.0
SHORTEST_REPLAY_S: Final = 10.0
STREAMS: Final = 16
STREAM_TOKENS: Final = 1024
"""Streams, and their tokens, by whose decode steps it is judged what a unified server carries."""
START_S: Final = 600.0
WAKE_S: Final = 0.5
CARD_SHARE: Final = 0.85
"""Share of a card's memory for all servers together."""
BESIDE_BYTES: Final = 6 << 30
"""Memory of each server beside weights and KV cache: CUDA, attention workspaces, activations."""
MOST_KV_TOKENS: Final = 200_000
LEAST_KV_TOKENS: Final = 40_000
COLUMNS: Final = (
    "system", "settings", "in time", "in time, by class", "TTFT p50 / p99", "gaps p50 / p99", "blocking p50 / p99",
)  # fmt: skip


@dataclass(frozen=True)
class PrefillOnlyApi(GenerateApi):
    """Requests that need no decode server."""

    rooms: Iterator[int] = dataclasses.field(default_factory=lambda: itertools.count(1))

    def body(
        self, prompt: list[int], output_tokens: int, ttft_slo_s: float | None, tbt_slo_s: float | None = None
    ) -> bytes:
        request = orjson.loads(super().body(prompt, 1, ttft_slo_s))
        return orjson.dumps(
            request | {"bootstrap_host": lone_prefill.FAKE_BOOTSTRAP_HOST, "bootstrap_room": next(self.rooms)}
        )


@dataclass(frozen=True)
class MeasuredServer:
    """A system's server, which has the card to itself while it is measured."""

    system: System
    options: FlowPrefillConfig
    server: Server
    client: Client
    event_log: Path


def measure(request: Request) -> Iterator[Outcome]:
    """Replay a trace on each system. A server of SGLang's that does not start is named, and the rest is compared."""
    profile = request.earlier("operators")
    if not profile:
        yield Outcome("left out", "there are no operator times to choose a rate by")
        return
    steps = request.earlier("steps").get("step_costs")
    if request.phase == UNIFIED_GOODPUT and not steps:
        yield Outcome("left out", "there are no times of decode steps to choose a rate by")
        return
    engine = profile["engine"] | {name: value for name, value in request.earlier("machine").items() if "bytes" in name}
    tuned = {choice.option: choice.value for choice in choose(request.earlier)}
    with ExitStack() as stack:
        guard = stack.enter_context(Guard())
        names = COMPARED_UNIFIED if request.phase == UNIFIED_GOODPUT else COMPARED
        systems, kv_tokens = systems_that_fit(engine, names)
        servers = [_start(guard, request, system, tuned, profile, kv_tokens) for system in systems]
        for server in servers:
            stack.callback(server.server.resume)  # what is stopped does not end
        _wait(servers[0])
        lost = {SYSTEMS[name].label: "no place for its server on the card" for name in names[len(systems) :]}
        for server in servers[1:]:
            try:
                _wait(server)
            except RuntimeError as error:
                lost[server.system.label] = str(error)
        up = [server for server in servers if server.system.label not in lost]
        for outcome in compare(request, up, engine, profile, steps):
            if lost:
                line = f"{outcome.line}; not up: {', '.join(lost)}"
                outcome = dataclasses.replace(outcome, line=line, figures=outcome.figures | {"not_up": lost})
            yield outcome


def systems_that_fit(engine: Mapping[str, Any], names: Sequence[str] = COMPARED) -> tuple[list[System], int | None]:
    """The systems whose servers fit on the card side by side, and how much KV cache each may have there."""
    systems = [SYSTEMS[name] for name in names]
    if "free_bytes" not in engine:
        return systems, None
    for count in range(len(systems), 1, -1):
        each_bytes = CARD_SHARE * engine["free_bytes"] / count - engine["weights_bytes"] - BESIDE_BYTES
        tokens = int(each_bytes / engine["kv_bytes_per_token"])
        if tokens >= LEAST_KV_TOKENS:
            return systems[:count], min(tokens, MOST_KV_TOKENS)
    raise ValueError("no two servers of this model fit on the card")


def _start(
    guard: Guard,
    request: Request,
    system: System,
    tuned: Mapping[str, float],
    profile: Mapping[str, Any],
    kv_tokens: int | None,
) -> MeasuredServer:
    log_dir = request.out / "logs"
    event_log = log_dir / f"{system.name}-events.jsonl"
    event_log.unlink(missing_ok=True)
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--model-path")
    own, server_args = parser.parse_known_args(list(request.options))
    if kv_tokens is not None:
        server_args += ["--max-total-tokens", str(kv_tokens), "--mem-fraction-static", "0.9"]
    measured = {"profile": profile["profile"]} if profile["complete"] else {}
    options = FlowPrefillConfig.parse({} if system.is_stock else {**tuned, **measured})
    config = Servers(own.model_path, tuple(server_args), options=options).cluster(system, log_dir, event_log)
    layout = preflight.prepare(dataclasses.replace(config, decode=0))
    role: Role = "unified" if system.is_unified else "prefill"
    env = layout.server_env(role) | {lone_prefill.ENV_SWITCH: "1"} | _weights(server_args)
    server = guard.start(system.name, layout.server_command(role), env, log_dir / f"{system.name}.log")
    api = GenerateApi() if system.is_unified else PrefillOnlyApi()
    return MeasuredServer(system, config.options, server, Client(layout.server_url(role), api), event_log)


def _weights(server_args: Sequence[str]) -> dict[str, str]:
    return {made_weights.ENV_SWITCH: "1"} if "dummy" in server_args else {}


def _wait(lone: MeasuredServer) -> None:
    """Until the server answers. Raises RuntimeError with the end of its log if it does not come up."""
    give_up_s = time.monotonic() + START_S
    while time.monotonic() < give_up_s:
        ended = lone.server.ended()
        if ended:
            raise RuntimeError(f"{ended}; its log ends with:\n{lone.server.last_lines()}")
        try:
            requests.get(f"{lone.client.url}/health", timeout=30).raise_for_status()
            return
        except requests.RequestException:
            time.sleep(0.2)
    raise RuntimeError(f"the server of {lone.system.name} is not up after {START_S:.0f} s")


def compare(
    request: Request,
    servers: Sequence[MeasuredServer],
    engine: Mapping[str, Any],
    profile: Mapping[str, Any],
    steps: Mapping[str, float] | None = None,
) -> Iterator[Outcome]:
    """``steps``: what decode steps cost, which unified servers run."""
    prompts = PromptBuilder(SEED)
    ours = servers[0]
    for other in servers[1:]:
        other.server.suspend()
    isolated_ttft_s = measure_isolated_ttft(ours.client, prompts)
    scale = time_scale(isolated_ttft_s)
    known = Engine(str(request.out / FILE), int(profile["layers"]), engine.get("kv_tokens"), 0.0)
    setup = measured_setup(known, isolated_ttft_s, ours.options)
    judge: Judge = "ttft"
    decode_tokens_per_s = None
    if ours.system.is_unified:
        assert steps is not None
        cost = StepCost(steps["fixed_s"], steps["per_request_s"], steps["per_token_s"], "measured on this machine")
        setup, judge = dataclasses.replace(setup, step_cost=cost), "gaps"
        decode_tokens_per_s = STREAMS / cost.predict_s(STREAMS, STREAMS * STREAM_TOKENS)
    duration_s = min(LONGEST_REPLAY_S, max(SHORTEST_REPLAY_S, 0.8 * request.budget.left_s / len(servers)))

    def kept(rate_rps: float) -> bool:
        long = trace_at(rate_rps, scale, SIMULATED_REQUESTS / rate_rps, decode_tokens_per_s)
        return _simulated(ours, long, setup, judge) >= ATTAINMENT

    rate_rps = highest(kept, QWEN_RATE_RPS / scale)
    trace = trace_at(rate_rps, scale, duration_s, decode_tokens_per_s)
    figures = {
        "trace": trace.name,
        "seed": SEED,
        "judge": judge,
        "rate_rps": rate_rps,
        "duration_s": duration_s,
        "time_scale": scale,
        "requests": len(trace.requests),
        "answer_tokens": sum(one.output_tokens for one in trace.requests) / max(1, len(trace.requests)),
        "decode_tokens_per_s": decode_tokens_per_s,
        "isolated_ttft_s": {str(tokens): ttft_s for tokens, ttft_s in isolated_ttft_s.items()},
    }
    rows: list[dict[str, Any]] = []
    for lone in servers:
        for other in servers:
            if other is not lone:
                other.server.suspend()
        lone.server.resume()
        time.sleep(WAKE_S)
        simulated = _simulated(lone, trace, setup, judge)
        rows.append(replayed(lone, trace, prompts, judge) | {"simulated_attainment": simulated})
        yield _outcome(rows, figures)


def _simulated(lone: MeasuredServer, trace: Trace, setup: Setup, judge: Judge) -> float:
    """What the simulator takes the attainment to be."""
    how: Simulated | None = lone.system.simulated(lone.options)
    assert how is not None, "only endpoints cannot be simulated"
    return attainments(how, [trace], setup)[judge]


def trace_at(rate_rps: float, scale: float, duration_s: float, decode_tokens_per_s: float | None) -> Trace:
    """The trace at a rate; its answers are a token each, or what the server carries of them beside its prefills."""
    count = 1 << math.ceil(math.log2(1.5 * rate_rps * duration_s + 50))
    drawn = _drawn(count).scaled(rate_scale=rate_rps * scale / QWEN_RATE_RPS, time_scale=scale)
    new = [
        dataclasses.replace(one, prompt_tokens=one.new_tokens, hash_ids=(), shared_tokens=0)
        for one in drawn.until(duration_s).requests
    ]
    trace = dataclasses.replace(drawn, requests=new)
    if decode_tokens_per_s is None or not new:
        return Answers(max_tokens=1).of(trace)
    return Answers.carried(trace, rate_rps, decode_tokens_per_s, UNIFIED_DECODE_SHARE).of(trace)


@functools.cache
def _drawn(count: int) -> Trace:
    """The first ``count`` requests, at the workload's own rate: a search asks for them at many rates."""
    return qwen_like(count, SEED)


def replayed(lone: MeasuredServer, trace: Trace, prompts: PromptBuilder, judge: Judge) -> dict[str, Any]:
    """A row of the report: what one server makes of the trace."""
    run = replay(trace, lone.client, prompts)
    events = events_within(lone.event_log, [run.span_s])
    blocking_s = blocking_times_s(events)
    steps = summarise_steps(events, run.duration_s)
    answered = [one for one in run.results if one.completed and one.ttft_s is not None]
    gaps_s = [gap_s for one in answered for gap_s in one.tbt_s]

    def attainment(results: Sequence[RequestResult]) -> float:
        return share(meets(one, judge) for one in results)

    return {
        "system": lone.system.name,
        "label": lone.system.label,
        "settings": lone.system.settings
        if lone.system.is_stock
        else command_line(lone.options.model_dump(exclude_defaults=True, exclude={"event_log", "profile"})),
        "requests": len(run.results),
        "failed": sum(not one.completed for one in run.results),
        "errors": sorted({one.error for one in run.results if one.error})[:3],
        "attainment": attainment(run.results),
        "attainment_by_class": {
            name: attainment([one for one in run.results if one.request_class == name]) for name in trace.classes
        },
        "ttft": quantiles_ms([one.ttft_s for one in answered if one.ttft_s is not None]) if answered else None,
        "gaps": quantiles_ms(gaps_s) if gaps_s else None,
        "preemptions": len(blocking_s),
        "blocking": quantiles_ms(blocking_s) if blocking_s else None,
        "steps": None if steps is None else dataclasses.asdict(steps),
        "client_invalid": run.client.invalid_reason,
    }


def _outcome(rows: Sequence[dict[str, Any]], figures: Mapping[str, Any]) -> Outcome:
    def ms(row: dict[str, Any], name: str, digits: int) -> str:
        found = row[name]
        return "–" if found is None else f"{found['p50_ms']:.{digits}f} / {found['p99_ms']:.{digits}f} ms"

    table = [
        (
            row["label"],
            row["settings"],
            f"{row['attainment']:.1%} (simulated {row['simulated_attainment']:.1%})",
            ", ".join(f"{name} {share:.0%}" for name, share in row["attainment_by_class"].items()),
            ms(row, "ttft", 0),
            ms(row, "gaps", 1),
            ms(row, "blocking", 1),
        )
        for row in rows
    ]
    in_time = ", ".join(f"{row['label']} {row['attainment']:.1%}" for row in rows)
    failed = sum(row["failed"] for row in rows)
    line = (
        f"at {figures['rate_rps']:.2f} req/s ({figures['trace']}, {figures['requests']} requests each), in time: "
        f"{in_time}"
    )
    if failed:
        line += f"; {failed} requests failed"
    return Outcome("FAILED" if failed else "measured", line, COLUMNS, table, {**figures, "rows": list(rows)})
