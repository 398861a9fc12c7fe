"""``bench goodput``: the highest rate at which each system keeps an attainment, on real servers, side by side."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Final

from rich.console import Console

from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.cli.options import AUTO, attainment_share, positive_float, positive_int, scale_or_auto
from sgl_flowprefill.bench.metrics.provenance import write_result
from sgl_flowprefill.bench.reports.goodput import rates_table, show, write_html
from sgl_flowprefill.bench.reports.page import add_picture_option, browser, take_picture
from sgl_flowprefill.bench.systems.catalog import add_endpoint_option, add_systems_option, select
from sgl_flowprefill.bench.systems.serving import Servers, probing
from sgl_flowprefill.bench.workloads.answers import add_answers_option
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS, workload

ATTAINMENTS: Final = (0.9, 0.99)
DEFAULT_SYSTEMS: Final = (
    "flowprefill",
    "flowprefill-s-edf",
    "flowprefill-layer",
    "stock-fcfs",
    "stock-spf-512",
    "stock-spf-2048",
    "stock-priority-512",
    "stock-priority-2048",
)
"""FlowPrefill's variants, the DistServe stand-in, and the stock systems that come first in simulations; ``--systems all
--prefilter N`` lets the simulator choose for this machine and workload."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench goodput``."""
    add_systems_option(parser, *DEFAULT_SYSTEMS)
    add_endpoint_option(parser)
    parser.add_argument(
        "--workload", default="qwen-like", metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or a trace file"
    )
    parser.add_argument(
        "--attainment",
        type=attainment_share,
        action="append",
        metavar="SHARE",
        help="share of requests that shall meet their TTFT SLO; can be repeated (default 0.9 and 0.99)",
    )
    parser.add_argument("--seeds", type=positive_int, default=3, metavar="K", help="seeds 0 to K-1 (default 3)")
    parser.add_argument(
        "--budget-s",
        type=positive_float,
        default=math.inf,
        metavar="S",
        help="end after about this long; the same command goes on (default: when all is found)",
    )
    parser.add_argument(
        "--prefilter",
        type=positive_int,
        metavar="N",
        help="of the stock systems measure only the N that the simulator has first at each attainment, and unchunked "
        "fcfs; the others are reported as simulated",
    )
    parser.add_argument(
        "--race",
        action="store_true",
        help="find the best stock system instead of every one's rate: one that does not keep the attainment at "
        "another's rate is measured no further",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        default=[],
        metavar="NAME",
        help="systems that only take part in the comparison at one rate, which is much quicker than a search",
    )
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="keep the servers of all systems up and stop those that are not measured (SIGSTOP), so that turns are "
        "seconds apart: for a machine whose speed changes. Takes some 7 GB a system; not for systems on one GPU",
    )
    parser.add_argument(
        "--duration",
        type=positive_float,
        default=60.0,
        metavar="S",
        help="seconds in which the requests of a probe arrive (default 60)",
    )
    parser.add_argument(
        "--precision",
        type=positive_float,
        default=0.08,
        metavar="SHARE",
        help="a search ends when its rate is known to within this share (default 0.08)",
    )
    parser.add_argument(
        "--time-scale",
        type=scale_or_auto,
        default=AUTO,
        metavar="X",
        help="factor for the workload's times and SLOs; auto (default) measures it as bench demo does",
    )
    add_answers_option(parser)
    parser.add_argument("--out", type=Path, default=Path("out/goodput"), help="folder of results (default %(default)s)")
    add_picture_option(parser)
    Servers.add_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Search, print the table, write the reports. Returns 0, or 1 if the budget ended first or a probe is doubtful.

    Raises ClusterError, CalibrationError, ConfigError or ValueError with a sentence for the user.
    """
    if args.png:
        browser()
    servers = Servers.from_args(args)
    plan = Plan(workload(args.workload), args.seeds, args.duration, args.max_output_tokens)
    attainments = tuple(sorted(set(args.attainment or ATTAINMENTS)))
    systems = [*select(args.systems), *args.endpoint]
    goal = Goal(attainments, 1 + args.precision, args.prefilter, args.race)
    result = None
    with probing(servers, plan, args.out, args.time_scale, console, side_by_side=args.side_by_side) as prober:
        campaign = Campaign(prober, systems, goal, only_compared=select(args.compare))
        try:
            campaign.run(args.budget_s)
        finally:  # also after Ctrl-C: what was found so far
            if prober.log.probes:
                result = GoodputResult.of(campaign, servers.model)
                publish(result, args.out, console)
                if args.png:
                    prober.say(f"Picture: {take_picture(args.out / 'goodput.html')}")
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
