"""Alert rules for Prometheus: ``python -m sgl_flowprefill.metrics.alerts --target 0.95`` prints them.

Objectives are watched by the rate at which they burn the budget of misses that a target leaves, each over a long and a
short window together (Google's SRE Workbook, chapter 5, "Multiwindow, Multi-Burn-Rate Alerts"): the long one sees to it
that enough has been missed to matter, the short one that it is still going on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from sgl_flowprefill.metrics import queries, table
from sgl_flowprefill.metrics.table import CLASS, MODEL_VALUE, Metric

TARGET: Final = 0.95
"""Share of requests, and of tokens, that shall be in time."""
MOST_MISSED: Final = 0.8
"""A burn rate that asks for a larger share of misses than that would never alert where the target is low."""
LEAST_JUDGED: Final = 20
"""Requests or tokens in the long window below which a share says little."""
CORRECTED: Final = 2.0
"""Times by which prefills are slower than in the profile from which on somebody should look."""
OBSERVED: Final = "30m"
"""Within which prefills have to have run, so that the correction says something of now."""
SERVICE: Final = "model_name, job"
"""Labels of what has objectives of its own: servers of one model that are scraped together."""


class Burn(NamedTuple):
    """When misses are reported."""

    name: str
    long: str
    short: str
    rate: float
    """Times the rate that would use up the budget within the month for which the target is meant."""
    severity: str


BURNS: Final = (
    Burn("Fast", "1h", "5m", 14.4, "page"),
    Burn("Steady", "6h", "30m", 6.0, "page"),
    Burn("Slow", "1d", "2h", 3.0, "ticket"),
    Burn("Creeping", "3d", "6h", 1.0, "ticket"),
)


class Alert(NamedTuple):
    """A rule."""

    name: str
    expr: str
    severity: str
    summary: str
    description: str
    pending_for: str = "1m"

    def yaml(self) -> str:
        """As Prometheus reads it."""
        lines = "\n".join(f"          {line}" for line in self.expr.splitlines())
        return (
            f"      - alert: {self.name}\n        expr: |-\n{lines}\n        for: {self.pending_for}\n"
            f"        labels:\n          severity: {self.severity}\n"
            f'        annotations:\n          summary: "{self.summary}"\n          description: "{self.description}"\n'
        )


def alerts(target: float = TARGET) -> list[Alert]:
    """Every rule, for a ``target`` in (0, 1). Raises ValueError for another."""
    if not 0.0 < target < 1.0:
        raise ValueError(f"a target is a share between 0 and 1 such as {TARGET}, not {target:g}")
    return [
        *_burns("FlowPrefillTTFT", "first tokens", queries.ttft_missed, table.TTFT_MET, table.TTFT_MISSED, target,
                f"{CLASS.name}, {SERVICE}", "Misses by cause", f" of class {{{{ $labels.{CLASS.name} }}}}"),
        *_burns("FlowPrefillTBT", "later tokens", queries.tbt_missed, table.TBT_MET, table.TBT_MISSED, target,
                SERVICE, "Lateness of decode steps"),
        Alert(
            "FlowPrefillSlowerThanProfiled",
            f'{table.TTFT_MODEL.series}{{{MODEL_VALUE.name}="correction"}} > {CORRECTED:g}\n'
            f"and on (job, instance) increase({table.PREDICTION_ERROR.full_name}_count[{OBSERVED}]) > 0",
            "ticket",
            "{{ $labels.instance }} prefills {{ $value | humanize }} times slower than in its profile",
            "Its profile is of another machine, or the machine is busy with something else.",
            "30m",
        ),
    ]  # fmt: skip


def limit(burn: Burn, target: float) -> float:
    """The share of misses above which ``burn`` alerts."""
    return min(burn.rate * (1 - target), MOST_MISSED)


def _burns(
    name: str,
    what: str,
    share_missed: Callable[..., str],
    met: Metric,
    missed: Metric,
    target: float,
    by: str,
    panel: str,
    of: str = "",
) -> Iterator[Alert]:
    for burn in BURNS:
        most = limit(burn, target)
        judged = " + ".join(queries.total(metric, burn.long, by, function="increase") for metric in (met, missed))
        yield Alert(
            f"{name}{burn.name}Burn",
            f"{share_missed(burn.long, by)} > {most:.4g}\n"
            f"and {share_missed(burn.short, by)} > {most:.4g}\n"
            f"and {judged} > {LEAST_JUDGED}",
            burn.severity,
            f"{{{{ $value | humanizePercentage }}}} of {what}{of} of {{{{ $labels.model_name }}}} were late in the "
            f"last {burn.long}",
            f"More than {100 * most:.3g} percent in {burn.long} and in the last {burn.short}; "
            f"{100 * target:.3g} percent shall be in time. Look at panel '{panel}'.",
        )


def rules(target: float = TARGET) -> str:
    """The file of rules."""
    return (
        f"# Made by python -m sgl_flowprefill.metrics.alerts --target {target:g}\n"
        "groups:\n  - name: flowprefill\n    rules:\n" + "".join(alert.yaml() for alert in alerts(target))
    )


def main() -> None:
    """Print the rules for the target that is asked for."""
    parser = argparse.ArgumentParser(
        prog="python -m sgl_flowprefill.metrics.alerts", description="Alert rules for Prometheus."
    )
    parser.add_argument("--target", type=float, default=TARGET, help="share of requests, and of tokens, to be in time")
    options = parser.parse_args()
    try:
        print(rules(options.target), end="")
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
