"""How long an arrival waits until what was queued before it has run, with operators whole and in tiles."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Budget, Outcome, Request, quantiles_ms, verdict

TOKENS: Final = (2048, 8192, 32_768, 131_071)
LEAST_SAMPLES: Final = 20
MOST_SAMPLES: Final = 200
ARRIVALS: Final = 8
"""In a prefill, about."""
HOST_S: Final = 1e-3
COLUMNS: Final = ("prompt", "operators", "prefill", "arrivals", "p50", "p99", "longest", "known to the hub after (p50)")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    rows: list[dict[str, Any]] = []
    left_out: list[int] = []
    lengths = [tokens for tokens in TOKENS if tokens <= engine.limit_tokens]
    forward_s = 0.0
    for index, tokens in enumerate(lengths):
        # Two ways of so many prefills as it takes for the least samples, each longer by at least the ratio of lengths.
        expected_s = forward_s * tokens / lengths[max(0, index - 1)]
        if rows and 2 * (2 + LEAST_SAMPLES / ARRIVALS) * expected_s > request.budget.left_s:
            left_out = lengths[index:]
            break
        part = request.budget.part(1 / (len(lengths) - index))
        for tiled in (False, True):
            row = _row(engine, tokens, tiled, part.part(1.0 if tiled else 0.5))
            forward_s = row["forward_s"]
            rows.append(row)
            yield _outcome(rows, left_out, engine)
    if left_out:
        yield _outcome(rows, left_out, engine)


def _row(engine: Engine, tokens: int, tiled: bool, budget: Budget) -> dict[str, Any]:
    prompt = engine.prompt(tokens)
    with engine.in_tiles(engine.tiles) if tiled else engine.whole():
        noticed_s, blocked_s, forward_s = blocking_s(engine, prompt, budget)
    return {
        "tokens": len(prompt),
        "tiles": tiled,
        "forward_s": forward_s,
        "samples": len(blocked_s),
        **quantiles_ms(blocked_s),
        "noticed_p50_ms": quantiles_ms(noticed_s)["p50_ms"],
    }


def blocking_s(engine: Engine, prompt: list[int], budget: Budget) -> tuple[list[float], list[float], float]:
    """Seconds after an arrival until the hub knew of it, and until the device was free; those of the forward pass."""
    arrived = threading.Event()
    arrival_s = 0.0

    def arrive() -> None:
        nonlocal arrival_s
        arrival_s = time.monotonic()
        arrived.set()

    rng = random.Random(2)
    forward_s = min(engine.forward_s(prompt) for _ in range(2))
    noticed_s: list[float] = []
    blocked_s: list[float] = []
    with engine.interrupted_by(arrived.is_set):
        while len(blocked_s) < LEAST_SAMPLES or (len(blocked_s) < MOST_SAMPLES and budget.left_s):
            arrived.clear()
            task = engine.start(prompt)
            while not task.done:
                timer = threading.Timer(rng.uniform(0.0, 2 * forward_s / ARRIVALS), arrive)
                timer.start()
                engine.resume(task)
                timer.cancel()
                timer.join()
                if arrived.is_set() and not task.done:
                    noticed_s.append(time.monotonic() - arrival_s)
                    engine.synchronize()
                    blocked_s.append(time.monotonic() - arrival_s)
                arrived.clear()
            engine.finish(task)
    return noticed_s, blocked_s, forward_s


def _outcome(rows: list[dict[str, Any]], left_out: list[int], engine: Engine) -> Outcome:
    ahead = engine.default_lookahead if engine.on_card else 0
    limit_ms = 1e3 * ((ahead + 1) * engine.max_blocking_s + HOST_S)
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
        f"(limit {limit_ms:.0f} ms)"
    )
    if left_out:
        line += f"; no time for {', '.join(f'{tokens:,}' for tokens in left_out)}"
    figures = {"rows": list(rows), "limit_ms": limit_ms, "left_out_tokens": left_out}
    return Outcome(verdict(all(row["p99_ms"] <= limit_ms for row in tiled)), line, COLUMNS, table, figures)
