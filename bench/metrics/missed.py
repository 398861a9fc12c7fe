"""Which requests of a run missed their objective at the server that prefills, and why, as its event log tells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sgl_flowprefill.events import read_events
from sgl_flowprefill.timeline import History


class Missed(NamedTuple):
    """A request whose first token was late, or did not come."""

    rid: str
    prompt_tokens: int
    cause: str
    late_s: float | None
    """None without a first token."""
    at_s: float
    """When the server had it, in seconds from the begin of the timeline of its log."""


def missed_requests(event_log: Path, spans_s: Sequence[tuple[float, float]]) -> list[Missed]:
    """The requests that came within spans of ``time.monotonic()`` and missed their objective, in order; none without a
    log. Raises EventLogError.
    """
    if not event_log.exists():
        return []
    history = History.of(read_events(event_log))
    begins_s = [request.arrival.received_s for request in history.requests]
    begin_s = min([*begins_s, *(task.start.t_s for task in history.tasks)], default=0.0)
    return [
        Missed(
            request.rid,
            request.arrival.prompt_tokens,
            str(request.verdict.cause),
            request.late_s,
            request.arrival.received_s - begin_s,
        )
        for request in history.requests
        if request.verdict.met is False
        and any(start_s <= request.arrival.received_s <= end_s for start_s, end_s in spans_s)
    ]
