"""The self-contained HTML report of a goodput run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sgl_flowprefill.bench.capacity.results import Estimate, GoodputResult, SystemFigures
from sgl_flowprefill.bench.reports.page import COLOURS, LOG_TICKS, MUTED, SLO_LINE, render, styled
from sgl_flowprefill.bench.reports.table import MISSING, milliseconds

RATIOS: Final = {
    "vs_unchunked_fcfs": "rate at {}%, against unchunked FCFS",
    "vs_best_stock": "rate at {}%, against the best stock system",
}
OTHER_RATIOS: Final = {
    "blocking_vs_layer": "shorter mean blocking than with checkpoints by layer",
    "slo_tightness_vs_best_stock": "tighter SLOs than the best stock system at equal attainment",
    "uncontended_throughput_vs_unchunked_fcfs": "throughput of lone prompts, against unchunked",
}


def write_html(result: GoodputResult, path: Path) -> None:
    """Write the report; the file needs no network to be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(result), encoding="utf-8")


def render_html(result: GoodputResult) -> str:
    """The report as one HTML document."""
    ratios = result.ratios_of_ours
    return render(
        "goodput.html.j2",
        {
            "rates": rates(result),
            "attainment": attainment_over_rate(result),
            "ttft": ttft_cdfs(result),
            "scales": attainment_over_scale(result),
            "blocking": blocking(result),
        },
        document=result.to_dict(),
        answers=result.answers.text(result.trace),
        colours={name: colour for name, _, colour in _coloured(result)} | {"flowprefill": COLOURS[0]},
        ratios=ratios,
        ratio_names={name: _ratio_name(name) for name in ratios},
        columns=columns(result),
        rows=[(figures.system.label, cells(figures, result)) for figures in result.figures.values()],
    )


