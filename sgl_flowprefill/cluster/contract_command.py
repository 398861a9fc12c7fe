"""``launch.py doctor --contract``: the table of what FlowPrefill expects of SGLang, against an SGLang."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from sgl_flowprefill import contract
from sgl_flowprefill.cluster.base import StartError

WIDTH: Final = 160


def check(sources: Path | None) -> bool:
    """Print the table against the installed SGLang, or the one in the folder ``sources`` without importing it. Whether
    all is as expected. Raises StartError for a folder without SGLang.
    """
    tree = contract.Tree(sources)
    if sources is not None and not (sources / "sglang" / "__init__.py").is_file():
        raise StartError(f"--sources {sources}: there is no sglang/__init__.py in it; unpack a wheel of SGLang there")
    version = contract.installed() if sources is None else _version_in(sources)
    table = Table(title=f"SGLang {version}: what FlowPrefill expects of it", title_justify="left")
    for column in ("", "symbol", "FlowPrefill", "what it is for; what is wrong"):
        table.add_column(column, overflow="fold")
    states: Counter[str] = Counter()
    title = ""
    for part, verdict in contract.verdicts(tree):
        if part.title != title:
            title = part.title
            table.add_section()
            table.add_row("", f"[bold]{title}[/bold]", "", f"{', '.join(part.processes)}")
        states[verdict.state] += 1
        row = verdict.row
        wrong = verdict.state != "ok"
        reason = f"{verdict.reason}. Without it: {row.breaks}" if wrong else verdict.reason or row.why
        state = f"[red]{verdict.state}[/red]" if wrong else "ok"
        table.add_row(state, row.target.rstrip(":").replace(":", "."), row.use, reason.replace("[", "\\["))
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(table)
    counts = ", ".join(f"{states[state]} {state}" for state in ("ok", "differs", "gone"))
    console.print(f"SGLang {version}: {sum(states.values())} symbols, {counts}. {_range(version)}")
    return set(states) == {"ok"}


def _range(version: str) -> str:
    inside = "" if contract.is_supported(version) else " not"
    return f"This release supports sglang{contract.supported()}, and {version} is{inside} one of these."


def _version_in(folder: Path) -> str:
    """Version of an unpacked wheel."""
    found = sorted(folder.glob("sglang-*.dist-info"))
    return found[0].name.removeprefix("sglang-").removesuffix(".dist-info") if found else f"in {folder}"
