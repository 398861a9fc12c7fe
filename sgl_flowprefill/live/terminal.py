"""What those who watch are told, in a terminal."""

from __future__ import annotations

from typing import Final, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sgl_flowprefill.live.state import ClassAttainment, Document, Miss, Server, State

BAR: Final = 16
"""Width of a bar."""
RID: Final = 12
"""Characters of a request's id that are always shown."""
BINS: Final = "▁▂▃▄▅▆▇█"
REASONS: Final = {
    "starved": "its turn",
    "kept": "in time",
    "left out": "left out",
    "feasible": "in time alone",
    "infeasible": "too late",
    "in line": "in line",
}


def screen(document: Document, rows: int = 15) -> RenderableType:
    """All servers of a document; at most ``rows`` of the requests that wait and of the misses of each."""
    parts: list[RenderableType] = []
    for server in document.servers:
        parts += _server(server, rows)
    return Group(*parts)


def _server(server: Server, rows: int) -> list[RenderableType]:
    state = server.state
    if state is None:
        return [Text(f"{server.name}: {server.error or 'nothing heard yet'}", style="yellow")]
    head = Text.assemble((server.name, "bold"), f"  {_figures(state)}")
    if server.error:
        head.append(f"  {server.error}", style="red")
    parts: list[RenderableType] = [head, _tasks(state), _waiting(state, rows)]
    if server.attainment:
        parts.append(_attainment(server.attainment))
    if server.misses:
        parts.append(_misses(server.misses[:rows]))
    return parts


def _figures(state: State) -> str:
    suspended = sum(not task.runs for task in state.tasks)
    others = f"{state.streams} streams" if state.decodes else f"{state.not_ready} not ready"
    flags = [" · paused"] * state.is_paused + [" · KV cache is short"] * state.kv_is_short
    return (
        f"{state.policy} · {state.waiting_requests} wait · {suspended} suspended · {others} · "
        f"prefills take ×{state.correction:.2f} of the profile's time{''.join(flags)}"
    )


def _tasks(state: State) -> Table:
    table = _table("runs", "class", "tokens", "done", "left", "slack")
    for task in state.tasks:
        others = f" +{task.requests - 1}" if task.requests > 1 else ""
        done = round(BAR * min(1.0, max(0.0, task.done)))
        bar = Text("█" * done + "░" * (BAR - done), style="blue" if task.runs else "dim")
        name = Text(printable(task.rids[0]) + others if task.rids else "", style="" if task.runs else "dim")
        table.add_row(name, task.slo_class, str(task.new_tokens), bar, seconds(task.left_s), _slack(task.slack_s))
    if not state.tasks:
        table.add_row(Text("a decode step" if state.step_runs else "nothing", style="dim"))
    return table


def _waiting(state: State, rows: int) -> Table:
    table = _table("waits, in this order", "class", "tokens", "needs", "waits", "slack", "why")
    for one in state.waiting[:rows]:
        table.add_row(
            Text(printable(one.rid)),
            one.slo_class,
            str(one.new_tokens),
            seconds(one.needs_s),
            seconds(one.waits_s),
            _slack(one.slack_s),
            REASONS.get(one.standing, one.standing),
        )
    more = state.waiting_requests - min(rows, len(state.waiting))
    if more:
        table.add_row(Text(f"and {more} more", style="dim"))
    return table


def _attainment(classes: list[ClassAttainment]) -> Table:
    table = _table("met their TTFT objective", "attainment", "requests", "p50", "p99", "last minutes")
    for one in classes:
        share = one.met / (one.met + one.missed)
        bins = "".join(" " if bin_ is None else BINS[round(bin_ * (len(BINS) - 1))] for bin_ in one.bins)
        table.add_row(
            one.slo_class,
            Text(f"{share:.1%}", style="red" if share < 0.9 else "green"),
            str(one.met + one.missed),
            seconds(one.ttft_p50_s),
            seconds(one.ttft_p99_s),
            bins,
        )
    return table


def _misses(misses: list[Miss]) -> Table:
    table = _table("last misses", "class", "cause", "TTFT", "asked", "waited", "ago")
    for miss in misses:
        table.add_row(
            Text(printable(miss.rid)),
            miss.slo_class,
            Text(miss.cause, style="red"),
            seconds(miss.ttft_s),
            seconds(miss.ttft_slo_s),
            seconds(miss.waited_s),
            seconds(-miss.ended_s),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, expand=True, pad_edge=False, header_style="dim")
    table.add_column(first, no_wrap=True, ratio=1, min_width=RID)
    for name in others:
        justify: Literal["left", "right"] = "left" if name in ("class", "why", "cause", "done") else "right"
        table.add_column(name, no_wrap=name != "cause", justify=justify)
    return table


def _slack(slack_s: float) -> Text:
    return Text(f"{seconds(-slack_s)} late", style="red") if slack_s < 0 else Text(seconds(slack_s))


def printable(rid: str) -> str:
    """A request's id, which its client chooses, without what a terminal would take for a command."""
    return "".join(character if character.isprintable() else "\ufffd" for character in rid)


def seconds(time_s: float | None) -> str:
    """A time with a fitting unit; a dash for none."""
    if time_s is None:
        return "–"
    if abs(time_s) < 0.0995:
        return f"{1e3 * time_s:.0f} ms"
    return f"{time_s:.2f} s" if abs(time_s) < 0.995 else f"{time_s:.1f} s" if abs(time_s) < 99.5 else f"{time_s:.0f} s"
