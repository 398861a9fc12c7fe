"""The Grafana dashboard of the table's metrics: ``python -m sgl_flowprefill.metrics.dashboard`` prints its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from sgl_flowprefill.metrics import queries, table
from sgl_flowprefill.metrics.table import CAUSE, CLASS, MODEL_VALUE, STATE, Metric

WIDTH: Final = 24
"""Of a dashboard, in Grafana's columns."""
HEIGHT: Final = 8
WINDOW: Final = "$__rate_interval"
SERVERS: Final = '{instance=~"$instance"}'
OF_CLASSES: Final = '{instance=~"$instance", slo_class=~"$slo_class"}'
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


class Query(NamedTuple):
    """A line of a panel, or several."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """A picture of some metrics."""

    title: str
    unit: str
    """Grafana's name of it: ``s``, ``percentunit``, ``bytes``, ``reqps``."""
    queries: Sequence[Query]
    kind: Literal["timeseries", "stat", "heatmap"] = "timeseries"
    stacked: bool = False
    width: int = 12

    @property
    def metrics(self) -> list[Metric]:
        """What it shows."""
        return queries.metrics_in(" ".join(query.expr for query in self.queries))

    def json(self, number: int, x: int, y: int) -> dict[str, Any]:
        """As Grafana has it."""
        custom = {"fillOpacity": 30 if self.stacked else 5, "stacking": {"mode": "normal" if self.stacked else "none"}}
        limits = {"min": 0, "max": 1} if self.unit == "percentunit" else {}
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": "\n\n".join(f"`{metric.series}`: {metric.help}" for metric in self.metrics),
            "datasource": DATASOURCE,
            "gridPos": {"h": HEIGHT, "w": self.width, "x": x, "y": y},
            "fieldConfig": {
                "defaults": {"unit": self.unit, **limits, **({"custom": custom} if self.kind == "timeseries" else {})},
                "overrides": [],
            },
            "options": _OPTIONS[self.kind] | ({"yAxis": {"unit": self.unit}} if self.kind == "heatmap" else {}),
            "targets": [
                {
                    "refId": chr(ord("A") + place),
                    "datasource": DATASOURCE,
                    "editorMode": "code",
                    "expr": query.expr,
                    "legendFormat": query.legend,
                    "range": self.kind != "stat",
                    "instant": self.kind == "stat",
                    "format": "heatmap" if self.kind == "heatmap" else "time_series",
                }
                for place, query in enumerate(self.queries)
            ],
        }


_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "timeseries": {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    "stat": {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "value", "graphMode": "none"},
    "heatmap": {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64, "reverse": False, "exponent": 0.5},
        "filterValues": {"le": 1e-9},
        "tooltip": {"mode": "single"},
    },
}


def _quantiles(metric: Metric, shares: Sequence[float] = (0.5, 0.99), what: str = "", by: str = "") -> list[Query]:
    selector = OF_CLASSES if CLASS in metric.labels else SERVERS
    name = f"{{{{{by}}}}} " if by else f"{what} " if what else ""
    return [Query(queries.quantile(share, metric, WINDOW, by, selector), f"{name}p{100 * share:g}") for share in shares]


def _rate(metric: Metric, legend: str, by: str = "") -> Query:
    return Query(queries.total(metric, WINDOW, by, OF_CLASSES if CLASS in metric.labels else SERVERS), legend)


def _gauge(metric: Metric, legend: str, by: str = "", function: str = "sum") -> Query:
    return Query(queries.value(metric, by, SERVERS, function), legend)


def _model(name: str, legend: str) -> Query:
    selector = f'{{instance=~"$instance", {MODEL_VALUE.name}="{name}"}}'
    return Query(queries.value(table.TTFT_MODEL, "instance", selector, "max"), f"{{{{instance}}}} {legend}")


BY_CLASS: Final = f"{{{{{CLASS.name}}}}}"

