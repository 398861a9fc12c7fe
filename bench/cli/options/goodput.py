"""Options of ``bench goodput``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

from sgl_flowprefill.bench.cli.options.base import POSITIVE, SHARE, Command
from sgl_flowprefill.bench.cli.options.servers import ServerOptions
from sgl_flowprefill.bench.cli.options.values import (
    Endpoints,
    FactorOrAuto,
    Folder,
    ListSystems,
    MaxAnswer,
    MaybeCount,
    Picture,
    Seconds,
    Seeds,
    Systems,
    Unified,
    Workload,
)
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.systems.tuning import rival


@dataclass(frozen=True)
class Goodput(Command):
    """the highest rate at which each system keeps its SLOs, on this machine, side by side"""

    name = "goodput"
    examples = (
        "--systems flowprefill 'stock-*' --race",
        "--workload mixed --systems flowprefill 'stock-spf-*' --attainment 0.9",
    )
    unified: Unified = False
    systems: Systems = (
        "flowprefill", "flowprefill-s-edf", "flowprefill-layer",
        "stock-fcfs", "stock-spf-512", "stock-spf-2048", "stock-priority-512", "stock-priority-2048",
    )  # fmt: skip
    # FlowPrefill's variants, the DistServe stand-in, and the stock systems that come first in simulations.
    list_systems: ListSystems = False
    endpoint: Endpoints = ()
    workload: Workload = "qwen-like"
    attainment: Annotated[UseAppendAction[tuple[float, ...]], SHARE, arg(metavar="SHARE", help_behavior_hint="")] = ()
    """share of requests that shall meet their TTFT SLO; can be repeated (default: 0.9 and 0.99)"""
    judge: Judge = "ttft"
    """a request is served if its first token comes in time (ttft), and at most 1% of its gaps are late (gaps), or its
    mean gap is in time (mean)"""
    seeds: Seeds = 3
    budget_s: Seconds = math.inf
    """end after about this long; the same command goes on (default: when all is found)"""
    prefilter: MaybeCount = None
    """measure only the N stock systems that the simulator has first at each attainment, and unchunked fcfs"""
    race: bool = False
    """find the best stock system: one that does not keep the attainment at another's rate is measured no further"""
    compare: Annotated[tuple[str, ...], arg(metavar="NAME...", help_behavior_hint="")] = ()
    """systems that only take part in the comparison at one rate, which is much quicker than a search"""
    side_by_side: bool = False
    """all servers stay up, and those not measured are stopped, so that turns are seconds apart; some 7 GB a system"""
    duration: Seconds = 60.0
    """seconds in which the requests of a probe arrive"""
    precision: Annotated[float, POSITIVE, arg(metavar="SHARE")] = 0.08
    """a search ends when its rate is known to within this share"""
    time_scale: FactorOrAuto = "auto"
    """factor for the workload's times and SLOs; auto measures it as bench demo does"""
    max_output_tokens: MaxAnswer = None
    out: Folder = Path("out/goodput")
    png: Picture = False
    servers: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class UnifiedGoodput(Goodput):
    """the highest rate at which each system on one server keeps its SLOs, TTFT and time between tokens"""

    examples = (
        "--unified --side-by-side --attainment 0.9",
        "--unified --race --prefilter 4 --systems unified unified-sglang 'unified-stock-*'",
    )
    unified: Unified = False
    systems: Systems = ("unified", rival(), "unified-stock-spf-1024-mixed", "unified-sglang")
    judge: Judge = "gaps"
    out: Folder = Path("out/goodput-unified")
