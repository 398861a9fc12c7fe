"""Options of ``bench validate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from sgl_flowprefill.bench.cli.options.base import POSITIVE, Command
from sgl_flowprefill.bench.cli.options.servers import ServerOptions
from sgl_flowprefill.bench.cli.options.values import (
    FactorOrAuto,
    Folder,
    ListSystems,
    MaxAnswer,
    Seconds,
    Seeds,
    Systems,
    Unified,
    Workload,
)


@dataclass(frozen=True)
class Validate(Command):
    """simulated against measured attainment, on the same traces with the engine's profile"""

    name = "validate"
    examples = ("--systems flowprefill stock-fcfs --loads 0.5 1.0",)
    unified: Unified = False
    systems: Systems = ("flowprefill", "stock-fcfs", "stock-spf-2048")
    list_systems: ListSystems = False
    workload: Workload = "qwen-like"
    loads: Annotated[tuple[float, ...], POSITIVE, arg(metavar="X...")] = (0.3, 0.5, 0.7, 0.9, 1.1, 1.3, 1.5)
    """rates as multiples of saturation"""
    seeds: Seeds = 2
    duration: Seconds = 60.0
    """seconds in which the requests of a run arrive"""
    time_scale: FactorOrAuto = "auto"
    """factor for the workload's times and SLOs; auto measures it as bench demo does"""
    max_output_tokens: MaxAnswer = None
    slower: Annotated[float, POSITIVE, arg(metavar="SHARE")] = 0.0
    """replay and simulate on a machine that becomes slower by this share, such as 0.2, in the middle of each replay"""
    out: Folder = Path("out/validate")
    servers: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class UnifiedValidate(Validate):
    """simulated against measured attainment of servers that prefill and decode, by first tokens and all tokens"""

    examples = ("--unified --systems unified unified-sglang --loads 0.5 1.0",)
    unified: Unified = False
    systems: Systems = (
        "unified", "unified-sglang", "unified-stock-spf-512-mixed", "unified-stock-spf-512-interval-1",
    )  # fmt: skip
    # FlowPrefill, and SGLang prefilling first, in mixed chunks, and with decode steps in between.
    out: Folder = Path("out/validate-unified")
