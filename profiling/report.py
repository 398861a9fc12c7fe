"""What a profile says about the model that is fitted to it, on shapes that the model has not seen, and about the
machine that it was measured on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sgl_flowprefill.profiling.file import Profile
from sgl_flowprefill.profiling.fitted import shapes
from sgl_flowprefill.ttft import BoostedTTFT, PrefillShape
from sgl_flowprefill.ttft.boosted import fit_rows
from sgl_flowprefill.ttft.validation import (
    STRATA,
    Errors,
    HeldOut,
    errors,
    extrapolation,
    fit_cubic,
    hold_out,
)

EXTRAPOLATION_FACTORS: Final = (2, 4)
COST_REPEATS: Final = 50


class Report:
    """Held-out errors of the model and of the cubic baseline, and what a prediction costs."""

    def __init__(self, profile: Profile) -> None:
        """Raises ValueError when the profile has too few shapes."""
        self.profile = profile
        batches, times_s = profile.timings()
        self.model_held_out = hold_out(batches, times_s, BoostedTTFT.fit)
        self.cubic_held_out = hold_out(batches, times_s, fit_cubic)
        self.beyond = {f: extrapolation(batches, times_s, BoostedTTFT.fit, f) for f in EXTRAPOLATION_FACTORS}
        self.fitted = fit_rows(*shapes(batches, times_s))
        self.model, self.trust = self.fitted.model, self.fitted.trust
        self.speed = profile.speed()
        self.repeat_spread = _repeat_spread(batches, times_s)
        """With the machine's speed taken out."""
        self.untreated_spread = _repeat_spread(*profile.untreated_timings())

    def to_json(self) -> dict[str, Any]:
        """The figures of ``launch.py profile --report --json``; errors are fractions, not percent."""
        one_us, thousand_ms = prediction_cost(self.model)
        waited_s = sum(row.waited_s for row in self.profile.rows)
        return {
            **_summary(self.model_held_out),
            "cubic": _summary(self.cubic_held_out),
            "strata": {
                name: {
                    **_summary([p for p in self.model_held_out if is_in(p.batch)]),
                    "cubic": _summary([p for p in self.cubic_held_out if is_in(p.batch)]),
                }
                for name, is_in in STRATA.items()
            },
            "extrapolation": {f"{factor}x": _summary(held_out) for factor, held_out in self.beyond.items()},
            "predict_one_us": round(one_us, 3),
            "predict_1000_ms": round(thousand_ms, 4),
            "repeat_spread": self.repeat_spread,
            "repeat_spread_untreated": self.untreated_spread,
            "references": len(self.speed.at_s),
            "speed_range": round(self.speed.range, 4),
            "trees_trust": round(self.trust, 3),
            "waited_share": round(waited_s / sum(row.time_s for row in self.profile.rows), 4),
            "rows": len(self.profile.rows),
            "longest_tokens": self.profile.longest_tokens,
            "setting": self.profile.setting.model_dump(),
        }

    def write_plot(self, path: Path) -> None:
        """An HTML page: predicted over measured, and residuals by length and by batch size."""
        from plotly.graph_objects import Figure, Scatter
        from plotly.subplots import make_subplots

        titles = ["predicted / measured by new tokens", "by cached tokens", "by requests", "predicted over measured"]
        figure: Figure = make_subplots(rows=2, cols=2, subplot_titles=titles)
        for name, held_out, color in (
            ("cubic", self.cubic_held_out, "#b0b0b0"),
            ("LightGBM on physics", self.model_held_out, "#1f6fb4"),
        ):
            measured_ms = [1e3 * p.measured_s for p in held_out]
            ratios = [p.predicted_s / p.measured_s for p in held_out]
            text = [_describe(p.batch) for p in held_out]
            new = [sum(request.new_tokens for request in p.batch) for p in held_out]
            cached = [sum(request.cached_tokens for request in p.batch) for p in held_out]
            panels = [
                (new, ratios),
                (cached, ratios),
                ([len(p.batch) for p in held_out], ratios),
                (measured_ms, [1e3 * p.predicted_s for p in held_out]),
            ]
            for index, (x, y) in enumerate(panels):
                points = Scatter(
                    x=x, y=y, text=text, name=name, mode="markers", legendgroup=name, showlegend=index == 0,
                    marker={"color": color, "size": 6},
                )  # fmt: skip
                figure.add_trace(points, row=index // 2 + 1, col=index % 2 + 1)
        for row, column in ((1, 1), (2, 1), (2, 2)):
            figure.update_xaxes(type="log", row=row, col=column)
        for row, column in ((1, 1), (1, 2), (2, 1)):
            figure.add_hline(y=1.0, line={"width": 1, "dash": "dot"}, row=row, col=column)
        figure.update_xaxes(title="measured ms", row=2, col=2)
        figure.update_yaxes(type="log", title="predicted ms", row=2, col=2)
        setting = self.profile.setting
        title = f"TTFT model on held-out shapes: {setting.model} on {setting.device}"
        figure.update_layout(title=title, template="plotly_white", height=900)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.write_html(path, include_plotlyjs=True)

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """A table: shapes, and median and 90th-percentile error of the model and of the cubic."""
        kinds: dict[str, Callable[[Any], bool]] = {"all": lambda batch: True, **STRATA}
        table = []
        for name, is_in in kinds.items():
            ours = errors([p for p in self.model_held_out if is_in(p.batch)])
            cubic = errors([p for p in self.cubic_held_out if is_in(p.batch)])
            if ours is not None and cubic is not None:
                table.append((name, *_percent(ours), *_percent(cubic)))
        for factor, held_out in self.beyond.items():
            beyond = errors(held_out)
            if beyond is not None:
                table.append((f"{factor}x the longest seen", *_percent(beyond), "", ""))
        return table


def prediction_cost(model: BoostedTTFT) -> tuple[float, float]:
    """Microseconds of one prediction for one request, and milliseconds for 1,000 waiting requests: best of many."""
    rng = random.Random(0)
    waiting = [PrefillShape(rng.randint(1, 8192), rng.choice((0, rng.randint(0, 8192)))) for _ in range(1000)]
    model.predict_s(waiting[:1]), model.predict_each_s(waiting)
    one_s = _best_s(lambda: [model.predict_s([request]) for request in waiting]) / len(waiting)
    return one_s * 1e6, _best_s(lambda: model.predict_each_s(waiting)) * 1e3


def _best_s(run: Callable[[], object]) -> float:
    times_s = []
    for _ in range(COST_REPEATS):
        started_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def _summary(held_out: Sequence[HeldOut]) -> dict[str, Any]:
    summary = errors(held_out)
    if summary is None:
        return {"shapes": 0, "median_ape": None, "p90_ape": None, "worst_shape": None}
    worst = summary.worst
    return {
        "shapes": summary.shapes,
        "median_ape": round(summary.median_ape, 4),
        "p90_ape": round(summary.p90_ape, 4),
        "worst_shape": {
            "new_tokens": [request.new_tokens for request in worst.batch],
            "cached_tokens": [request.cached_tokens for request in worst.batch],
            "measured_s": round(worst.measured_s, 6),
            "predicted_s": round(worst.predicted_s, 6),
            "ape": round(worst.ape, 4),
        },
    }


def _repeat_spread(batches: Sequence[tuple[PrefillShape, ...]], times_s: Sequence[float]) -> float:
    """Median over the shapes of how far a repeat lies from the median of its shape: no model can do better."""
    repeats: dict[tuple[PrefillShape, ...], list[float]] = {}
    for batch, time_s in zip(batches, times_s, strict=True):
        repeats.setdefault(batch, []).append(time_s)
    spreads = [
        np.median(np.abs(np.array(times) / np.median(times) - 1)) for times in repeats.values() if len(times) > 2
    ]
    return round(float(np.median(spreads)), 4) if spreads else 0.0


def _percent(summary: Errors) -> tuple[str, str]:
    return f"{summary.median_ape:.1%}", f"{summary.p90_ape:.1%}"


def _describe(batch: Sequence[PrefillShape]) -> str:
    return " + ".join(f"{new} ({cached} cached)" if cached else str(new) for new, cached in batch)
