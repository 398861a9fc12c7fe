"""Event logs as timelines that Perfetto shows."""

from typing import Final

from sgl_flowprefill.timeline.history import History, Request
from sgl_flowprefill.timeline.trace import write_timeline

SUFFIX: Final = ".pftrace"
"""How the name of a timeline ends, as with Perfetto's own tools."""

__all__ = ["SUFFIX", "History", "Request", "write_timeline"]
