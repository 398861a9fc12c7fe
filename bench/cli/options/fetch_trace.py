"""Options of ``bench fetch-trace``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tyro.conf import Positional

from sgl_flowprefill.bench.cli.options.base import Command
from sgl_flowprefill.bench.cli.options.values import NewFile

PublishedTrace = Literal["qwen-a", "qwen-b"]


@dataclass(frozen=True)
class FetchTrace(Command):
    """download a published trace"""

    name = "fetch-trace"
    examples = ("qwen-a",)
    trace: Positional[PublishedTrace]
    """which trace; qwen-a is the paper's"""
    out: NewFile = None
    """where to put it (default: in the cache)"""
