"""Where a comparison goes: the terminal, ``report.json``, ``report.html``."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sgl_flowprefill.bench.metrics.comparison import Comparison
from sgl_flowprefill.bench.reports.comparison import write_html
from sgl_flowprefill.bench.reports.table import comparison_table, title


def publish(comparison: Comparison, folder: Path, console: Console) -> int:
    """Write the reports into ``folder``, print table, problems and doubts. Returns 0, or 1 if there are problems."""
    comparison.write_json(folder / "report.json")
    write_html(comparison, folder / "report.html")
    console.print()
    console.print(title(comparison), highlight=False, soft_wrap=True)
    console.print(comparison_table(comparison))
    problems = comparison.problems()
    for problem in [*problems, *comparison.doubts()]:
        console.print(problem, style="yellow", markup=False, highlight=False)
    console.print(f"Report: {folder / 'report.html'} and {folder / 'report.json'}", highlight=False, soft_wrap=True)
    return int(bool(problems))
