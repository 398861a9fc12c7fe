"""What prefills hold on the device, suspended at each interruption point and while they run, against what is counted
for them when tasks are admitted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from sgl_flowprefill.gpu_report.phases.base import Lengths, Outcome, Request, verdict

if TYPE_CHECKING:
    from sgl_flowprefill.gpu_report.engine import Engine

TOKENS: Final = (512, 4096, 32_768)
UNCOUNTED: Final = 0.05
"""Share by which a prefill may exceed what is counted: indices of its KV cache, plans, and the ends of blocks."""
MIB: Final = 1 << 20
COLUMNS: Final = ("prompt", "operators", "interruption points", "suspended", "counted", "running", "counted")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    lengths = Lengths(TOKENS, engine.limit_tokens)
    if not lengths.tokens:
        yield lengths.none_fits()
    rows: list[dict[str, Any]] = []
    for tokens in lengths.tokens:
        prompt = engine.prompt(tokens)
        for is_tiled in (False, True):
            with engine.in_tiles(engine.tiles) if is_tiled else engine.whole():
                engine.points(prompt)  # what is made once is none of its activations
                rows.append({"tokens": len(prompt), "tiles": is_tiled, **engine.held(prompt)._asdict()})
        yield _outcome(rows, lengths, engine.tries())


def _outcome(rows: list[dict[str, Any]], lengths: Lengths, tries: dict[str, int]) -> Outcome:
    table = [
        (
            f"{row['tokens']:,}",
            "in tiles" if row["tiles"] else "whole",
            f"{row['points']:,}",
            *(
                f"{row[name] / MIB:.0f} MiB"
                for name in ("suspended_bytes", "counted_suspended_bytes", "running_bytes", "counted_running_bytes")
            ),
        )
        for row in rows
    ]
    suspended, running = (
        max(row[f"{how}_bytes"] / row[f"counted_{how}_bytes"] for row in rows) for how in ("suspended", "running")
    )
    line = (
        f"suspended prefills hold at most {suspended:.0%} of what is counted for them, running ones {running:.0%}; the "
        f"allocator had to try again {tries['num_alloc_retries']} times, in vain {tries['num_ooms']} times"
        f"{lengths.why()}"
    )
    figures = {"rows": list(rows), **tries, "left_out_tokens": lengths.left_out_tokens}
    passed = max(suspended, running) <= 1 + UNCOUNTED and not any(tries.values())
    return Outcome(verdict(passed), line, COLUMNS, table, figures)
