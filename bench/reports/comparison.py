"""The self-contained HTML report of a comparison: headline, table, plots, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgl_flowprefill.bench.metrics.comparison import Comparison
from sgl_flowprefill.bench.metrics.joint import LATE_SHARE
from sgl_flowprefill.bench.metrics.missed import Missed
from sgl_flowprefill.bench.metrics.requests import SLO_SCALES
from sgl_flowprefill.bench.reports.page import LOG_TICKS, SLO_LINE, coloured, curve, render, styled
from sgl_flowprefill.bench.reports.table import milliseconds, percent, table_rows

GAPS_SHOWN: Final = 200
"""Points of a curve, most of them towards the longest gaps."""
MOST_MISSED: Final = 25
"""Requests that the page names of those that missed their objective."""


def write_html(comparison: Comparison, path: Path) -> None:
    """Write the report; the file needs no network to be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(comparison), encoding="utf-8")


def render_html(comparison: Comparison) -> str:
    """The report as one HTML document with plotly's script inside."""
    figures = {
        "ttft": ttft_cdfs(comparison),
        "attainment": attainment_curve(comparison),
        "tbt": tbt_cdfs(comparison),
        "blocking": blocking_histogram(comparison),
    }
    return render(
        "comparison.html.j2",
        figures,
        comparison=comparison,
        document=comparison.to_dict(),
        colours={system.name: colour for system, colour in coloured(comparison.systems)},
        rows=list(table_rows(comparison)),
        percent=percent,
        milliseconds=milliseconds,
        flatten=_flatten,
        causes=_causes,
        most_missed=MOST_MISSED,
    )


def ttft_cdfs(comparison: Comparison) -> go.Figure:
    """For each class the share of its requests whose first token came within a time; failed requests never do."""
    classes = comparison.trace.classes
    slo_s = {request.request_class: request.ttft_slo_s for request in comparison.trace.requests}
    figure = make_subplots(
        cols=len(classes),
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=[f"<b>{name}</b>, SLO {slo_s[name]:.2g} s" for name in classes],
    )
    for column, name in enumerate(classes, start=1):
        for system, colour in coloured(comparison.systems):
            members = [result for result in system.run.results if result.request_class == name]
            ttft_s = sorted(result.ttft_s for result in members if result.completed and result.ttft_s is not None)
            share = np.arange(1, len(ttft_s) + 1) / max(1, len(members))
            line = curve(system.name, system.label, colour, ttft_s, share.tolist(), step=True)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
        figure.add_vline(x=slo_s[name], line=SLO_LINE, row=1, col=column)
        times_s = [slo_s[name], *(ttft_s for trace in figure.select_traces(col=column) for ttft_s in trace.x)]
        log_range = [np.log10(min(times_s) * 0.8), np.log10(max(times_s) * 1.25)]
        figure.update_xaxes(type="log", range=log_range, tickvals=LOG_TICKS, title_text="TTFT (s)", col=column)
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    figure.update_yaxes(title_text="share of requests", col=1)
    return styled(figure, height=360)


def tbt_cdfs(comparison: Comparison) -> go.Figure | None:
    """The share of gaps that are longer than a time, on logarithmic axes; None where no answer has two tokens."""
    figure = go.Figure()
    for system, colour in coloured(comparison.systems):
        gaps_s = np.sort([gap_s for result in system.run.results for gap_s in result.tbt_s])
        if not len(gaps_s):
            continue
        longer = np.arange(len(gaps_s), 0, -1) / len(gaps_s)  # or as long
        places = np.unique(len(gaps_s) - np.geomspace(1, len(gaps_s), GAPS_SHOWN).astype(int))
        gaps_ms, shares = (gaps_s[places] * 1e3).tolist(), longer[places].tolist()
        figure.add_trace(curve(system.name, system.label, colour, gaps_ms, shares, step=True))
    if not figure.data:
        return None
    for tbt_s in sorted({one.tbt_slo_s for one in comparison.trace.requests if np.isfinite(one.tbt_slo_s)}):
        figure.add_vline(x=tbt_s * 1e3, line=SLO_LINE)
    figure.add_hline(y=LATE_SHARE, line=SLO_LINE)
    figure.update_xaxes(type="log", tickvals=LOG_TICKS, title_text="time between tokens (ms)")
    figure.update_yaxes(type="log", title_text="share of gaps that are longer", tickformat=".2~%")
    return styled(figure, height=360)


def attainment_curve(comparison: Comparison) -> go.Figure:
    """TTFT attainment when every SLO is multiplied by a scale."""
    figure = go.Figure()
    for system, colour in coloured(comparison.systems):
        shares = [system.summary.attainment_by_slo_scale[f"{scale:.1f}"] for scale in SLO_SCALES]
        figure.add_trace(curve(system.name, system.label, colour, list(SLO_SCALES), shares, step=False))
    figure.add_vline(x=1, line=SLO_LINE)
    figure.update_xaxes(title_text="SLO scale (1 = the objectives as given, smaller is tighter)", dtick=0.2)
    figure.update_yaxes(title_text="TTFT SLO attainment", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=360)


def blocking_histogram(comparison: Comparison) -> go.Figure | None:
    """Blocking times of preemptions on a logarithmic axis; None if no system preempted."""
    samples = [
        (system, colour, np.maximum(np.asarray(system.blocking_s), 1e-5) * 1e3)
        for system, colour in coloured(comparison.systems)
        if system.blocking_s
    ]
    if not samples:
        return None
    low = min(float(values.min()) for *_, values in samples)
    high = max(float(values.max()) for *_, values in samples)
    edges = np.geomspace(low * 0.9, high * 1.1, 31)
    figure = go.Figure()
    for system, colour, values in samples:
        counts, _ = np.histogram(values, edges)
        figure.add_trace(
            go.Bar(
                x=((edges[1:] + edges[:-1]) / 2).tolist(),
                y=counts.tolist(),
                width=np.diff(edges).tolist(),
                name=system.label,
                marker={"color": colour, "line": {"width": 0}},
                opacity=0.85,
                hovertemplate="%{x:.2f} ms: %{y}<extra></extra>",
            )
        )
    figure.update_xaxes(type="log", title_text="blocking time (ms)", tickvals=LOG_TICKS)
    figure.update_yaxes(title_text="preemptions")
    return styled(figure, height=360).update_layout(bargap=0, barmode="overlay", showlegend=len(samples) > 1)


def _causes(missed: Sequence[Missed]) -> str:
    """How many requests missed for which cause, the most frequent first."""
    counts = Counter(one.cause for one in missed)
    return ", ".join(f"{count} {cause}" for cause, count in counts.most_common())


def _flatten(mapping: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of every setting that has a value."""
    return [(name, str(value)) for name, value in mapping.items() if value not in (None, "", [], {})]
