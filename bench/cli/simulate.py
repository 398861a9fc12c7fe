"""``bench simulate``: policies on a model of the machine, side by side with stock SGLang and with the limit."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import orjson
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import attainment_share, positive_float, positive_int
from sgl_flowprefill.bench.metrics.requests import summarise, summarise_blocking
from sgl_flowprefill.bench.reports.table import milliseconds, percent, seconds
from sgl_flowprefill.bench.simulator.cost import LLAMA_8B, MODELS, cost_model
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.place_speed import step_cost
from sgl_flowprefill.bench.simulator.requests import Conditions, prepare, resampled, results
from sgl_flowprefill.bench.simulator.router import ROUTERS
from sgl_flowprefill.bench.simulator.search import fewest_instances, max_limit_rps, max_rate_rps, mean_limit
from sgl_flowprefill.bench.simulator.speed import KINDS, EventCost, event_cost, policy_speed
from sgl_flowprefill.bench.simulator.stock import MAX_PREFILL_TOKENS
from sgl_flowprefill.bench.simulator.systems import HEADLINE, NAMES_HELP, Run, Setup, new_instance
from sgl_flowprefill.bench.simulator.systems import run as simulated
from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.policy import POLICIES, Limits, make_policy

ATTAINMENTS: Final = (0.9, 0.99)
POOL: Final = 20_000
"""Requests that are generated one by one; longer runs draw theirs from them."""
QUEUE_LENGTHS: Final = (100, 1_000, 10_000, 100_000)
PLACES_WAITED_FOR: Final = (1_000, 5_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench simulate``."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--goodput", action="store_true", help="search each policy's highest rate at 90%% and 99%%")
    what.add_argument("--plan", action="store_true", help="search the fewest instances that keep --attainment")
    what.add_argument("--speed", action="store_true", help="measure how fast the policy is by itself")
    parser.add_argument(
        "--policy",
        nargs="+",
        default=list(HEADLINE),
        metavar="NAME",
        help=f"{NAMES_HELP} (default: a comparison of {len(HEADLINE)})",
    )
    parser.add_argument(
        "--cost", default=LLAMA_8B.name, metavar="NAME|FILE", help=f"{', '.join(MODELS)}, or the file of a TTFT profile"
    )
    parser.add_argument("--layers", type=positive_int, default=32, help="layers of a profile's model (default 32)")
    parser.add_argument(
        "--trace", nargs="+", default=["qwen-like"], metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or trace files"
    )
    parser.add_argument("--rate", type=positive_float, metavar="RPS", help="arrival rate (default: the trace's own)")
    parser.add_argument(
        "--time-scale", type=positive_float, default=1.0, metavar="X", help="factor of arrivals and SLOs"
    )
    parser.add_argument("--requests", type=positive_int, default=4000, help="requests of a run (default 4000)")
    parser.add_argument("--seeds", type=positive_int, default=3, help="runs, with seeds 0, 1, ... (default 3)")
    parser.add_argument("--instances", type=positive_int, default=1, help="prefill instances (default 1)")
    parser.add_argument("--router", choices=list(ROUTERS), default="least-work")
    parser.add_argument("--attainment", type=attainment_share, default=0.99, help="of --plan (default 0.99)")
    parser.add_argument("--max-suspended", type=positive_int, default=16)
    parser.add_argument("--max-batch-tokens", type=positive_int, default=2048, help="1: no batches (default 2048)")
    parser.add_argument("--max-starvation-s", type=positive_float, default=60.0)
    parser.add_argument(
        "--max-blocking-ms", type=positive_float, default=5.0, help="tiles of long operators (default 5)"
    )
    parser.add_argument("--lookahead", type=int, default=0, help="operators queued on the device (default 0)")
    parser.add_argument("--hub-us", type=float, default=0.0, help="time of a visit to the scheduler (default 0)")
    parser.add_argument("--bootstrap-ms", type=float, default=0.0, help="time before a request can start (default 0)")
    parser.add_argument("--kv-tokens", type=positive_int, help="KV cache of an instance (default: the cost model's)")
    parser.add_argument(
        "--link-gbps", type=positive_float, default=math.inf, help="KV transfer, Gbit/s (default: no time)"
    )
    parser.add_argument("--prediction-error", type=float, default=0.0, help="sd of the log of predictions (default 0)")
    parser.add_argument(
        "--prediction-bias", type=positive_float, default=1.0, metavar="X", help="factor of all predictions (default 1)"
    )
    parser.add_argument("--no-prefix-cache", action="store_true", help="compute every prompt whole")
    parser.add_argument("--no-limit", action="store_true", help="leave out the clairvoyant limit (slow beyond 10,000)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")


def run(args: argparse.Namespace, console: Console) -> int:
    """Simulate, print tables, write JSON. Raises ValueError with a sentence for what cannot be simulated."""
    setup = _setup(args)
    for system in args.policy:
        new_instance(system, setup)
    report: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "sgl_flowprefill.bench", *sys.argv[1:]]),
        "cost": dataclasses.asdict(setup.machine.cost),
        "instances": args.instances,
        "seeds": args.seeds,
        "traces": {},
    }
    if args.speed:
        report["speed"] = _speed(args, setup, console)
    else:
        action = _goodput if args.goodput else _plan if args.plan else _compare
        for name in args.trace:
            traces = [_trace(name, args, seed) for seed in range(args.seeds if name in WORKLOADS else 1)]
            report["traces"][name] = action(name, traces, args, setup, console)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_bytes(orjson.dumps(report, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def _setup(args: argparse.Namespace) -> Setup:
    cost = cost_model(args.cost, args.layers)
    return Setup(
        machine=Machine(cost, args.kv_tokens or cost.kv_tokens, args.link_gbps * 1e9 / 8),
        conditions=Conditions(
            args.bootstrap_ms / 1e3, not args.no_prefix_cache, args.prediction_error, args.prediction_bias
        ),
        limits=Limits(max_suspended=args.max_suspended, max_batch_tokens=args.max_batch_tokens),
        max_starvation_s=args.max_starvation_s,
        max_operator_s=args.max_blocking_ms / 1e3,
        lookahead=args.lookahead,
        hub_s=args.hub_us / 1e6,
        instances=args.instances,
        router=args.router,
    )


def _trace(name: str, args: argparse.Namespace, seed: int) -> Trace:
    if name in WORKLOADS:
        trace = WORKLOADS[name](min(args.requests, POOL), seed, 1.0)
        if args.requests > POOL:
            trace = resampled(trace, args.requests, 1.0, seed)
        rate_rps = args.rate or 5.5 * args.instances
    elif Path(name).is_file():
        trace = load_trace(Path(name), "auto").limited(requests=args.requests)
        rate_rps = args.rate or trace.rate_rps
    else:
        raise ValueError(f"trace {name!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    return trace.scaled(rate_scale=rate_rps / trace.rate_rps).scaled(time_scale=args.time_scale)


def _compare(
    name: str, traces: Sequence[Trace], args: argparse.Namespace, setup: Setup, console: Console
) -> dict[str, Any]:
    """Every policy at one rate, and its share of the limit."""
    classes = traces[0].classes
    table = Table(title=_title(name, traces, setup), title_justify="left")
    for column in ("policy", "attainment", *classes, "of the limit", "TTFT p50", "p99", "preemptions", "blocking"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    figures: dict[str, Any] = {}
    limits = functools.cache(lambda tokens: mean_limit(traces, setup, tokens))
    for system in args.policy:
        runs = [simulated(system, trace, setup) for trace in traces]
        entry = figures[system] = _figures(traces, runs, classes)
        limit = None if args.no_limit else limits(_batch_tokens(system, args))
        entry["limit"] = limit
        entry["share_of_limit"] = entry["ttft_attainment"] / limit if limit else None
        table.add_row(
            system,
            percent(entry["ttft_attainment"]),
            *(percent(entry["classes"][kind]["ttft_attainment"]) for kind in classes),
            percent(entry["share_of_limit"]) if limit else "–",
            seconds(entry["ttft_p50_s"]),
            seconds(entry["ttft_p99_s"]),
            str(entry["preemptions"]) if "preemptions" in entry else "–",
            milliseconds(entry.get("blocking_mean_s")),
        )
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "systems": figures}


def _figures(traces: Sequence[Trace], runs: Sequence[Run], classes: Sequence[str]) -> dict[str, Any]:
    merged = [result for trace, one in zip(traces, runs, strict=True) for result in results(trace, one.requests)]
    summary = summarise(merged, max(1e-9, sum(one.duration_s for one in runs)), classes)
    blocking_s = [value_s for one in runs for value_s in one.blocking_s or ()]
    preemption = dataclasses.asdict(summarise_blocking(blocking_s)) if runs[0].blocking_s is not None else {}
    return {**dataclasses.asdict(summary), **preemption}


def _batch_tokens(system: str, args: argparse.Namespace) -> int:
    """Most new tokens of a forward of several requests: the limit's batches are as large."""
    if not system.startswith("stock-"):
        return int(args.max_batch_tokens)
    chunk = system.rpartition("-")[2]
    return int(chunk) if chunk.isdigit() else MAX_PREFILL_TOKENS


