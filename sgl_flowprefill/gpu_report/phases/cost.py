"""What preemption checkpoints and tiles cost a prefill for which nobody waits, in turns with one that has none."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median, quantiles
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Lengths, Outcome, Request, verdict

TOKENS: Final = (512, 2048, 8192)
LEAST_ROUNDS: Final = 3
MOST_ROUNDS: Final = 40
MAX_COST: Final = 0.02
"""At lengths from LIMITED_TOKENS on; below it a prefill is so short that the host sets its time."""
LIMITED_TOKENS: Final = 2048
COLUMNS: Final = ("prompt", "without", "with preemption checkpoints", "quartiles", "and tiles", "quartiles", "rounds")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    rows: list[dict[str, Any]] = []
    lengths = Lengths(TOKENS, engine.limit_tokens)
    if not lengths.tokens:
        yield lengths.none_fits()
    for index, tokens in enumerate(lengths.tokens):
        # A prefill is longer by at least the ratio of lengths; all three ways, and once more to warm up.
        expected_s = rows[-1]["without_s"] * tokens / rows[-1]["tokens"] if rows else 0.0
        if tokens > LIMITED_TOKENS and 3 * (LEAST_ROUNDS + 1) * expected_s > request.budget.left_s:
            lengths.leave_out_from(index)
            yield _outcome(rows, engine, lengths)
            return
        rows.append(_row(engine, tokens, request.budget.part(1 / (len(lengths.tokens) - index)).left_s))
        yield _outcome(rows, engine, lengths)


def _row(engine: Engine, tokens: int, seconds: float) -> dict[str, Any]:
    prompt = engine.prompt(tokens)
    times_s: dict[str, list[float]] = {"without": [], "checkpoints": [], "tiles": []}
    whole, spent_s = engine.whole, 0.0
    for round_ in range(MOST_ROUNDS + 1):
        names = list(times_s)
        turned = round_ % len(names)
        for name in names[turned:] + names[:turned]:
            if name == "tiles":
                time_s = engine.forward_s(prompt)
            else:
                with whole():
                    time_s = engine.forward_s(prompt, checkpoints=name == "checkpoints")
            if round_:  # the first warms up
                times_s[name].append(time_s)
            spent_s += time_s
        if round_ >= LEAST_ROUNDS and spent_s > seconds:
            break
    ratios = {
        name: [time_s / without_s - 1 for time_s, without_s in zip(times_s[name], times_s["without"], strict=True)]
        for name in ("checkpoints", "tiles")
    }
    return {
        "tokens": len(prompt),
        "without_s": median(times_s["without"]),
        "rounds": len(times_s["without"]),
        "points": engine.points(prompt),
        **{f"{name}_cost": median(values) for name, values in ratios.items()},
        **{f"{name}_quartiles": quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }


def _outcome(rows: list[dict[str, Any]], engine: Engine, lengths: Lengths) -> Outcome:
    limited = [row for row in rows if row["tokens"] >= LIMITED_TOKENS]
    table = [
        (
            f"{row['tokens']:,}",
            f"{row['without_s'] * 1e3:.2f} ms",
            *(
                text
                for name in ("checkpoints", "tiles")
                for text in (
                    f"{row[f'{name}_cost']:+.2%}",
                    " to ".join(f"{value:+.2%}" for value in row[f"{name}_quartiles"]),
                )
            ),
            str(row["rounds"]),
        )
        for row in rows
    ]
    costs = ", ".join(f"{row['checkpoints_cost']:+.2%} at {row['tokens']:,}" for row in rows)
    each_s = engine.checkpoint_s()
    left_out = lengths.left_out_tokens
    figures = {"rows": list(rows), "checkpoint_s": each_s, "max_cost": MAX_COST, "left_out_tokens": left_out}
    line = f"preemption checkpoints cost {costs} tokens ({each_s * 1e6:.1f} us each on the host){lengths.why()}"
    return Outcome(verdict(all(row["checkpoints_cost"] < MAX_COST for row in limited)), line, COLUMNS, table, figures)
