"""How far the CPU has to run ahead so that the device never waits for it: prefills with each look-ahead in turns, and
with all launched before the device begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from sgl_flowprefill.gpu_report.phases.base import Budget, Lengths, Outcome, Request, verdict
from sgl_flowprefill.gpu_report.tuning import MAX_IDLE

if TYPE_CHECKING:
    from sgl_flowprefill.gpu_report.engine import Engine

LOOKAHEADS: Final = (0, 1, 2, 4)
TOKENS: Final = (600, 2048, 8192)
LEAST_ROUNDS: Final = 5
MOST_ROUNDS: Final = 30
COLUMNS: Final = ("prompt", "device alone", *(f"look-ahead {ahead}" for ahead in LOOKAHEADS))


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    lengths = Lengths(TOKENS, engine.limit_tokens)
    if not lengths.tokens:
        yield lengths.none_fits()
    rows: list[dict[str, Any]] = []
    waits = engine.waits(engine.prompt(lengths.tokens[0])) if lengths.tokens else []
    for index, tokens in enumerate(lengths.tokens):
        rows.append(_row(engine, tokens, request.budget.part(1 / (len(lengths.tokens) - index))))
        yield _outcome(rows, lengths, engine.default_lookahead, waits)


def _row(engine: Engine, tokens: int, budget: Budget) -> dict[str, Any]:
    prompt = engine.prompt(tokens)
    times_s: dict[int | None, list[float]] = {None: [], **{ahead: [] for ahead in LOOKAHEADS}}
    ways = list(times_s)
    with engine.whole():
        for round_ in range(MOST_ROUNDS + 1):
            turned = round_ % len(ways)
            for ahead in ways[turned:] + ways[:turned]:
                if ahead is None:
                    time_s = engine.device_s(prompt, behind_spin=True)
                else:
                    with engine.lookahead(ahead):
                        time_s = engine.device_s(prompt)
                if round_:  # the first warms up
                    times_s[ahead].append(time_s)
            if round_ >= LEAST_ROUNDS and not budget.left_s:
                break
    alone_s = times_s.pop(None)
    return {
        "tokens": len(prompt),
        "rounds": len(alone_s),
        "device_s": median(alone_s),
        "idle": {
            str(ahead): median(1 - alone / time_s for alone, time_s in zip(alone_s, own_s, strict=True))
            for ahead, own_s in times_s.items()
        },
    }


def _outcome(rows: list[dict[str, Any]], lengths: Lengths, default: int, waits: list[str]) -> Outcome:
    table = [
        (
            f"{row['tokens']:,}",
            f"{row['device_s'] * 1e3:.2f} ms",
            *(f"{idle:.2%} idle" for idle in row["idle"].values()),
        )
        for row in rows
    ]
    idle = [row["idle"][str(default)] for row in rows]
    shares = ", ".join(f"{share:.2%} at {row['tokens']:,}" for share, row in zip(idle, rows, strict=True))
    places = f" ({', '.join(dict.fromkeys(waits))})" if waits else ""
    line = (
        f"look-ahead {default}: of the time of a prefill the device idles {shares} tokens; inside a prefill the host "
        f"waits for the device {len(waits)} times{places}{lengths.why()}"
    )
    figures = {"rows": list(rows), "waits": waits, "max_idle": MAX_IDLE, "left_out_tokens": lengths.left_out_tokens}
    return Outcome(verdict(all(share < MAX_IDLE for share in idle)), line, COLUMNS, table, figures)
