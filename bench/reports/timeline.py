"""A picture of a few seconds of a timeline: a bar a request, deadlines, and who was suspended for whom."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import plotly.graph_objects as go

from sgl_flowprefill.bench.reports.page import MUTED, render, styled
from sgl_flowprefill.timeline import History, Request
from sgl_flowprefill.timeline.history import DECODING, NOT_READY, RUNNING, SENDING, SUSPENDED, WAITING, WITHOUT_PLACE

COLOURS: Final[Mapping[str, str]] = {
    WITHOUT_PLACE: "#be185d",
    NOT_READY: "#be185d",
    WAITING: "rgba(138,145,156,0.55)",
    RUNNING: "#0d9488",
    SUSPENDED: "#e2711d",
    SENDING: "#6366f1",
    DECODING: "#93c5fd",
}
ROW_PX: Final = 16


def write_page(history: History, log: Path, seconds: float, path: Path) -> int:
    """Write the page with ``seconds`` of the timeline of ``log``, those with the most preemptions. Returns its height
    in pixels.
    """
    begin_s = busiest_s(history, seconds)
    figure = bars(history, begin_s, begin_s + seconds)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render("timeline.html.j2", {"bars": figure}, log=log, seconds=seconds)
    path.write_text(page, encoding="utf-8")
    return int(figure.layout.height) + 200


def busiest_s(history: History, seconds: float) -> float:
    """When the ``seconds`` with the most preemptions begin, a little before the first of these."""
    times_s = [preemption.suspend.t_s for preemption in history.preemptions]
    if not times_s:
        return history.requests[0].arrival.received_s if history.requests else 0.0
    most = max(range(len(times_s)), key=lambda first: bisect_right(times_s, times_s[first] + 0.8 * seconds) - first)
    return times_s[most] - 0.1 * seconds


def bars(history: History, begin_s: float, end_s: float) -> go.Figure:
    """What each request did from ``begin_s`` to ``end_s``, the first arrival on top."""
    shown = [
        one for one in history.requests if one.parts and one.parts[0].begin_s < end_s and one.parts[-1].end_s > begin_s
    ]
    row = {request: number for number, request in enumerate(shown)}
    figure = go.Figure()
    for what, colour in COLOURS.items():
        stretches = [
            (row[request], max(part.begin_s, begin_s) - begin_s, min(part.end_s, end_s) - begin_s)
            for request in shown
            for part in request.parts
            if part.what == what and part.begin_s < end_s and part.end_s > begin_s
        ]
        if stretches:
            rows, starts_s, ends_s = zip(*stretches, strict=True)
            lengths_s = [one_s - other_s for one_s, other_s in zip(ends_s, starts_s, strict=True)]
            figure.add_bar(
                y=rows,
                x=lengths_s,
                base=starts_s,
                orientation="h",
                name=what,
                marker={"color": colour, "line_width": 0},
            )
    for met, colour in ((True, MUTED), (False, "#dc2626")):
        due = [one for one in shown if one.verdict.met is met and begin_s <= one.arrival.deadline_s <= end_s]
        figure.add_scatter(
            y=[row[request] for request in due],
            x=[request.arrival.deadline_s - begin_s for request in due],
            mode="markers",
            name="deadline, " + ("kept" if met else "missed"),
            marker={"symbol": "line-ns", "size": 11, "line": {"width": 2.5, "color": colour}},
        )
    for preemption in history.preemptions:
        winner, loser = preemption.winner, next((one for one in shown if preemption.loser in one.tasks), None)
        if winner in row and loser is not None and begin_s <= preemption.suspend.t_s <= end_s:
            at_s = preemption.suspend.stopped_s - begin_s
            figure.add_annotation(
                x=at_s, y=row[loser], ax=winner.arrival.t_s - begin_s, ay=row[winner],
                xref="x", yref="y", axref="x", ayref="y", arrowhead=2, arrowwidth=1, arrowcolor=MUTED, text="",
            )  # fmt: skip
    labels = [f"{request.arrival.prompt_tokens:,} tokens{_asterisk(request)}" for request in shown]
    figure.update_yaxes(tickvals=list(row.values()), ticktext=labels, autorange="reversed", tickfont={"size": 10})
    figure.update_xaxes(title_text="seconds", range=[0, end_s - begin_s])
    figure.update_layout(barmode="overlay", bargap=0.25)
    return styled(figure, height=150 + ROW_PX * len(shown)).update_layout(margin={"l": 110})


def _asterisk(request: Request) -> str:
    return "" if request.verdict.met is not False else f", {request.verdict.cause}"
