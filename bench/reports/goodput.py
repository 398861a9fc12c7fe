"""The self-contained HTML report of a capacity search, made from the document that ``goodput.json`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich import box
from rich.table import Table

from sgl_flowprefill.bench.reports.page import COLOURS, LOG_TICKS, MUTED, SLO_LINE, coloured, curve, render, styled
from sgl_flowprefill.bench.reports.table import MISSING, counted, milliseconds, percent

Document = Mapping[str, Any]
RATIOS: Final = {
    "vs_unchunked_fcfs": "rate at {}%, against unchunked FCFS",
    "vs_best_stock": "rate at {}%, against the best stock system",
}
OTHER_RATIOS: Final = {
    "blocking_vs_layer": "shorter mean blocking than with preemption checkpoints by layer",
    "slo_tightness_vs_best_stock": "tighter SLOs than the best stock system at equal attainment",
    "uncontended_throughput_vs_unchunked_fcfs": "throughput of isolated prompts, against unchunked",
}


def write_html(document: Document, path: Path) -> None:
    """Write the report; the file needs no network to be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render_html(document), encoding="utf-8")


def render_html(document: Document) -> str:
    """The report as one HTML document."""
    return render(
        "goodput.html.j2",
        {
            "rates": rates(document),
            "attainment": attainment_over_rate(document),
            "ttft": ttft_cdfs(document),
            "scales": attainment_over_scale(document),
            "blocking": blocking(document),
        },
        document=document,
        colours={name: colour for name, _, colour in _coloured(document)} | {"flowprefill": COLOURS[0]},
        ratio_names={name: _ratio_name(name) for name in document["ratios"]},
        columns=columns(document),
        rows=[(system["label"], cells(system, document)) for system in document["systems"].values()],
    )


def rates(document: Document) -> go.Figure:
    """A bar for each system and attainment."""
    figure = go.Figure()
    systems = document["systems"].values()
    names = [system["label"] for system in systems]
    for share, colour in coloured(shares(document)):
        found = [(system["max_rate_rps"][share], system["ci95"][share]) for system in systems]
        figure.add_trace(
            go.Bar(
                x=[rate_rps or 0.0 for rate_rps, _ in found],
                y=names,
                name=f"{share}% in time",
                orientation="h",
                marker={"color": colour},
                error_x={
                    "type": "data",
                    "symmetric": False,
                    "array": [ci95[1] - rate_rps if rate_rps and ci95 else 0.0 for rate_rps, ci95 in found],
                    "arrayminus": [rate_rps - ci95[0] if rate_rps and ci95 else 0.0 for rate_rps, ci95 in found],
                    "color": MUTED,
                    "thickness": 1.5,
                },
                hovertemplate="%{y}: %{x:.2f} req/s<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=[system["simulated_max_rate_rps"][share] for system in systems],
                y=names,
                mode="markers",
                name=f"simulated, {share}%",
                marker={"symbol": "x-thin", "size": 9, "line": {"color": colour, "width": 2}},
                hovertemplate="simulated: %{x:.2f} req/s<extra></extra>",
            )
        )
    figure.update_xaxes(title_text="req/s", rangemode="tozero")
    figure.update_yaxes(autorange="reversed")
    return styled(figure, height=140 + 44 * len(names)).update_layout(barmode="group", margin={"l": 190})


def attainment_over_rate(document: Document) -> go.Figure:
    """A point for each replay."""
    figure = go.Figure()
    for _, system, colour in _coloured(document):
        points = sorted((one["rate_rps"], *one["attainment"]) for one in system["replays"])
        figure.add_trace(
            go.Scatter(
                x=[rate_rps for rate_rps, _, _ in points],
                y=[(low + high) / 2 for _, low, high in points],
                error_y={"type": "data", "array": [(high - low) / 2 for _, low, high in points], "thickness": 1},
                name=system["label"],
                mode="markers",
                marker={"color": colour, "size": 8},
                hovertemplate="%{x:.2f} req/s: %{y:.1%}<extra></extra>",
            )
        )
    for share in document["attainments"]:
        figure.add_hline(y=share, line=SLO_LINE)
    figure.update_xaxes(title_text="req/s")
    judged = "joint attainment" if _is_joint(document) else "TTFT SLO attainment"
    figure.update_yaxes(title_text=judged, range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=420)


