"""Options of ``bench uncontended``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from sgl_flowprefill.bench.cli.options.base import SEVERAL, Command
from sgl_flowprefill.bench.cli.options.values import Count, Counts, Folder, Model, Whole


@dataclass(frozen=True)
class Uncontended(Command):
    """what FlowPrefill costs when nobody waits, in pairs with stock SGLang unchunked"""

    name = "uncontended"
    examples = ("--tokens 2048 8192 --pairs 13",)
    unified: bool = False
    """servers that prefill and decode, asked also for streams alone, and for requests that arrive at once"""
    tokens: Counts = (512, 2048, 8192, 16384)
    """prompt lengths"""
    pairs: Count = 11
    """pairs of each length"""
    per_turn: Annotated[int, SEVERAL, arg(metavar="N")] = 3
    """prompts of a turn, one after the other; at least 2"""
    seed: Whole = 0
    """seed of the prompts"""
    model_path: Model = None
    """model to serve instead of the embedded one"""
    out: Folder = Path("out/uncontended")
