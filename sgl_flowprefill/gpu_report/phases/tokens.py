"""Prompts suspended inside one another, whole and in tiles: the tokens and logits that each has alone.

How far logits may differ is measured, not assumed: by as much as they do when SGLang computes a prompt in a batch with
others, which rounds as any other order of sums does. What is wrong differs by as much as the logits themselves.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Engine, First
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request, verdict
from sgl_flowprefill.runtime.tiles import Tiles

PROMPTS: Final = 8
TOKENS: Final = {"cuda": (100, 8000), "cpu": (50, 1500)}
SUSPEND_PROBABILITY: Final = 0.5
TILES: Final = 8
"""Tiles of a layer's attention over the longest prompt, about."""
TILE_ROWS: Final = 256
ROUNDING: Final = 3.0
"""Times the differences within a batch, at most."""
LEAST_ROUNDING: Final = 1e-5
COLUMNS: Final = ("", "prompts", "the same token", "suspensions", "live at most", "largest difference of a logit")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    shortest, longest = TOKENS["cuda" if engine.is_gpu else "cpu"]
    rng = random.Random(1)
    prompts = [engine.prompt(rng.randrange(shortest, longest)) for _ in range(PROMPTS)]
    with engine.whole():
        alone = [engine.alone(prompt) for prompt in prompts]
        in_batches = [engine.together([prompt, engine.prompt(shortest)])[0] for prompt in prompts]
    rounding = max(LEAST_ROUNDING, *(one.difference(other) for one, other in zip(alone, in_batches, strict=True)))
    rows: list[dict[str, Any]] = []
    compared = 0
    small = Tiles(TILE_ROWS, TILE_ROWS, TILE_ROWS, longest**2 / 2 / TILES)
    while not rows or request.budget.left_s:
        for name, setting in (("whole", engine.whole), ("in tiles", lambda: engine.in_tiles(small))):
            with setting():
                found, suspensions, depth = engine.nested(prompts, rng, SUSPEND_PROBABILITY)
            rows.append(_compared(name, alone, found, rounding) | {"suspensions": suspensions, "depth": depth})
            compared += len(found)
        yield _outcome(rows, alone, rounding, compared)


def _compared(name: str, alone: Sequence[First], found: Sequence[First], rounding: float) -> dict[str, Any]:
    pairs = list(zip(alone, found, strict=True))
    return {
        "how": name,
        "prompts": len(pairs),
        "same": sum(one.token == other.token for one, other in pairs),
        "ties": sum(
            one.token != other.token and one.margin <= 2 * ROUNDING * rounding * float(one.logits.std())
            for one, other in pairs
        ),
        "difference": max(one.difference(other) for one, other in pairs),
    }


def _outcome(rows: Sequence[dict[str, Any]], alone: Sequence[First], rounding: float, compared: int) -> Outcome:
    by_how = {how: [row for row in rows if row["how"] == how] for how in dict.fromkeys(str(row["how"]) for row in rows)}
    table = []
    passed = len({one.token for one in alone}) > 1
    for how, own in by_how.items():
        same, ties, prompts = (sum(row[name] for row in own) for name in ("same", "ties", "prompts"))
        suspensions, difference = sum(row["suspensions"] for row in own), max(row["difference"] for row in own)
        passed &= same + ties == prompts and suspensions > prompts and difference <= ROUNDING * rounding
        tied = f" ({ties} of the others nearer than rounding)" if same < prompts else ""
        depth = max(row["depth"] for row in own)
        table.append((how, str(prompts), f"{same}{tied}", f"{suspensions:,}", str(depth), f"{difference:.1e}"))
    table.append(("never, but in a batch", str(len(alone)), "", "", "", f"{rounding:.1e}"))
    same = sum(row["same"] for row in rows)
    suspended = sum(row["suspensions"] for row in rows)
    line = (
        f"{same} of {compared} tokens the same under {suspended:,} suspensions inside one another, whole and in tiles"
    )
    figures = {"rows": list(rows), "rounding": rounding, "compared": compared, "same": same}
    return Outcome(verdict(passed), line, COLUMNS, table, figures)