def rates(result: GoodputResult) -> go.Figure:
    """A bar for each system and attainment."""
    figure = go.Figure()
    names = [figures.system.label for figures in result.figures.values()]
    for share, colour in zip(result.goal.attainments, COLOURS, strict=False):
        found = [figures.max_rate(share) for figures in result.figures.values()]
        values = [rate.value if rate else 0.0 for rate in found]
        figure.add_trace(
            go.Bar(
                x=values,
                y=names,
                name=f"{share:.0%} in time",
                orientation="h",
                marker={"color": colour},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [rate.ci95[1] - rate.value if rate and rate.ci95 else 0.0 for rate in found],
                    "arrayminus": [rate.value - rate.ci95[0] if rate and rate.ci95 else 0.0 for rate in found],
                    "color": MUTED,
                    "thickness": 1.5,
                },
                hovertemplate="%{y}: %{x:.2f} req/s<extra></extra>",
            )
        )
        simulated = [figures.simulated_rps[share] for figures in result.figures.values()]
        figure.add_trace(
            go.Scatter(
                x=simulated,
                y=names,
                mode="markers",
                name=f"simulated, {share:.0%}",
                marker={"symbol": "x-thin", "size": 9, "line": {"color": colour, "width": 2}},
                hovertemplate="simulated: %{x:.2f} req/s<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="req/s", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return styled(figure, height=140 + 44 * len(names)).update_layout(barmode="group", margin={"l": 190})


def attainment_over_rate(result: GoodputResult) -> go.Figure:
    """A point for each replay."""
    figure = go.Figure()
    for name, figures, colour in _coloured(result):
        points = sorted(
            (probe.rate_rps, *probe.attainment_bounds)
            for probe in result.probes
            if probe.system == name and probe.slo_scale == 1 and probe.run.client.valid
        )
        figure.add_trace(
            go.Scatter(
                x=[rate_rps for rate_rps, _, _ in points],
                y=[(low + high) / 2 for _, low, high in points],
                error_y={"type": "data", "array": [(high - low) / 2 for _, low, high in points], "thickness": 1},
                name=figures.system.label,
                mode="markers",
                marker={"color": colour, "size": 8},
                hovertemplate="%{x:.2f} req/s: %{y:.1%}<extra></extra>",
            )
        )
    for share in result.goal.attainments:
        figure.add_hline(y=share, line=SLO_LINE)
    figure.update_xaxes(title_text="req/s")
    figure.update_yaxes(title_text="TTFT SLO attainment", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=420)


def ttft_cdfs(result: GoodputResult) -> go.Figure | None:
    """For each class the share of its requests whose first token came within a time; None before there are any."""
    slo_s = {r.request_class: r.ttft_slo_s for figures in result.figures.values() for r in figures.results()}
    if not slo_s:
        return None
    classes = sorted(slo_s, key=lambda name: slo_s[name])
    figure = make_subplots(
        cols=len(classes),
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=[f"<b>{name}</b>, SLO {slo_s[name]:.2g} s" for name in classes],
    )
    for column, name in enumerate(classes, start=1):
        for _, figures, colour in _coloured(result):
            members = [one for one in figures.results() if one.request_class == name]
            ttft_s = sorted(one.ttft_s for one in members if one.completed and one.ttft_s is not None)
            share = np.arange(1, len(ttft_s) + 1) / max(1, len(members))
            line = _line(figures, colour, ttft_s, share.tolist(), step=True)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
        figure.add_vline(x=slo_s[name], line=SLO_LINE, row=1, col=column)
    figure.update_xaxes(type="log", tickvals=LOG_TICKS, title_text="TTFT (s)")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=400)


def attainment_over_scale(result: GoodputResult) -> go.Figure:
    """Attainment when every SLO is multiplied by a scale."""
    figure = go.Figure()
    for _, figures, colour in _coloured(result):
        if shares := figures.attainment_by_slo_scale:
            figure.add_trace(_line(figures, colour, list(shares), list(shares.values()), step=False))
    figure.add_vline(x=1, line=SLO_LINE)
    figure.update_xaxes(title_text="SLO scale (smaller is tighter)", dtick=0.2)
    figure.update_yaxes(title_text="TTFT SLO attainment", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=380)


def blocking(result: GoodputResult) -> go.Figure | None:
    """Distribution of blocking times; None if no system preempted."""
    figure = go.Figure()
    for _, figures, colour in _coloured(result):
        if values_s := sorted(figures.blocking_s):
            share = np.arange(1, len(values_s) + 1) / len(values_s)
            values_ms = [max(value_s, 1e-5) * 1e3 for value_s in values_s]
            figure.add_trace(_line(figures, colour, values_ms, share.tolist(), step=True))
    if not figure.data:
        return None
    figure.update_xaxes(type="log", tickvals=LOG_TICKS, title_text="blocking time (ms)")
    figure.update_yaxes(title_text="share of preemptions", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=380)


def _coloured(result: GoodputResult) -> Iterator[tuple[str, SystemFigures, str]]:
    """(name, figures, colour) of every system."""
    for place, (name, figures) in enumerate(result.figures.items()):
        yield name, figures, COLOURS[place % len(COLOURS)]


def _line(figures: SystemFigures, colour: str, x: list[float], y: list[float], *, step: bool) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        name=figures.system.label,
        legendgroup=figures.system.name,
        mode="lines" if step else "lines+markers",
        line={"color": colour, "width": 2.2, "shape": "hv" if step else "linear"},
        hovertemplate="%{x:.3g}: %{y:.1%}<extra></extra>",
    )


def columns(result: GoodputResult) -> list[str]:
    """Heads of ``cells``."""
    return [*(f"req/s at {share:.0%}" for share in result.goal.attainments), "lone prompts", "blocking"]


def cells(figures: SystemFigures, result: GoodputResult) -> list[str]:
    """A system's row of the table."""
    speed = figures.uncontended_tokens_per_s
    return [
        *(_rate(figures, share) for share in result.goal.attainments),
        f"{speed:.0f} tokens/s" if speed else MISSING,
        milliseconds(figures.blocking_mean_s),
    ]


def _rate(figures: SystemFigures, share: float) -> str:
    below_rps = figures.below_rps(share)
    return show(figures.max_rate(share)) if below_rps is None else f"below {below_rps:.2f}"


def show(estimate: Estimate | None) -> str:
    """A figure with its interval."""
    if estimate is None:
        return MISSING
    interval = f" ({estimate.ci95[0]:.2f} to {estimate.ci95[1]:.2f})" if estimate.ci95 else ""
    return f"{estimate.value:.2f}{interval}"


def _ratio_name(name: str) -> str:
    if name in OTHER_RATIOS:
        return OTHER_RATIOS[name]
    against, _, share = name.rpartition("_")
    return RATIOS[against].format(share)
