"""``bench simulate --unified``: servers that prefill and decode, judged by TTFT and TBT together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Simulate
from sgl_flowprefill.bench.metrics.joint import share, summarise_joint
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.metrics.requests import ATTAINMENTS
from sgl_flowprefill.bench.reports.table import milliseconds, percent, seconds
from sgl_flowprefill.bench.simulator.joint import JUDGES, Search, TunedSearch, answered
from sgl_flowprefill.bench.simulator.step_cost import StepCost
from sgl_flowprefill.bench.simulator.systems import Run, Setup, run
from sgl_flowprefill.bench.systems.catalog import UNIFIED_STOCK, simulated
from sgl_flowprefill.bench.workloads.trace import Trace

BEST_STOCK: Final = "best stock"
JUDGED: Final[dict[Judge, str]] = {"gaps": "1% of gaps late", "mean": "mean gap"}


def with_steps(setup: Setup, options: Simulate) -> Setup:
    """``setup`` with what the options say of decode steps, and what its cost model does where they do not."""
    cost = setup.steps()
    if options.step_ms is not None or options.step_ms_per_stream is not None:
        cost = StepCost(
            cost.fixed_s if options.step_ms is None else options.step_ms / 1e3,
            cost.per_request_s if options.step_ms_per_stream is None else options.step_ms_per_stream / 1e3,
            cost.per_context_s,
            "the command line",
        )
    return dataclasses.replace(setup, step_cost=cost, step_error=options.step_error)


def compare(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Every system at one rate."""
    table = Table(title=f"{setup.title(name, traces)}, unified", title_justify="left")
    for column in (
        "system", "joint", "by mean gap", "TTFT", "gaps", "TTFT p99", "TBT p50", "p99", "max", "in steps", "retracted",
        "given back", "step late p99",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "system" else "right")
    found: dict[str, Any] = {}
    for system in options.policy:
        runs = [run(simulated(system, "unified"), trace, setup) for trace in traces]
        entry = found[system] = figures(runs)
        table.add_row(
            system,
            percent(entry["joint_attainment"]),
            percent(entry["joint_attainment_mean_tpot"]),
            percent(entry["ttft_attainment"]),
            percent(entry["tbt_attainment"]),
            seconds(entry["ttft_p99_s"]),
            milliseconds(entry["tbt_p50_s"]),
            milliseconds(entry["tbt_p99_s"]),
            milliseconds(entry["tbt_max_s"]),
            percent(entry["decode_share"]),
            str(entry["retractions"]),
            str(entry["give_backs"]),
            milliseconds(entry["step_lateness_p99_s"]),
        )
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "systems": found}


def goodput(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """The highest rate of every system at ATTAINMENTS, judged both ways, and the rate of the best stock setting."""
    settings = [system.simulation for system in UNIFIED_STOCK.values()]
    search, tuned = Search(traces, setup), TunedSearch(traces, setup, settings)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for system in options.policy:
        found[system] = {
            judge: {
                f"{level}": search.max_rate_rps(simulated(system, "unified"), level, judge) for level in ATTAINMENTS
            }
            for judge in JUDGES
        }
    best: dict[str, dict[str, str]] = {}
    found[BEST_STOCK] = {}
    for judge in JUDGES:
        rates = {level: tuned.best(level, judge) for level in ATTAINMENTS}
        found[BEST_STOCK][judge] = {f"{level}": rate_rps for level, (_, rate_rps) in rates.items()}
        best[judge] = {f"{level}": str(setting) for level, (setting, _) in rates.items() if setting is not None}
    table = Table(title=f"{setup.title(name, traces, rate=False)}, unified: highest rate, req/s", title_justify="left")
    table.add_column("system")
    for judge in JUDGES:
        for level in ATTAINMENTS:
            table.add_column(f"{level:.0%}, {JUDGED[judge]}", justify="right")
    for system, by_judge in found.items():
        cells = []
        for judge in JUDGES:
            for level in ATTAINMENTS:
                rate_rps = by_judge[judge][f"{level}"]
                setting = best[judge].get(f"{level}") if system == BEST_STOCK else None
                cells.append((f"{rate_rps:.2f}" if rate_rps else "none") + (f" ({setting})" if setting else ""))
        table.add_row(system, *cells)
    console.print(table)
    return {"max_rate_rps": found, "best_stock": best, "stock_settings": len(settings)}


def figures(runs: Sequence[Run]) -> dict[str, Any]:
    """What came of all ``runs`` of a system together."""
    requests = [request for one in runs for request in one.requests]
    ttft_s = [request.first_token_s - request.arrival_s for request in requests]
    streams = [one.streams for one in runs if one.streams is not None]
    lateness_s = [late_s for one in streams for late_s in one.lateness_s]
    served_s = sum(one.instances * max(request.last_token_s for request in one.requests) for one in runs)
    return {
        **dataclasses.asdict(summarise_joint([answered(request) for request in requests])),
        "ttft_attainment": share(request.met for request in requests),
        "ttft_p50_s": float(np.percentile(ttft_s, 50)),
        "ttft_p99_s": float(np.percentile(ttft_s, 99)),
        "steps": sum(one.steps for one in streams),
        "decode_share": sum(one.step_s for one in streams) / served_s,
        "retractions": sum(one.retractions for one in streams),
        "give_backs": sum(one.give_backs for one in streams),
        "step_lateness_p99_s": float(np.percentile(lateness_s, 99)) if lateness_s else None,
        "margin_s": max(one.margin_s for one in streams),
    }
