"""The page of a report: a picture of each phase's figures where one says more than its table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go

from sgl_flowprefill.bench.reports.page import COLOURS, LOG_TICKS, SLO_LINE, render, styled

STATE_COLOURS: Final = {
    "passed": COLOURS[0],
    "measured": COLOURS[5],
    "FAILED": "#dc2626",
    "not here": "#8a919c",
    "left out": "#d97706",
}


def write_page(document: Mapping[str, Any], path: Path) -> None:
    """Write the page; the file needs no network to be read."""
    path.write_text(render_page(document), encoding="utf-8")


def render_page(document: Mapping[str, Any]) -> str:
    """The report as one HTML document."""
    figures = {name: found.get("figures", {}) for name, found in document["phases"].items()}
    return render(
        "gpu_report.html.j2",
        {"blocking": _blocking(figures.get("blocking", {})), "operators": _operators(figures.get("operators", {}))},
        document=document,
        colours=STATE_COLOURS,
    )


def _blocking(figures: Mapping[str, Any]) -> go.Figure | None:
    """p99 over the prompt's length, whole and in tiles."""
    if not figures.get("rows"):
        return None
    figure = go.Figure()
    for tiled, name, colour in ((False, "operators whole", COLOURS[1]), (True, "in tiles", COLOURS[0])):
        own = [row for row in figures["rows"] if row["tiles"] == tiled]
        figure.add_trace(
            go.Scatter(
                x=[row["tokens"] for row in own],
                y=[row["p99_ms"] for row in own],
                name=f"{name}, p99",
                mode="lines+markers",
                line={"color": colour, "width": 2.2},
                hovertemplate="%{x:,} tokens: %{y:.1f} ms<extra></extra>",
            )
        )
    figure.add_hline(y=figures["limit_ms"], line=SLO_LINE)
    figure.update_xaxes(type="log", title_text="tokens of the prompt that runs", dtick=1)
    figure.update_yaxes(type="log", title_text="blocking time (ms)", tickvals=LOG_TICKS)
    return styled(figure, height=340)


def _operators(figures: Mapping[str, Any]) -> go.Figure | None:
    """Prefill times by length, measured and as the simulator takes them to be."""
    rows = [row for row in figures.get("rows", ()) if row["measured_s"]]
    if not rows:
        return None
    figure = go.Figure()
    lengths = [row["tokens"] for row in rows]
    for name, key, mode, colour in (
        ("measured", "measured_s", "markers", COLOURS[0]),
        ("simulator", "simulated_s", "lines", COLOURS[2]),
    ):
        figure.add_trace(
            go.Scatter(
                x=lengths,
                y=[1e3 * row[key] for row in rows],
                name=name,
                mode=mode,
                marker={"color": colour, "size": 8},
                hovertemplate="%{x:,} tokens: %{y:.2f} ms<extra></extra>",
            )
        )
    figure.update_xaxes(type="log", title_text="tokens of the prompt", dtick=1)
    figure.update_yaxes(type="log", title_text="prefill (ms)", dtick=1)
    return styled(figure, height=340)
