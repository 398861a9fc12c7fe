"""Options of ``bench events``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sgl_flowprefill.bench.cli.options.base import Command


@dataclass(frozen=True)
class Events(Command):
    """what an event log says: how busy the server was, blocking, prediction errors"""

    name = "events"
    examples = ("events.jsonl --json",)
    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """what --flowprefill-event-log names"""
    json: bool = False
    """print the figures as JSON"""
