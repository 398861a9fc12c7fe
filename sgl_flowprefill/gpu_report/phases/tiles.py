"""What shorter tiles cost: a long prefill whole, and in tiles of several lengths, in turns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from statistics import median
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request

LENGTHS_MS: Final = (2.0, 5.0, 10.0, 20.0)
TOKENS: Final = {"cuda": 32_768, "cpu": 4096}
LEAST_ROUNDS: Final = 3
MOST_ROUNDS: Final = 20
COLUMNS: Final = ("longest tile", "rows of an MLP tile", "pairs of an attention tile", "interruption points", "cost")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    prompt = engine.prompt(TOKENS["cuda" if engine.is_gpu else "cpu"])
    planned = {length_ms: engine.planned_tiles(length_ms * 1e-3) for length_ms in LENGTHS_MS}
    times_s: dict[float | None, list[float]] = {None: [], **{length_ms: [] for length_ms in LENGTHS_MS}}
    points: dict[float, int] = {}
    for length_ms, tiles in planned.items():
        with engine.in_tiles(tiles):
            points[length_ms] = engine.points(prompt)
    ways = list(times_s)
    for round_ in range(MOST_ROUNDS):
        turned = round_ % len(ways)
        for way in ways[turned:] + ways[:turned]:
            with engine.whole() if way is None else engine.in_tiles(planned[way]):
                times_s[way].append(engine.forward_s(prompt))
        if round_ + 1 >= LEAST_ROUNDS and not request.budget.left_s:
            break
    rows: list[dict[str, Any]] = []
    for length_ms, tiles in planned.items():
        ratios = [own_s / whole_s for own_s, whole_s in zip(times_s[length_ms], times_s[None], strict=True)]
        sizes = {name: None if math.isinf(value) else value for name, value in asdict(tiles).items()}
        rows.append({"length_ms": length_ms, "cost": median(ratios) - 1, "points": points[length_ms], "tiles": sizes})
    table = [
        (
            f"{row['length_ms']:g} ms",
            f"{row['tiles']['rows']:,}",
            "whole" if row["tiles"]["pairs"] is None else f"{row['tiles']['pairs'] / 1e6:.1f} million",
            f"{row['points']:,}",
            f"{row['cost']:+.2%}",
        )
        for row in rows
    ]
    line = f"a prefill of {len(prompt):,} tokens takes {median(times_s[None]):.3f} s whole; in tiles " + ", ".join(
        f"{row['cost']:+.1%} at {row['length_ms']:g} ms" for row in rows
    )
    figures = {"tokens": len(prompt), "whole_s": median(times_s[None]), "rounds": len(times_s[None]), "rows": rows}
    yield Outcome("measured", line, COLUMNS, table, figures)