def ttft_cdfs(document: Document) -> go.Figure | None:
    """For each class the share of its requests whose first token came within a time; None before there are any."""
    by_system = [system["ttft_by_class"] for system in document["systems"].values()]
    slo_s = {name: found["slo_s"] for classes in by_system for name, found in classes.items()}
    if not slo_s:
        return None
    figure = make_subplots(
        cols=len(slo_s),
        shared_yaxes=True,
        horizontal_spacing=0.025,
        subplot_titles=[f"<b>{name}</b>, SLO {slo_s[name]:.2g} s" for name in slo_s],
    )
    for column, name in enumerate(slo_s, start=1):
        for key, system, colour in _coloured(document):
            if found := system["ttft_by_class"].get(name):
                line = curve(key, system["label"], colour, found["values_s"], found["shares"], step=True)
                figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
        figure.add_vline(x=slo_s[name], line=SLO_LINE, row=1, col=column)
    figure.update_xaxes(type="log", tickvals=LOG_TICKS, title_text="TTFT (s)")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=400)


def attainment_over_scale(document: Document) -> go.Figure:
    """Attainment when every SLO is multiplied by a scale."""
    figure = go.Figure()
    for key, system, colour in _coloured(document):
        if found := system["attainment_by_slo_scale"]:
            scales = [float(scale) for scale in found]
            figure.add_trace(curve(key, system["label"], colour, scales, list(found.values()), step=False))
    figure.add_vline(x=1, line=SLO_LINE)
    figure.update_xaxes(title_text="SLO scale (smaller is tighter)", dtick=0.2)
    figure.update_yaxes(title_text="TTFT SLO attainment", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=380)


def blocking(document: Document) -> go.Figure | None:
    """Distribution of blocking times; None if no system preempted."""
    figure = go.Figure()
    for key, system, colour in _coloured(document):
        found = system["blocking"]
        if found["values_s"]:
            values_ms = [max(value_s, 1e-5) * 1e3 for value_s in found["values_s"]]
            figure.add_trace(curve(key, system["label"], colour, values_ms, found["shares"], step=True))
    if not figure.data:
        return None
    figure.update_xaxes(type="log", tickvals=LOG_TICKS, title_text="blocking time (ms)")
    figure.update_yaxes(title_text="share of preemptions", range=[0, 1.02], tickformat=".0%")
    return styled(figure, height=380)


def shares(document: Document) -> list[str]:
    """The attainments that were searched, as keys of the document: ``90`` for 0.9."""
    return list(document["best_stock"])


def rates_table(document: Document) -> Table:
    """Highest rate of every system at every attainment."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in columns(document):
        table.add_column(column, justify="right")
    for system in document["systems"].values():
        table.add_row(system["label"], *cells(system, document))
    return table


def columns(document: Document) -> list[str]:
    """Heads of ``cells``."""
    tbt = ["at one rate: in time", "by mean gap", "TBT p50 / p99 / longest", "retracted"] if _is_joint(document) else []
    return [*(f"req/s at {share}%" for share in shares(document)), *tbt, "isolated prompts", "blocking"]


def cells(system: Document, document: Document) -> list[str]:
    """A system's row of the table."""
    speed = system["uncontended_tokens_per_s"]
    return [
        *(_rate(system, share) for share in shares(document)),
        *(_joint(system["joint"]) if _is_joint(document) else ()),
        f"{speed:.0f} tokens/s" if speed else MISSING,
        milliseconds(system["blocking_mean_s"]),
    ]


def _is_joint(document: Document) -> bool:
    """Whether the time between tokens was judged, too."""
    return bool(document.get("judge", "ttft") != "ttft")


def _joint(joint: Document | None) -> list[str]:
    """What came of the time between tokens at the rate at which systems are compared."""
    if joint is None:
        return [MISSING] * 4
    times = " / ".join(milliseconds(joint[name]) for name in ("tbt_p50_s", "tbt_p99_s", "tbt_max_s"))
    retracted = counted(joint.get("retractions"))
    return [percent(joint["joint_attainment"]), percent(joint["joint_attainment_mean_tpot"]), times, retracted]


def show(value: float | None, ci95: Sequence[float] | None) -> str:
    """A figure with its interval."""
    if value is None:
        return MISSING
    interval = f" ({ci95[0]:.2f} to {ci95[1]:.2f})" if ci95 else ""
    return f"{value:.2f}{interval}"


def _rate(system: Document, share: str) -> str:
    below_rps = system["below_rps"].get(share)
    found = show(system["max_rate_rps"][share], system["ci95"][share])
    return found if below_rps is None else f"below {below_rps:.2f}"


def _coloured(document: Document) -> Iterator[tuple[str, Document, str]]:
    """(name, system, colour) of every system."""
    for (name, system), colour in coloured(document["systems"].items()):
        yield name, system, colour


def _ratio_name(name: str) -> str:
    if name in OTHER_RATIOS:
        return OTHER_RATIOS[name]
    against, _, share = name.rpartition("_")
    return RATIOS.get(against, f"rate at {{}}%, against {against.removeprefix('vs_')}").format(share)