def _goodput(
    name: str, traces: Sequence[Trace], args: argparse.Namespace, setup: Setup, console: Console
) -> dict[str, Any]:
    """Highest rate of every policy and of the limit at ATTAINMENTS, and as a multiple of the first policy's."""
    found: dict[str, dict[str, float]] = {}
    table = Table(title=_title(name, traces, setup, rate=False), title_justify="left")
    table.add_column("policy")
    for attainment in ATTAINMENTS:
        table.add_column(f"max rate at {attainment:.0%}", justify="right")
        table.add_column(f"{args.policy[0]} has", justify="right")
    for system in args.policy:
        found[system] = {f"{level}": max_rate_rps(system, traces, setup, level) for level in ATTAINMENTS}
    if not args.no_limit:
        found["limit"] = {f"{level}": max_limit_rps(traces, setup, level) for level in ATTAINMENTS}
    for system in found:
        cells = []
        for level in ATTAINMENTS:
            own, first = found[system][f"{level}"], found[args.policy[0]][f"{level}"]
            cells += [f"{own:.2f} req/s", f"{first / own:.2f}x" if own else "–"]
        table.add_row(system, *cells)
    console.print(table)
    return {"max_rate_rps": found}


def _plan(
    name: str, traces: Sequence[Trace], args: argparse.Namespace, setup: Setup, console: Console
) -> dict[str, Any]:
    """Fewest instances of every policy for the trace."""
    table = Table(title=f"{_title(name, traces, setup)}: instances for {args.attainment:.1%}", title_justify="left")
    table.add_column("policy")
    table.add_column("prefill instances", justify="right")
    found: dict[str, int | None] = {}
    for system in args.policy:
        try:
            found[system] = fewest_instances(system, traces, setup, args.attainment)
        except ValueError as error:
            found[system] = None
            console.print(str(error), highlight=False)
        table.add_row(system, str(found[system] or "none"))
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "attainment": args.attainment, "instances": found}


