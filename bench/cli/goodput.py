"""``bench goodput``: the highest rate at which each system keeps an attainment, on real servers, side by side."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan, probing
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.cli.options import Goodput
from sgl_flowprefill.bench.cli.requested import requested_servers
from sgl_flowprefill.bench.metrics.requests import ATTAINMENTS
from sgl_flowprefill.bench.reports.goodput import rates_table, show, write_html
from sgl_flowprefill.bench.reports.page import browser, take_picture
from sgl_flowprefill.bench.systems.catalog import endpoints, select
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, UNIFIED_DECODE_SHARE
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.provenance import write_result


def run(options: Goodput, console: Console) -> int:
    """Search, print the table, write the reports. Returns 0, or 1 if the budget ended first or a probe is doubtful.

    Raises ClusterError, CalibrationError, ConfigError or ValueError with a sentence for the user.
    """
    if options.png:
        browser()
    servers = requested_servers(options.servers)
    plan = Plan(
        workload(options.workload),
        options.seeds,
        options.duration,
        options.max_output_tokens,
        options.judge,
        UNIFIED_DECODE_SHARE if options.unified else DECODE_SHARE,
    )
    attainments = tuple(sorted(set(options.attainment or ATTAINMENTS)))
    systems = [*select(options.systems), *endpoints(options.endpoint)]
    goal = Goal(attainments, 1 + options.precision, options.prefilter, options.race)
    result = None
    with probing(servers, plan, options.out, options.time_scale, console, side_by_side=options.side_by_side) as prober:
        campaign = Campaign(prober, systems, goal, only_compared=select(options.compare))
        try:
            campaign.run(options.budget_s)
        finally:  # also after Ctrl-C: what was found so far
            if prober.log.probes:
                result = GoodputResult.of(campaign, servers.model)
                publish(result, options.out, console)
                if options.png:
                    prober.say(f"Picture: {take_picture(options.out / 'goodput.html')}")
    return 0 if result and result.finished and not result.problems else 1


def publish(result: GoodputResult, folder: Path, console: Console) -> None:
    """Write ``goodput.json`` and ``goodput.html`` into ``folder``; print the table, the ratios and the problems."""
    document = result.to_dict()
    write_result(folder / "goodput.json", document)
    write_html(document, folder / "goodput.html")
    console.print()
    console.print(rates_table(document))
    console.print(document["answers"]["text"], highlight=False, soft_wrap=True)
    if document["ratios"]:
        ratios = (f"{name} {show(value, document['ratios_ci95'][name])}" for name, value in document["ratios"].items())
        console.print(f"FlowPrefill: {', '.join(ratios)}", highlight=False, soft_wrap=True)
    if document["only_simulated"]:
        console.print(f"Only simulated: {', '.join(document['only_simulated'])}", highlight=False, soft_wrap=True)
    for problem in document["problems"]:
        console.print(problem, style="yellow", markup=False, highlight=False)
    if not document["finished"]:
        console.print("Not all searches have ended; the same command goes on.", style="yellow")
    console.print(f"Report: {folder / 'goodput.html'} and {folder / 'goodput.json'}", highlight=False, soft_wrap=True)
