"""Options of ``bench demo``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgl_flowprefill.bench.cli.options.base import Command
from sgl_flowprefill.bench.cli.options.servers import ServerOptions
from sgl_flowprefill.bench.cli.options.trace import TraceOptions
from sgl_flowprefill.bench.cli.options.values import (
    Endpoints,
    Folder,
    ListSystems,
    MaxAnswer,
    Picture,
    Systems,
    Unified,
)
from sgl_flowprefill.bench.systems.tuning import rival


@dataclass(frozen=True)
class Demo(Command):
    """compare FlowPrefill with SGLang's stock scheduler on this machine"""

    name = "demo"
    examples = ("--out out/mine --duration 60 --systems flowprefill sglang stock-spf-2048",)
    unified: Unified = False
    out: Folder = Path("out/demo")
    systems: Systems = ("flowprefill", "sglang")
    list_systems: ListSystems = False
    endpoint: Endpoints = ()
    max_output_tokens: MaxAnswer = None
    png: Picture = False
    trace: TraceOptions = TraceOptions(rate_scale=2.0, duration=140.0)
    servers: ServerOptions = ServerOptions()


@dataclass(frozen=True)
class UnifiedDemo(Demo):
    """compare FlowPrefill on one server, which prefills and decodes, with SGLang tuned and as it comes"""

    examples = ("--unified --out out/mine --duration 60 --systems unified unified-stock-spf-1024-mixed",)
    unified: Unified = False
    out: Folder = Path("out/demo-unified")
    systems: Systems = ("unified", rival(), "unified-sglang")
    trace: TraceOptions = TraceOptions(rate_scale=1.0, duration=120.0)
