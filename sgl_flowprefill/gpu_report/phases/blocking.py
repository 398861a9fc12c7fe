"""How long an arrival waits until what was queued before it has run, with operators whole and in tiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Budget, Lengths, Outcome, Request, quantiles_ms, verdict
from sgl_flowprefill.runtime.selfcheck import ARRIVALS

TOKENS: Final = (2048, 8192, 32_768, 131_071)
LEAST_SAMPLES: Final = 20
MOST_SAMPLES: Final = 200
COLUMNS: Final = ("prompt", "operators", "prefill", "arrivals", "p50", "p99", "longest", "known to the hub after (p50)")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    rows: list[dict[str, Any]] = []
    lengths = Lengths(TOKENS, engine.limit_tokens)
    if not lengths.tokens:
        yield lengths.none_fits()
    forward_s = 0.0
    for index, tokens in enumerate(lengths.tokens):
        # Two ways of so many prefills as it takes for the least samples, each longer by at least the ratio of lengths.
        expected_s = forward_s * tokens / lengths.tokens[max(0, index - 1)]
        if rows and 2 * (2 + LEAST_SAMPLES / ARRIVALS) * expected_s > request.budget.left_s:
            lengths.leave_out_from(index)
            yield _outcome(rows, lengths, engine)
            return
        part = request.budget.part(1 / (len(lengths.tokens) - index))
        for tiled in (False, True):
            row = _row(engine, tokens, tiled, part.part(1.0 if tiled else 0.5))
            forward_s = row["forward_s"]
            rows.append(row)
            yield _outcome(rows, lengths, engine)


def _row(engine: Engine, tokens: int, tiled: bool, budget: Budget) -> dict[str, Any]:
    prompt = engine.prompt(tokens)
    with engine.in_tiles(engine.tiles) if tiled else engine.whole():
        found = engine.blocking(
            prompt, lambda samples: samples >= (LEAST_SAMPLES if not budget.left_s else MOST_SAMPLES)
        )
    return {
        "tokens": len(prompt),
        "tiles": tiled,
        "forward_s": found.forward_s,
        "samples": len(found.blocked_s),
        **quantiles_ms(found.blocked_s),
        "noticed_p50_ms": quantiles_ms(found.noticed_s)["p50_ms"],
    }


def _outcome(rows: list[dict[str, Any]], lengths: Lengths, engine: Engine) -> Outcome:
    limit_ms = 1e3 * engine.blocking_limit_s
    table = [
        (
            f"{row['tokens']:,}",
            "in tiles" if row["tiles"] else "whole",
            f"{row['forward_s']:.3f} s",
            str(row["samples"]),
            *(f"{row[name]:.1f} ms" for name in ("p50_ms", "p99_ms", "max_ms", "noticed_p50_ms")),
        )
        for row in rows
    ]
    tiled = [row for row in rows if row["tiles"]]
    worst = max(tiled or rows, key=lambda row: float(row["p99_ms"]))
    line = (
        f"in tiles, p99 {worst['p99_ms']:.1f} ms at {worst['tokens']:,} tokens, the worst of {len(tiled)} lengths "
        f"(limit {limit_ms:.0f} ms){lengths.why()}"
    )
    figures = {"rows": list(rows), "limit_ms": limit_ms, "left_out_tokens": lengths.left_out_tokens}
    return Outcome(verdict(all(row["p99_ms"] <= limit_ms for row in tiled)), line, COLUMNS, table, figures)
