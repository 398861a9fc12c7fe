"""``bench events``: what an event log says of a prefill server: how busy it was, with what, how well it predicted."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Events
from sgl_flowprefill.bench.metrics.event_log import LogSummary, summarise_log
from sgl_flowprefill.bench.reports.page import browser, take_picture
from sgl_flowprefill.bench.reports.table import MISSING, milliseconds, percent, preemptions
from sgl_flowprefill.bench.reports.timeline import write_page
from sgl_flowprefill.events import read_events
from sgl_flowprefill.timeline import History


def run(options: Events, console: Console) -> int:
    """Print the figures. Raises OSError for a file that cannot be read, EventLogError for one that is no event log."""
    if options.png:
        browser()
    summary = summarise_log(read_events(options.file))
    if options.page is not None:
        height_px = write_page(History.of(read_events(options.file)), options.file, options.seconds, options.page)
        if options.png:
            take_picture(options.page, height_px)
    if options.json:
        console.print_json(json.dumps(asdict(summary)))
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=False)
    for name, value in rows(summary):
        table.add_row(name, value)
    console.print(table)
    return 0


def rows(summary: LogSummary) -> list[tuple[str, str]]:
    """Names and values of what is printed."""
    answered, forwards = max(1, summary.answered), max(1, summary.forwards)
    blocking = summary.preemption
    blocking_s = (blocking.blocking_p50_s, blocking.blocking_p99_s, blocking.blocking_max_s)
    return [
        ("span", f"{summary.span_s:.1f} s"),
        (
            "requests",
            f"{summary.requests} arrived, {summary.answered} answered, {summary.aborted} aborted, "
            f"{summary.failed} failed" + (f", {summary.without_end} without an end" if summary.without_end else ""),
        ),
        ("prefill ended in time", f"{percent(summary.in_time / answered)} of those answered"),
        ("busy", f"{summary.busy_s:.1f} s"),
        ("  of it in forward passes", percent(summary.forward_s / summary.busy_s) if summary.busy_s else MISSING),
        ("forward passes", f"{summary.forwards} of {summary.answered / forwards:.2f} requests"),
        ("  new tokens of each", f"{summary.new_tokens / forwards:.0f}"),
        ("  between two of them, p50", milliseconds(summary.between_forwards_p50_s)),
        ("preemptions", preemptions(blocking)),
        ("  blocking time p50/p99/max", " / ".join(map(milliseconds, blocking_s))),
        (
            "prediction error p50 / p90",
            f"{_share(summary.prediction_error_p50)} / {_share(summary.prediction_error_p90)}",
        ),
        ("time over the profile's, p50", MISSING if summary.over_profile is None else f"{summary.over_profile:.2f}"),
    ]


def _share(value: float | None) -> str:
    return MISSING if value is None else percent(value)
