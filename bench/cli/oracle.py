"""``bench simulate --oracle``: what predicting as a server does costs, beside an oracle on the same traces.

The oracle knows the mean time of every forward on the machine as it is, also when that becomes slower or faster.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.cli.options import Simulate
from sgl_flowprefill.bench.metrics.joint import share
from sgl_flowprefill.bench.metrics.paired import Difference
from sgl_flowprefill.bench.reports.table import percent
from sgl_flowprefill.bench.simulator.joint import answered
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.systems import Setup, run
from sgl_flowprefill.bench.systems.catalog import simulated
from sgl_flowprefill.bench.workloads.trace import Trace

JUST_CHANGED: Final = 200
"""Requests from the change of the machine on that are looked at by themselves, where so many come in each trace."""

Judged = Callable[[SimRequest], bool]
Part = Callable[[Trace, Sequence[SimRequest]], Sequence[SimRequest]]
"""Those requests of a run of a trace that are looked at."""


def compare(name: str, traces: Sequence[Trace], options: Simulate, setup: Setup, console: Console) -> dict[str, Any]:
    """Every policy with both predictions at one rate. Where the machine changes in the middle, the requests that come
    just after that are judged by themselves, too.

    Servers that decode as well are judged by TTFT and gaps together.
    """
    setups = {"oracle": dataclasses.replace(setup, learned=False), "learned": dataclasses.replace(setup, learned=True)}
    judged = _meets_both if options.unified else _meets_ttft
    parts: dict[str, Part] = {"all": _all}
    if setup.slower:
        just_changed = min(JUST_CHANGED, *(len(trace.requests) - _steady(trace) for trace in traces))
        parts[f"first {just_changed} after the change"] = lambda trace, requests: requests[
            _steady(trace) : _steady(trace) + just_changed
        ]
    changed = f", {setup.change} from the middle on" if setup.slower else ""
    table = Table(title=setup.title(name, traces) + changed, title_justify="left")
    for column in ("policy", "requests", "oracle", "learned", "points (95% interval)"):
        table.add_column(column, justify="left" if column in ("policy", "requests") else "right")
    figures: dict[str, Any] = {}
    for system in options.policy:
        scheduler = simulated(system, "unified" if options.unified else "pair")
        runs = {which: [run(scheduler, trace, one).requests for trace in traces] for which, one in setups.items()}
        figures[system] = {}
        for label, part in parts.items():
            met = {
                which: [share(map(judged, part(trace, requests))) for trace, requests in zip(traces, of, strict=True)]
                for which, of in runs.items()
            }
            difference = Difference.of(met["learned"], met["oracle"])
            means = {which: sum(shares) / len(shares) for which, shares in met.items()}
            figures[system][label] = means | difference.to_dict()
            table.add_row(system, label, percent(means["oracle"]), percent(means["learned"]), str(difference))
    console.print(table)
    return {"rate_rps": traces[0].rate_rps, "slower": setup.slower, "systems": figures}


def _all(trace: Trace, requests: Sequence[SimRequest]) -> Sequence[SimRequest]:
    return requests


def _steady(trace: Trace) -> int:
    """Requests that come before the machine changes."""
    return bisect_left(trace.requests, trace.middle_s, key=lambda request: request.arrival_s)


def _meets_ttft(request: SimRequest) -> bool:
    return request.met


def _meets_both(request: SimRequest) -> bool:
    return answered(request).meets_both
