"""Self-contained HTML pages with plots, and pictures of them: what the reports have in common."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import jinja2
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

COLOURS: Final = ("#0d9488", "#e2711d", "#6366f1", "#be185d", "#65a30d", "#0284c7")
"""Colours of systems, in order; they read on light and on dark."""
MUTED: Final = "#8a919c"
GRID: Final = "rgba(128,136,148,0.22)"
SLO_LINE: Final = {"color": MUTED, "dash": "dash", "width": 1.5}
LOG_TICKS: Final = [digit * 10.0**power for power in range(-3, 5) for digit in (1, 3)]
FONT: Final = "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif"

BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
PICTURE_PX: Final = (1180, 1270)
PICTURE_TIMEOUT_S: Final = 60.0

Item = TypeVar("Item")


def coloured(items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
    """Each of ``items`` with its colour; behind the last colour comes the first again."""
    return zip(items, itertools.cycle(COLOURS), strict=False)


def render(template: str, figures: Mapping[str, go.Figure | None], **values: Any) -> str:
    """The page of a template of this package: one HTML document with plotly's script inside.

    The template finds the figures that there are under ``plots``.
    """
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    plots = {name: _html(name, figure) for name, figure in figures.items() if figure is not None}
    return environment.get_template(template).render(plots=plots, plotly_js=get_plotlyjs(), **values)


def browser() -> str:
    """The installed browser that can take pictures. Raises ValueError with the remedy where there is none."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        raise ValueError(f"--png needs a browser, one of {', '.join(BROWSERS)}: install one, or leave the option out")
    return found


def take_picture(page: Path, height_px: int = PICTURE_PX[1]) -> Path:
    """The top of an HTML page as a PNG beside it. Raises ValueError with what the browser said where it takes none."""
    picture = page.with_suffix(".png").resolve()
    picture.unlink(missing_ok=True)
    command = [
        browser(),
        "--headless",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",  # ms that the page's script may believe to have passed
        f"--window-size={PICTURE_PX[0]},{height_px}",
        f"--screenshot={picture}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        page.resolve().as_uri(),
    ]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PICTURE_TIMEOUT_S, check=False).stderr
    if not picture.exists():
        raise ValueError(f"{command[0]} took no picture of {page}: {said.strip()[-500:]}")
    return picture


def curve(name: str, label: str, colour: str, x: Sequence[float], y: Sequence[float], *, step: bool) -> go.Scatter:
    """A line of the system ``name``, which the legend calls ``label``: its lines in all plots of a figure come and go
    together.
    """
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=label,
        legendgroup=name,
        mode="lines" if step else "lines+markers",
        line={"color": colour, "width": 2.5, "shape": "hv" if step else "linear"},
        hovertemplate="%{x:.3g}: %{y:.1%}<extra></extra>",
    )


def styled(figure: go.Figure, height: int) -> go.Figure:
    """``figure`` in the style of the reports."""
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": GRID, "title_font": {"size": 12}}
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure.update_layout(
        height=height,
        margin={"l": 60, "r": 16, "t": 64, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "color": MUTED, "size": 12},
        legend={"orientation": "h", "x": 0, "y": 1.12, "yanchor": "bottom", "font": {"size": 13}},
    )


def _html(name: str, figure: go.Figure) -> str:
    html: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{name}",
        config={"displayModeBar": False, "responsive": True},
    )
    return html
