"""``bench simulate --slower``: what systems lose on a machine that becomes slower in the middle of a trace, and what a
scheduler that knows of it would.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli import unified
from sgl_flowprefill.bench.cli.options import Simulate
from sgl_flowprefill.bench.metrics.joint import share
from sgl_flowprefill.bench.reports.table import MISSING, milliseconds, percent
from sgl_flowprefill.bench.simulator.search import mean_limit
from sgl_flowprefill.bench.simulator.systems import Setup, run
from sgl_flowprefill.bench.systems.catalog import simulated
from sgl_flowprefill.bench.workloads.trace import Trace


def compare(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Every system at one rate on the steady machine and on the one that becomes slower, beside the limit of both.

    Servers that decode as well are judged by TTFT and gaps together.
    """
    setups = {"steady": dataclasses.replace(setup, slower=0.0), "slower": setup}
    judged = "joint_attainment" if options.unified else "ttft_attainment"
    slower = setup.change
    requests = len(traces[0].requests)
    title = (
        f"{name} at {traces[0].rate_rps:.2f} req/s, {len(traces)} x {requests} requests, {slower} from the middle on"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("system")
    tbt = ("TBT p99", slower) if options.unified else ()
    attained = "joint" if options.unified else "attainment"
    for column in (attained, slower, "points lost", "limit", slower, "points lost", "beyond the limit's", *tbt):
        table.add_column(column, justify="right")

    @functools.cache
    def limit(machine: str, max_batch_tokens: int) -> float:
        return mean_limit(traces, setups[machine], max_batch_tokens, joint=options.unified)

    figures: dict[str, Any] = {}
    for system in options.policy:
        scheduler = simulated(system, "unified" if options.unified else "pair")
        entry: dict[str, Any] = {}
        for machine, one in setups.items():
            runs = [run(scheduler, trace, one) for trace in traces]
            entry[machine] = (
                unified.figures(runs)
                if options.unified
                else {"ttft_attainment": share(request.met for each in runs for request in each.requests)}
            )
        lost = entry["lost_points"] = 100 * (entry["steady"][judged] - entry["slower"][judged])
        cells = [percent(entry["steady"][judged]), percent(entry["slower"][judged]), f"{lost:.1f}"]
        if options.no_limit:
            cells += [MISSING] * 4
        else:
            limits = {machine: limit(machine, scheduler.max_batch_tokens(setup)) for machine in setups}
            limit_lost = 100 * (limits["steady"] - limits["slower"])
            beyond = entry["lost_beyond_limit_points"] = lost - limit_lost
            entry["limit"] = limits | {"lost_points": limit_lost}
            cells += [percent(limits["steady"]), percent(limits["slower"]), f"{limit_lost:.1f}", f"{beyond:+.1f}"]
        cells += [milliseconds(entry[machine]["tbt_p99_s"]) for machine in setups if options.unified]
        table.add_row(system, *cells)
        figures[system] = entry
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "slower": setup.slower, "systems": figures}
