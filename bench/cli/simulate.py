"""``bench simulate``: policies on a model of the machine, side by side with stock SGLang and with the limit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli import oracle, slower, unified
from sgl_flowprefill.bench.cli.options import Simulate
from sgl_flowprefill.bench.metrics.requests import ATTAINMENTS, summarise, summarise_blocking
from sgl_flowprefill.bench.reports.table import milliseconds, percent, seconds
from sgl_flowprefill.bench.simulator.cost import cost_model
from sgl_flowprefill.bench.simulator.instance import Machine
from sgl_flowprefill.bench.simulator.place_speed import step_cost
from sgl_flowprefill.bench.simulator.requests import Conditions, prepare, resampled, results
from sgl_flowprefill.bench.simulator.search import fewest_instances, max_limit_rps, max_rate_rps, mean_limit
from sgl_flowprefill.bench.simulator.speed import KINDS, EventCost, event_cost, policy_speed
from sgl_flowprefill.bench.simulator.systems import Run, Setup, SimulatedFlowPrefill, SimulatedUnified
from sgl_flowprefill.bench.simulator.systems import run as simulate
from sgl_flowprefill.bench.systems.catalog import HEADLINE, UNIFIED_HEADLINE, simulated
from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.policy import POLICIES, Limits, make_policy
from sgl_flowprefill.provenance import result, write_result

RATE_RPS: Final = 5.5
"""Rate of built-in workloads for each instance, without --rate."""
POOL: Final = 20_000
"""Requests that are generated one by one; longer runs draw theirs from them."""
QUEUE_LENGTHS: Final = (100, 1_000, 10_000, 100_000)
PLACES_WAITED_FOR: Final = (1_000, 5_000)


def run(options: Simulate, console: Console) -> int:
    """Simulate, print tables, write JSON. Raises ValueError with a sentence for what cannot be simulated."""
    if options.unified and (options.plan or options.speed):
        raise ValueError(
            "--unified compares at one rate, or with --goodput; --plan and --speed are of prefill instances"
        )
    if options.slower and (options.goodput or options.plan or options.speed):
        raise ValueError(f"--slower {options.slower:g} compares at one rate: leave out --goodput, --plan and --speed")
    if options.oracle and (options.prediction_error, options.prediction_bias) != (0.0, 1.0):
        raise ValueError("an oracle is exact: leave out --oracle, or --prediction-error and --prediction-bias")
    usual = (FlowPrefillConfig().policy,) if options.oracle else UNIFIED_HEADLINE if options.unified else HEADLINE
    options = dataclasses.replace(options, policy=options.policy or usual)
    setup = _setup(options)
    for name in options.policy:
        scheduler = simulated(name, "unified" if options.unified else "pair")
        if options.oracle and not isinstance(scheduler, SimulatedFlowPrefill | SimulatedUnified):
            raise ValueError(f"{name} predicts nothing: --oracle compares predictions of {', '.join(POLICIES)}")
    report: dict[str, Any] = {
        "cost": dataclasses.asdict(setup.machine.cost),
        "instances": options.instances,
        "seeds": options.seeds,
        "traces": {},
    }
    if options.speed:
        report["speed"] = _speed(options, setup, console)
    else:
        action = _goodput if options.goodput else _plan if options.plan else _compare
        if options.unified:
            action = unified.goodput if options.goodput else unified.compare
            setup = unified.with_steps(setup, options)
            report["step_cost"] = dataclasses.asdict(setup.steps())
        if options.slower:
            action = slower.compare
        if options.oracle:
            action = oracle.compare
        for name in options.trace:
            traces = [_trace(name, options, seed) for seed in range(options.seeds if name in WORKLOADS else 1)]
            report["traces"][name] = action(name, traces, options, setup, console)
    if options.out:
        write_result(options.out, result("simulate", report))
    return 0


def _setup(options: Simulate) -> Setup:
    cost = cost_model(options.cost, options.layers)
    return Setup(
        machine=Machine(cost, options.kv_tokens or cost.kv_tokens, options.link_gbps * 1e9 / 8),
        conditions=Conditions(
            options.bootstrap_ms / 1e3, not options.no_prefix_cache, options.prediction_error, options.prediction_bias
        ),
        limits=Limits(max_suspended=options.max_suspended, max_batch_tokens=options.max_batch_tokens),
        max_starvation_s=options.max_starvation_s,
        max_operator_s=options.max_blocking_ms / 1e3,
        lookahead=options.lookahead,
        hub_s=options.hub_us / 1e6,
        instances=options.instances,
        router=options.router,
        forward_error=options.forward_error,
        learned=options.learned or options.slower != 0,
        slower=options.slower,
    )


def _trace(name: str, options: Simulate, seed: int) -> Trace:
    if name in WORKLOADS:
        trace = WORKLOADS[name](min(options.requests, POOL), seed, 1.0)
        if options.requests > POOL:
            trace = resampled(trace, options.requests, 1.0, seed)
        own_rps = RATE_RPS * options.instances
    elif Path(name).is_file():
        trace = load_trace(Path(name), "auto").limited(requests=options.requests)
        own_rps = trace.positive_rate_rps()
    else:
        raise ValueError(f"trace {name!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    rate_rps = own_rps if options.rate is None else options.rate * options.time_scale
    return trace.scaled(rate_scale=rate_rps / trace.rate_rps).scaled(time_scale=options.time_scale)


def _compare(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Every policy at one rate, and its share of the limit."""
    classes = traces[0].classes
    table = Table(title=setup.title(name, traces), title_justify="left")
    for column in ("policy", "attainment", *classes, "of the limit", "TTFT p50", "p99", "preemptions", "blocking"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    figures: dict[str, Any] = {}
    limits = functools.cache(lambda tokens: mean_limit(traces, setup, tokens))
    for system in options.policy:
        runs = [simulate(simulated(system), trace, setup) for trace in traces]
        entry = figures[system] = _figures(traces, runs, classes)
        limit = None if options.no_limit else limits(simulated(system).max_batch_tokens(setup))
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
    without_news = sum(one.switches_without_news for one in runs)
    preemption = summarise_blocking(blocking_s, without_news) if runs[0].blocking_s is not None else None
    return dataclasses.asdict(summary) | (dataclasses.asdict(preemption) if preemption else {})


def _goodput(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Highest rate of every policy and of the limit at ATTAINMENTS, and as a multiple of the first policy's."""
    found: dict[str, dict[str, float]] = {}
    table = Table(title=setup.title(name, traces, rate=False), title_justify="left")
    table.add_column("policy")
    for attainment in ATTAINMENTS:
        table.add_column(f"max rate at {attainment:.0%}", justify="right")
        table.add_column(f"{options.policy[0]} has", justify="right")
    for system in options.policy:
        found[system] = {f"{level}": max_rate_rps(simulated(system), traces, setup, level) for level in ATTAINMENTS}
    if not options.no_limit:
        found["limit"] = {f"{level}": max_limit_rps(traces, setup, level) for level in ATTAINMENTS}
    for system in found:
        cells = []
        for level in ATTAINMENTS:
            own, first = found[system][f"{level}"], found[options.policy[0]][f"{level}"]
            cells += [f"{own:.2f} req/s", f"{first / own:.2f}x" if own else "–"]
        table.add_row(system, *cells)
    console.print(table)
    return {"max_rate_rps": found}


def _plan(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Fewest instances of every policy for the trace."""
    table = Table(title=f"{setup.title(name, traces)}: instances for {options.attainment:.1%}", title_justify="left")
    table.add_column("policy")
    table.add_column("prefill instances", justify="right")
    found: dict[str, int | None] = {}
    for system in options.policy:
        try:
            found[system] = fewest_instances(simulated(system), traces, setup, options.attainment)
        except ValueError as error:
            found[system] = None
            console.print(str(error), highlight=False)
        table.add_row(system, str(found[system] or "none"))
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "attainment": options.attainment, "instances": found}


def _speed(options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Requests a second of the policy alone, and what its events cost, by what waits."""
    requests = prepare(_trace(options.trace[0], options, 0), setup.machine.cost, setup.conditions)
    found: dict[str, Any] = {}
    for policy in [name for name in options.policy if name in POLICIES]:
        new_policy = functools.partial(make_policy, policy, setup.limits, setup.max_starvation_s)
        speed = policy_speed(new_policy, requests)
        title = (
            f"{policy} alone, one core: {speed.requests_per_s:,.0f} requests of {options.trace[0]} and "
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
        console.print(f"order of running slots, {length:,} waiting at a decode server: {_microseconds(cost)} us a step")
    found["order_of_places"] = {str(length): cost._asdict() for length, cost in steps.items()}
    return found


def _microseconds(cost: EventCost) -> str:
    cpu = " / ".join(f"{cost_s * 1e6:.0f}" for cost_s in (cost.p50_s, cost.p99_s, cost.max_s))
    undisturbed = f"{cost.undisturbed_p99_s * 1e6:.0f} / {cost.undisturbed_max_s * 1e6:.0f}"
    return f"{cpu} ({cost.preempted}: {undisturbed}; {cost.wall_max_s * 1e6:,.0f})"
