"""What a phase is, what it is given, and what it finds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sgl_flowprefill.gpu_report.engine import Engine

State = Literal["passed", "FAILED", "measured", "not here", "left out"]
"""What came of a phase: checked and right, checked and wrong or ended by an error, measured without a limit to keep,
impossible on this machine, or not begun within the budget.
"""


class Budget:
    """The time that a phase may take; it measures something in any case."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end_s = clock() + seconds

    @property
    def left_s(self) -> float:
        return max(0.0, self._end_s - self._clock())

    def part(self, share: float) -> Budget:
        """A share of what is left, from now on."""
        return Budget(share * self.left_s, self._clock)


class Lengths:
    """The lengths of prompts that a phase measures on an engine, and those that it leaves out."""

    def __init__(self, wanted_tokens: Sequence[int], limit_tokens: int) -> None:
        self._limit_tokens = limit_tokens
        self.tokens = [tokens for tokens in wanted_tokens if tokens <= limit_tokens]
        """What the engine has context and KV cache for; the phase measures them in this order."""
        self._too_long = [tokens for tokens in wanted_tokens if tokens > limit_tokens]
        self._no_time: list[int] = []

    @property
    def left_out_tokens(self) -> list[int]:
        return self._no_time + self._too_long

    def leave_out_from(self, index: int) -> None:
        """The budget does not do for the lengths from ``index`` on."""
        self._no_time = self.tokens[index:]

    def why(self) -> str:
        """The end of a phase's line: what it leaves out; empty where that is nothing."""
        reasons = (
            ("no time for", self._no_time),
            (f"this engine has context and KV cache for {self._limit_tokens:,} tokens, so without", self._too_long),
        )
        return "".join(f"; {why} {', '.join(f'{one:,}' for one in lengths)}" for why, lengths in reasons if lengths)

    def none_fits(self) -> Outcome:
        """What a phase has found that has measured nothing."""
        return Outcome("left out", self.why().removeprefix("; "), figures={"left_out_tokens": self.left_out_tokens})


@dataclass(frozen=True)
class Outcome:
    """What a phase has found, or has found so far."""

    state: State
    line: str
    """One sentence for the summary."""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    """A table for the page, one of ``columns``."""
    figures: dict[str, Any] = field(default_factory=dict)
    """All that was measured, with units in the names."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """What a phase's process is asked for."""

    phase: str
    out: Path
    """Directory of the report: what earlier phases have found is in it."""
    budget: Budget
    options: Sequence[str]
    """SGLang options of a prefill server, of a phase with an engine; those of the user, of another."""

    def earlier(self, phase: str) -> dict[str, Any]:
        """Figures of another phase; none if it has found nothing."""
        path = phase_file(self.out, phase)
        if not path.exists():
            return {}
        figures: dict[str, Any] = json.loads(path.read_text()).get("figures", {})
        return figures


Measure = Callable[[Request], Iterator[Outcome]]
MeasureEngine = Callable[["Engine", Request], Iterator[Outcome]]
"""Finds more and more; the last of what it yields counts."""


def phase_file(out: Path, phase: str) -> Path:
    """Where the outcome of a phase is kept."""
    return out / "phases" / f"{phase.replace(':', '-')}.json"


def verdict(passed: bool) -> State:
    return "passed" if passed else "FAILED"


def quantiles_ms(values_s: Sequence[float]) -> dict[str, float]:
    """p50, p99 and the largest, in milliseconds, for a table and for JSON."""
    ordered = sorted(values_s)
    return {
        "p50_ms": 1e3 * ordered[len(ordered) // 2],
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        "max_ms": 1e3 * ordered[-1],
    }
