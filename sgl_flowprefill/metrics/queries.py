"""PromQL over the metrics of the table: what dashboard and alert rules ask."""

from __future__ import annotations

import re
from typing import Final

from sgl_flowprefill.metrics.table import CLASS, PREFIX, TABLE, TBT_MET, TBT_MISSED, TTFT_MET, TTFT_MISSED, Kind, Metric

_NAME: Final = re.compile(rf"\b{PREFIX}\w+")


def metrics_in(query: str) -> list[Metric]:
    """The metrics of the table whose samples ``query`` reads, in the table's order.

    Raises ValueError for a name of FlowPrefill's that no metric has.
    """
    names = set(_NAME.findall(query))
    found = [metric for metric in TABLE if names.intersection(metric.samples)]
    unknown = names.difference(*(metric.samples for metric in found))
    if unknown:
        raise ValueError(f"no metric of the table has samples called {', '.join(sorted(unknown))}, in {query!r}")
    return found


def total(metric: Metric, window: str, by: str = "", selector: str = "", function: str = "rate") -> str:
    """The rate of a counter within ``window`` (or another ``function`` of it), summed ``by`` labels."""
    assert metric.kind is Kind.COUNTER
    return f"{_sum(by)} ({function}({metric.series}{selector}[{window}]))"


def quantile(share: float, metric: Metric, window: str, by: str = "", selector: str = "") -> str:
    """The value of a histogram below which ``share`` of what was observed within ``window`` lies."""
    return f"histogram_quantile({share:g}, {buckets(metric, window, by, selector)})"


def buckets(metric: Metric, window: str, by: str = "", selector: str = "", function: str = "rate") -> str:
    """Observations of a histogram within ``window``, by bucket."""
    assert metric.kind is Kind.HISTOGRAM
    return f"{_sum(f'{by}, le' if by else 'le')} ({function}({metric.full_name}_bucket{selector}[{window}]))"


def value(metric: Metric, by: str = "", selector: str = "", function: str = "sum") -> str:
    """A gauge, summed over servers (or another ``function``)."""
    assert metric.kind is Kind.GAUGE
    return f"{function}{f' by ({by})' if by else ''} ({metric.series}{selector})"


def missed(met: Metric, missed: Metric, window: str, by: str = "", selector: str = "", function: str = "rate") -> str:
    """Share of what was judged within ``window`` that missed; no value where nothing was."""
    bad, good = (total(metric, window, by, selector, function) for metric in (missed, met))
    return f"{bad} / ({bad} + {good})"


def ttft_missed(window: str, by: str = CLASS.name, selector: str = "", function: str = "rate") -> str:
    """Share of requests whose first token was late."""
    return missed(TTFT_MET, TTFT_MISSED, window, by, selector, function)


def tbt_missed(window: str, by: str = "", selector: str = "", function: str = "rate") -> str:
    """Share of tokens behind the first that were late."""
    return missed(TBT_MET, TBT_MISSED, window, by, selector, function)


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