SECTIONS: Final[dict[str, Sequence[Panel]]] = {
    "Objectives": (
        Panel(
            "TTFT attainment in this time range",
            "percentunit",
            [Query(f"1 - {queries.ttft_missed('$__range', '', OF_CLASSES, 'increase')}", "all")],
            kind="stat",
            width=4,
        ),
        Panel(
            "TTFT attainment by class",
            "percentunit",
            [Query(f"1 - {queries.ttft_missed(WINDOW, CLASS.name, OF_CLASSES)}", BY_CLASS)],
            width=10,
        ),
        Panel(
            "Misses by cause",
            "reqps",
            [_rate(table.TTFT_MISSED, f"{{{{{CAUSE.name}}}}}", CAUSE.name)],
            stacked=True,
            width=10,
        ),
        Panel("TTFT by class", "s", _quantiles(table.TTFT, by=CLASS.name)),
        Panel(
            "TTFT",
            "s",
            [Query(queries.buckets(table.TTFT, WINDOW, "", OF_CLASSES, "increase"), "{{le}}")],
            kind="heatmap",
        ),
        Panel("Slack at admission", "s", _quantiles(table.SLACK, (0.01, 0.1, 0.5), by=CLASS.name), width=8),
        Panel(
            "Requests",
            "reqps",
            [
                _rate(table.TTFT_MET, f"{BY_CLASS} in time", CLASS.name),
                _rate(table.TTFT_MISSED, f"{BY_CLASS} missed", CLASS.name),
                _rate(table.ABORTED, f"{BY_CLASS} aborted", CLASS.name),
                _rate(table.INVALID, f"{BY_CLASS} invalid", CLASS.name),
            ],
            stacked=True,
            width=8,
        ),
        Panel("Refused for overload, of those missed", "reqps", [_rate(table.SHED, BY_CLASS, CLASS.name)], width=8),
    ),
    "Queue and suspended prefills": (
        Panel(
            "Queue by feasibility",
            "short",
            [_gauge(table.QUEUE, f"{{{{{STATE.name}}}}}", STATE.name)],
            stacked=True,
        ),
        Panel(
            "Prefills that have started",
            "short",
            [_gauge(table.LIVE_TASKS, "run or are suspended"), _gauge(table.SUSPENDED_TASKS, "are suspended")],
        ),
        Panel("Memory of suspended prefills", "bytes", [_gauge(table.SUSPENDED_BYTES, "{{instance}}", "instance")]),
        Panel(
            "How long prefills are suspended",
            "s",
            [
                *_quantiles(table.SUSPENSION),
                _gauge(table.OLDEST_SUSPENDED, "suspended now, the oldest", function="max"),
            ],
        ),
    ),
    "Preemption": (
        Panel("Preemptions", "ops", [_rate(table.PREEMPTIONS, "{{instance}}", "instance")], width=8),
        Panel(
            "Blocking, and the wait for a stop in it",
            "s",
            [*_quantiles(table.BLOCKING, what="blocking"), *_quantiles(table.STOP_WAIT, what="stop wait")],
            width=8,
        ),
        Panel("Cost of a scheduling event", "s", _quantiles(table.EVENT_COST), width=8),
    ),
    "Prediction and use of the machine": (
        Panel(
            "Measured over expected time of prefills",
            "none",
            _quantiles(table.PREDICTION_ERROR, (0.1, 0.5, 0.9)),
            width=8,
        ),
        Panel(
            "Correction and margin",
            "none",
            [_model("correction", "correction"), _model("margin", "margin")],
            width=8,
        ),
        Panel(
            "Share of the time in forward passes",
            "percentunit",
            [
                _rate(table.FORWARD, "{{instance}} prefills", "instance"),
                _rate(table.STEP, "{{instance}} decode steps", "instance"),
                _rate(table.EXPLORATION, "{{instance}} exploration", "instance"),
            ],
            stacked=True,
            width=8,
        ),
    ),
    "Decode steps (servers that prefill and decode)": (
        Panel(
            "TBT attainment",
            "percentunit",
            [Query(f"1 - {queries.tbt_missed(WINDOW, '', SERVERS)}", "tokens in time")],
            width=8,
        ),
        Panel("Lateness of decode steps", "s", _quantiles(table.STEP_LATENESS), width=8),
        Panel("Prefills given back", "ops", [_rate(table.GIVEN_BACK, "{{instance}}", "instance")], width=8),
    ),
}
"""The panels, by section."""


def panels() -> list[Panel]:
    """Every panel."""
    return [panel for section in SECTIONS.values() for panel in section]


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    shown: list[dict[str, Any]] = []
    y = 0
    for title, section in SECTIONS.items():
        shown.append(
            {
                "id": len(shown) + 1,
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": {"h": 1, "w": WIDTH, "x": 0, "y": y},
            }
        )
        y, x = y + 1, 0
        for panel in section:
            if x + panel.width > WIDTH:
                y, x = y + HEIGHT, 0
            shown.append(panel.json(len(shown) + 1, x, y))
            x += panel.width
        y += HEIGHT
    return {
        "uid": "sgl-flowprefill",
        "title": "FlowPrefill",
        "tags": ["sglang", "flowprefill"],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"},
                _variable("instance", "Server", f"label_values({table.PREEMPTIONS.series}, instance)"),
                _variable(CLASS.name, "Class", f"label_values({table.TTFT_MET.series}, {CLASS.name})"),
            ]
        },
        "annotations": {"list": []},
        "panels": shown,
    }


def _variable(name: str, label: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": query, "refId": name},
        "definition": query,
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2))
