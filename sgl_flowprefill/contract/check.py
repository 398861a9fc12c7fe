"""The table against the installed SGLang when a server starts, and against any other for the doctor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache

from sgl_flowprefill.contract.row import Part, Verdict, check
from sgl_flowprefill.contract.sources import Tree
from sgl_flowprefill.contract.table import PARTS
from sgl_flowprefill.contract.versions import installed, supported


class SeamError(RuntimeError):
    """SGLang is not shaped as this project needs it; the message names the symbol, the version found and the remedy."""


def expect(*names: str) -> None:
    """Check the parts of the table with these names against the installed SGLang, without importing any of it. Raises
    SeamError.
    """
    parts = {part.name: part for part in PARTS}
    wrong = [
        (part, verdict)
        for part, verdict in verdicts(installed_sources(), map(parts.__getitem__, names))
        if verdict.state != "ok"
    ]
    if wrong:
        raise SeamError(_refusal(*wrong[0], more=len(wrong) - 1))


def require(*names: str) -> None:
    """As ``expect``, for a server that cannot start otherwise. Raises SystemExit with one line."""
    try:
        expect(*names)
    except SeamError as error:
        raise SystemExit(f"sgl-flowprefill: {error}") from error


def verdicts(tree: Tree, parts: Iterable[Part] = PARTS) -> Iterator[tuple[Part, Verdict]]:
    """Each row of ``parts`` with what ``tree`` has; a folder with another SGLang has nothing else that is checked."""
    for part in parts:
        for row in part.rows:
            if tree.is_installed or row.target.startswith("sglang."):
                yield part, check(row, tree)


@cache
def installed_sources() -> Tree:
    """The sources that a server's check reads: those of the installed SGLang."""
    return Tree()


def _refusal(part: Part, verdict: Verdict, more: int) -> str:
    row, others = verdict.row, f" (and {more} more)" if more else ""
    return (
        f"{part.name}: {row.target.rstrip(':').replace(':', '.')} of SGLang {installed()} is not what this release of "
        f"sgl-flowprefill needs: {verdict.reason}{others}. It {row.why}; without it: {row.breaks}. Install "
        f"sglang{supported()}, which this release supports, or a newer sgl-flowprefill; `sgl-flowprefill doctor "
        "--contract` shows all that differs."
    )
