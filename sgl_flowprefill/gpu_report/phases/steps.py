"""Decode steps between the operators of a suspended prefill, on a server that prefills and decodes.

First alone, also with each queued before the tokens of the one before are there, if they are served so. Then at
random operators: streams have to get the tokens that they get when nothing runs beside them, and the prefill the logits
that it has alone. Then when they are due: how much later a step ends for the prefill that it interrupts, and which gaps
between two tokens of a stream come of that: at most the objective and one step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import median
from typing import Any, Final

from sgl_flowprefill.gpu_report.engine import Decoded, Engine, Step
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request, quantiles_ms, verdict
from sgl_flowprefill.gpu_report.phases.tokens import LEAST_ROUNDING, ROUNDING

STREAMS: Final = {"cuda": 16, "cpu": 4}
STREAM_TOKENS: Final = {"cuda": 512, "cpu": 128}
"""Tokens of the prompt of a stream."""
CHECKED_TOKENS: Final = 64
"""Tokens of each stream's answer while steps come at random."""
CHECKED_BESIDE: Final = {"cuda": 8192, "cpu": 2048}
STEP_PROBABILITY: Final = 0.1
"""At an interruption point."""
BESIDE: Final = {"cuda": 32_768, "cpu": 4096}
"""Tokens of the prompts that are prefilled while steps are due."""
OBJECTIVES_S: Final = {"cuda": (0.1, 0.05, 0.02), "cpu": (0.2, 0.1)}
"""For the time between two tokens."""
LEAST_TOKENS: Final = 20
MOST_TOKENS: Final = 300
COLUMNS: Final = (
    "steps", "", "a step takes", "ends later by p50", "p99", "longest", "gaps p99", "at most", "in time", "prefills",
)  # fmt: skip


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    device = "cuda" if engine.is_gpu else "cpu"
    each_tokens = STREAM_TOKENS[device] + MOST_TOKENS
    streams = max(1, min(STREAMS[device], engine.limit_tokens // each_tokens))
    prompts = [engine.prompt(STREAM_TOKENS[device]) for _ in range(streams)]
    alone = engine.decode(prompts, CHECKED_TOKENS)
    figures = _checked(engine, prompts, alone, CHECKED_BESIDE[device]) | {
        "streams": streams,
        "decode_graphs": engine.has_decode_graphs,
        "step_costs": engine.step_costs(),
    }
    step_s = median(step.time_s for step in alone.steps)
    rows = [_row("one after the other, nothing beside them", alone.steps, step_s)]
    if engine.has_steps_ahead:
        ahead = engine.decode(prompts, CHECKED_TOKENS, ahead=True)
        rows.append(_row("the same, each queued ahead", ahead.steps, step_s))
        figures["same_ahead"] = sum(one == other for one, other in _pairs(alone, ahead))
        figures["passed"] = figures["passed"] and figures["same_ahead"] == figures["compared"]
    own_spread_ms = rows[0]["step"]["p99_ms"] - rows[0]["step"]["p50_ms"]
    figures["limit_ms"] = 1e3 * engine.blocking_limit_s + own_spread_ms
    yield _outcome(rows, figures)
    beside = engine.prompt(BESIDE[device])
    objectives_s = OBJECTIVES_S[device]
    for index, objective_s in enumerate(objectives_s):
        seconds = request.budget.part(1 / (len(objectives_s) - index)).left_s
        tokens = min(MOST_TOKENS, max(LEAST_TOKENS, int(seconds / objective_s)))
        found = engine.decode(prompts, tokens, beside, engine.step_is_due, objective_s)
        title = f"due every {objective_s * 1e3:.0f} ms, inside prefills of {len(beside):,} tokens"
        row = _row(title, found.steps, step_s, objective_s) | {"prefills": len(found.firsts)}
        gap_limit_ms = row["objective_ms"] + rows[0]["step"]["p99_ms"]
        rows.append(row | {"gap_limit_ms": gap_limit_ms, "gaps_kept": row["gaps"]["p99_ms"] <= gap_limit_ms})
        yield _outcome(rows, figures)


def _checked(engine: Engine, prompts: Sequence[Sequence[int]], alone: Decoded, tokens: int) -> dict[str, Any]:
    """Whether streams and prefill find the same, with steps at random operators of the prefill."""
    rng = random.Random(1)
    beside = engine.prompt(tokens)
    with engine.whole():
        first = engine.alone(beside)
        rounding = max(LEAST_ROUNDING, first.difference(engine.together([beside, engine.prompt(tokens // 8)])[0]))
    found = engine.decode(prompts, CHECKED_TOKENS, beside, lambda: rng.random() < STEP_PROBABILITY)
    pairs = _pairs(alone, found)
    difference = max(first.difference(one) for one in found.firsts)
    same = sum(one == other for one, other in pairs)
    return {
        "compared": len(pairs),
        "same": same,
        "steps_at_random": len(found.steps),
        "prefills_at_random": len(found.firsts),
        "difference": difference,
        "rounding": rounding,
        "passed": same == len(pairs)
        and len({token for answer in alone.answers for token in answer}) > 1
        and difference <= ROUNDING * rounding,
    }


def _pairs(one: Decoded, other: Decoded) -> list[tuple[int, int]]:
    """The tokens of their streams, side by side."""
    return [pair for answers in zip(one.answers, other.answers, strict=True) for pair in zip(*answers, strict=True)]


def _row(how: str, steps: Sequence[Step], step_s: float, objective_s: float | None = None) -> dict[str, Any]:
    """Figures of ``steps``, of which one takes ``step_s`` when nothing runs beside it. With an objective they were due
    at some time each, but for the first one: its streams have waited for each other.
    """
    row: dict[str, Any] = {"how": how, "steps": len(steps), "step": quantiles_ms([step.time_s for step in steps])}
    if objective_s is not None:
        gaps_s = [later.end_s - step.end_s for step, later in pairwise(steps)]
        row |= {
            "objective_ms": 1e3 * objective_s,
            "late": quantiles_ms([step.end_s - step.due_s - step_s for step in steps[1:]]),
            "gaps": quantiles_ms(gaps_s),
            "in_time": sum(gap_s <= objective_s for gap_s in gaps_s) / len(gaps_s),
        }
    return row


def _outcome(rows: Sequence[dict[str, Any]], figures: dict[str, Any]) -> Outcome:
    timed = [row for row in rows if "late" in row]
    graphs = "CUDA graphs" if figures["decode_graphs"] else "no CUDA graphs"
    line = (
        f"{figures['same']} of {figures['compared']} tokens of {figures['streams']} streams the same with "
        f"{figures['steps_at_random']} steps inside {figures['prefills_at_random']} prefills; a step "
        f"{rows[0]['step']['p50_ms']:.1f} ms ({graphs})"
    )
    if "same_ahead" in figures:
        line += f", {rows[1]['step']['p50_ms']:.1f} ms queued ahead ({figures['same_ahead']} tokens the same)"
    if timed:
        worst = max(timed, key=lambda row: float(row["late"]["p99_ms"]))
        line += (
            f"; due every {worst['objective_ms']:.0f} ms it ends {worst['late']['p99_ms']:.1f} ms later in p99, the "
            f"worst of {len(timed)} objectives (limit {figures['limit_ms']:.0f} ms)"
        )
        worst = max(timed, key=lambda row: float(row["gaps"]["p99_ms"] - row["gap_limit_ms"]))
        line += (
            f"; gaps with {worst['objective_ms']:.0f} ms as objective are {worst['gaps']['p99_ms']:.1f} ms in p99, the "
            f"nearest to its limit ({worst['gap_limit_ms']:.1f} ms, the objective and one step)"
        )
    passed = figures["passed"] and all(
        row["late"]["p99_ms"] <= figures["limit_ms"] and row["gaps_kept"] for row in timed
    )
    return Outcome(verdict(passed), line, COLUMNS, [_cells(row) for row in rows], figures | {"rows": list(rows)})


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    def ms(name: str, quantile: str) -> str:
        return f"{row[name][quantile]:.1f} ms" if name in row else ""

    return (
        row["how"],
        str(row["steps"]),
        ms("step", "p50_ms"),
        *(ms("late", quantile) for quantile in ("p50_ms", "p99_ms", "max_ms")),
        ms("gaps", "p99_ms"),
        f"{row['gap_limit_ms']:.1f} ms" if "gap_limit_ms" in row else "",
        f"{row['in_time']:.1%}" if "in_time" in row else "",
        str(row.get("prefills", "")),
    )