def _speed(args: argparse.Namespace, setup: Setup, console: Console) -> dict[str, Any]:
    """Requests a second of the policy alone, and what its events cost, by what waits."""
    requests = prepare(_trace(args.trace[0], args, 0), setup.machine.cost, setup.conditions)
    found: dict[str, Any] = {}
    for policy in [name for name in args.policy if name in POLICIES]:
        new_policy = functools.partial(make_policy, policy, setup.limits, setup.max_starvation_s)
        speed = policy_speed(new_policy, requests)
        title = (
            f"{policy} alone, one core: {speed.requests_per_s:,.0f} requests of {args.trace[0]} and "
            f"{speed.events_per_s:,.0f} events a second; CPU time of an event, p50 / p99 / max in us "
            "(events that the OS interrupted: p99 / max without them; longest wall time)"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("what waits")
        for length in QUEUE_LENGTHS:
            table.add_column(f"{length:,}", justify="right")
        costs: dict[str, dict[str, dict[str, float]]] = {}
        for name, kinds in KINDS.items():
            events = [event_cost(new_policy, kinds, length) for length in QUEUE_LENGTHS]
            costs[name] = {str(length): cost._asdict() for length, cost in zip(QUEUE_LENGTHS, events, strict=True)}
            table.add_row(name, *map(_microseconds, events))
        console.print(table)
        found[policy] = {**speed._asdict(), "event_cost": costs}
    steps = {length: step_cost(length) for length in PLACES_WAITED_FOR}
    for length, cost in steps.items():
        console.print(f"order of places, {length:,} waiting at a decode server: {_microseconds(cost)} us a step")
    found["order_of_places"] = {str(length): cost._asdict() for length, cost in steps.items()}
    return found


def _microseconds(cost: EventCost) -> str:
    cpu = " / ".join(f"{cost_s * 1e6:.0f}" for cost_s in (cost.p50_s, cost.p99_s, cost.max_s))
    undisturbed = f"{cost.undisturbed_p99_s * 1e6:.0f} / {cost.undisturbed_max_s * 1e6:.0f}"
    return f"{cpu} ({cost.preempted}: {undisturbed}; {cost.wall_max_s * 1e6:,.0f})"


def _title(name: str, traces: Sequence[Trace], setup: Setup, *, rate: bool = True) -> str:
    requests = len(traces[0].requests)
    at = f" at {traces[0].rate_rps:.2f} req/s" if rate else ""
    return f"{name}{at}, {len(traces)} x {requests} requests, {setup.instances} x {setup.machine.cost.name}"
