"""Options of ``bench breakdown``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sgl_flowprefill.bench.cli.options.base import Command
from sgl_flowprefill.bench.cli.options.servers import ServerOptions
from sgl_flowprefill.bench.cli.options.values import Count, Counts, Folder, Whole


@dataclass(frozen=True)
class Breakdown(Command):
    """where the time of an isolated request goes, from client to first token"""

    name = "breakdown"
    examples = ("--tokens 64 1024 --repeats 5",)
    tokens: Counts = (64, 256, 1024, 4096, 8192)
    """prompt lengths"""
    repeats: Count = 15
    """requests of each length"""
    seed: Whole = 0
    """seed of the prompts"""
    out: Folder = Path("out/breakdown")
    servers: ServerOptions = ServerOptions()
