"""The table that a comparison prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from rich import box
from rich.table import Table

from sgl_flowprefill.bench.metrics.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.metrics.joint import JointSummary
from sgl_flowprefill.bench.metrics.requests import PreemptionSummary, StepSummary

MISSING: Final = "–"
Row = tuple[str, list[str]]


def comparison_table(comparison: Comparison) -> Table:
    """One column a system, one row a figure, classes by tightness of their SLO."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for system in comparison.systems:
        table.add_column(system.label, justify="right")
    previous_group = ""
    for group, name, cells in table_rows(comparison):
        if group != previous_group:
            table.add_section()
        previous_group = group
        table.add_row(name, *cells)
    return table


def title(comparison: Comparison) -> str:
    """What was run, in a line."""
    return (
        f"{comparison.trace.name}, seed {comparison.seed}: {comparison.trace.rate_rps:.2f} req/s "
        f"({comparison.trace_rate_rps:.2f} req/s of the trace, times x{comparison.time_scale:.2f}), "
        f"{comparison.model}; {comparison.answers.text(comparison.trace)}"
    )


def table_rows(comparison: Comparison) -> Iterator[tuple[str, str, list[str]]]:
    """The table's rows as (group, name, a cell for each system)."""
    systems = comparison.systems
    slo_s = {request.request_class: request.ttft_slo_s for request in comparison.trace.requests}

    def row(group: str, name: str, cell: Callable[[SystemResult], str]) -> tuple[str, str, list[str]]:
        return group, name, [cell(system) for system in systems]

    yield row("requests", "requests", lambda system: str(system.summary.requests))
    yield row("requests", "completed", lambda system: str(system.summary.completed))
    yield row("attainment", "TTFT SLO attainment", lambda system: percent(system.summary.ttft_attainment))
    for name in comparison.trace.classes:
        count = systems[0].summary.classes[name].requests if systems else 0
        yield row(
            "attainment",
            f"  {name} ({count}), SLO {slo_s[name]:.2g} s",
            lambda system, name=name: percent(system.summary.classes[name].ttft_attainment),  # type: ignore[misc]
        )
    yield row("goodput", "goodput", lambda system: f"{system.summary.goodput_rps:.2f} req/s")
    yield row("ttft", "TTFT p50 / p99", lambda system: _pair(system.summary.ttft_p50_s, system.summary.ttft_p99_s))
    for name in comparison.trace.classes:
        yield row(
            "ttft",
            f"  {name}",
            lambda system, name=name: _pair(  # type: ignore[misc]
                system.summary.classes[name].ttft_p50_s, system.summary.classes[name].ttft_p99_s
            ),
        )
    if any(system.joint.tbt_p50_s is not None for system in systems):
        yield row("tbt", "TTFT met, and 99% of the gaps", lambda system: percent(system.joint.joint_attainment))
        yield row("tbt", "  and the mean gap", lambda system: percent(system.joint.joint_attainment_mean_tpot))
        yield row("tbt", "gaps in time", lambda system: percent(system.joint.tbt_attainment))
        yield row("tbt", "TBT p50 / p99 / longest", lambda system: _tbt(system.joint))
        yield row("tbt", "tokens of answers", lambda system: f"{system.tokens_per_s:.0f} per second")
        yield row("tbt", "streams retracted", lambda system: counted(system.retractions))
    if any(system.steps for system in systems):
        yield row("tbt", "decode steps, their share of the time", lambda system: _steps(system.steps))
        yield row("tbt", "prefills given back for streams", lambda system: _give_backs(system.steps))
    yield row(
        "preemption", "preemptions", lambda system: preemptions(system.preemption) if system.preemption else MISSING
    )
    yield row(
        "preemption",
        "blocking time p50/p99/max",
        lambda system: (
            " / ".join(
                milliseconds(value_s)
                for value_s in (
                    system.preemption.blocking_p50_s,
                    system.preemption.blocking_p99_s,
                    system.preemption.blocking_max_s,
                )
            )
            if system.preemption
            else MISSING
        ),
    )
    yield row(
        "preemption",
        "  until the task stopped",
        lambda system: (
            " / ".join(map(milliseconds, system.stop_wait_p50_p99_max_s)) if system.stop_wait_p50_p99_max_s else MISSING
        ),
    )


def preemptions(summary: PreemptionSummary) -> str:
    """How many there were, and the switches that count as none."""
    others = summary.switches_without_news
    return str(summary.preemptions) + (f" (and {others} switches without news)" if others else "")


def percent(share: float) -> str:
    """A share as a percentage."""
    return f"{share:.1%}"


def counted(value: int | None) -> str:
    """A count, where it is known."""
    return MISSING if value is None else str(value)


def seconds(value_s: float | None) -> str:
    """Seconds with three significant digits."""
    return MISSING if value_s is None else f"{value_s:.2f} s" if value_s >= 0.1 else milliseconds(value_s)


def milliseconds(value_s: float | None) -> str:
    """Milliseconds with a decimal where it matters."""
    if value_s is None:
        return MISSING
    return f"{value_s * 1e3:.0f} ms" if value_s >= 0.01 else f"{value_s * 1e3:.1f} ms"


def _steps(steps: StepSummary | None) -> str:
    return f"{steps.decode_steps}, {percent(steps.decode_share)}" if steps else MISSING


def _give_backs(steps: StepSummary | None) -> str:
    return counted(steps.give_backs if steps else None)


def _tbt(joint: JointSummary) -> str:
    return " / ".join(map(milliseconds, (joint.tbt_p50_s, joint.tbt_p99_s, joint.tbt_max_s)))


def _pair(first_s: float | None, second_s: float | None) -> str:
    return f"{seconds(first_s)} / {seconds(second_s)}"
