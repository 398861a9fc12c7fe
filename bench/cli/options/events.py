"""Options of ``bench events``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from sgl_flowprefill.bench.cli.options.base import POSITIVE, Command, OptionError
from sgl_flowprefill.bench.cli.options.values import Picture


@dataclass(frozen=True)
class Events(Command):
    """what an event log says: how busy the server was, blocking, prediction errors"""

    name = "events"
    examples = ("events.jsonl --json", "events.jsonl --page out/timeline.html --seconds 3 --png")
    file: Positional[Annotated[Path, arg(metavar="FILE")]]
    """what --flowprefill-event-log names"""
    json: bool = False
    """print the figures as JSON"""
    page: Annotated[Path | None, arg(metavar="FILE.html")] = None
    """also write a picture of the seconds with the most preemptions, a line a request, as a page"""
    seconds: Annotated[float, POSITIVE] = 5.0
    """how many of them"""
    png: Picture = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.png and self.page is None:
            raise OptionError("--png: it is a picture of the page, so name one with --page")
