"""Times of operators and of whole prefills, as the profile that servers, tiles and the simulator read."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Final

from sgl_flowprefill.bench.simulator.cost import from_profile
from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request
from sgl_flowprefill.profiling import Profile
from sgl_flowprefill.profiling.fitted import fit
from sgl_flowprefill.profiling.run import run_profile
from sgl_flowprefill.ttft import OperatorTimes, PrefillShape
from sgl_flowprefill.ttft.budget import throughput_budget_tokens

FILE: Final = "profile.parquet"
LEAST_S: Final = 10.0
"""Without a round over single prompts there is no profile."""
COLUMNS: Final = ("prompt", "measured", "attention", "MLP", "the rest", "the simulator says")


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    path = request.out / FILE
    profile = run_profile(engine, engine.setting, path, max(LEAST_S, request.budget.left_s))
    yield _outcome(engine, profile, path)


def _outcome(engine: Engine, profile: Profile, path: Path) -> Outcome:
    cost = from_profile(path, engine.layers)
    model = fit(profile).model
    operators = OperatorTimes.fit(profile.operators())
    inside: dict[tuple[PrefillShape, ...], tuple[float, float, float]] = {}
    for shape, *times_s in sorted(profile.operators(), key=itemgetter(1), reverse=True):
        inside[shape] = (times_s[0], times_s[1], times_s[2])  # the fastest look comes last
    rows: list[dict[str, Any]] = []
    for shape in sorted(inside, key=lambda shape: shape[0].new_tokens):
        own_s = [time_s for other, time_s in zip(*profile.timings(), strict=True) if other == shape]
        whole_s, attention_s, mlp_s = inside[shape]
        rows.append(
            {
                "tokens": shape[0].new_tokens,
                "measured_s": median(own_s) if own_s else None,
                "attention_share": attention_s / whole_s,
                "mlp_share": mlp_s / whole_s,
                "simulated_s": cost.predict_s(shape),
            }
        )
    table = [
        (
            f"{row['tokens']:,}",
            "–" if row["measured_s"] is None else f"{row['measured_s'] * 1e3:.2f} ms",
            f"{row['attention_share']:.0%}",
            f"{row['mlp_share']:.0%}",
            f"{1 - row['attention_share'] - row['mlp_share']:.0%}",
            f"{row['simulated_s'] * 1e3:.2f} ms",
        )
        for row in rows
    ]
    off = [abs(row["simulated_s"] / row["measured_s"] - 1) for row in rows if row["measured_s"]]
    figures = {
        "profile": str(path),
        "complete": profile.complete,
        "forwards": len(profile.rows),
        "longest_tokens": profile.longest_tokens,
        "layers": engine.layers,
        "fixed_s": cost.fixed_s,
        "per_token_s": cost.per_token_s,
        "per_pair_s": cost.per_pair_s,
        "attention_s_per_pair": operators.attention_s_per_pair if operators else None,
        "mlp_s_per_token": operators.mlp_s_per_token if operators else None,
        "batch_tokens": throughput_budget_tokens(model),
        "simulator_error": median(off) if off else None,
        "rows": rows,
    }
    error = f", which the simulator meets within {median(off):.1%} in the median" if off else ""
    line = f"{len(profile.rows)} forward passes of up to {profile.longest_tokens:,} tokens in {FILE}{error}"
    return Outcome("measured", line, COLUMNS, table, figures)
