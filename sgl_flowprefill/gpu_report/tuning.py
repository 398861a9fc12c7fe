"""The settings that fit a card, chosen from what the phases have measured on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sgl_flowprefill.config import command_line

MAX_IDLE: Final = 0.01
"""Share of the time in which the device may be idle, against all launched before it begins."""
MAX_TILE_COST: Final = 0.02
"""Share of a long prefill that its being split into tiles may cost."""

Earlier = Callable[[str], Mapping[str, Any]]
"""Figures of a phase by its name; none where it has not measured."""


@dataclass(frozen=True)
class Choice:
    """One option of FlowPrefill, and why this value."""

    option: str
    value: float
    why: str

    @property
    def flag(self) -> str:
        return command_line({self.option: f"{self.value:g}"})


def choose(earlier: Earlier) -> list[Choice]:
    """Choices of options, as many as the figures allow."""
    found = (_lookahead(earlier("lookahead")), _tiles(earlier("tiles")), _batches(earlier("operators")))
    return [choice for choice in found if choice is not None]


def _lookahead(figures: Mapping[str, Any]) -> Choice | None:
    """The shortest with which the device hardly waits, at every length: each operator more is one more to wait for."""
    rows = figures.get("rows", ())
    worst = {int(ahead): max(float(row["idle"][ahead]) for row in rows) for ahead in (rows[0]["idle"] if rows else ())}
    if not worst:
        return None
    enough = [ahead for ahead, idle in worst.items() if idle < MAX_IDLE]
    if enough:
        chosen, why = min(enough), "the fewest with which the device idles less than that"
    else:
        chosen, why = min(worst, key=lambda ahead: worst[ahead]), "none idles less; this one the least"
    shares = ", ".join(f"{idle:.2%} with {ahead}" for ahead, idle in worst.items())
    return Choice("lookahead", chosen, f"idle at most {MAX_IDLE:.0%} wanted, measured {shares}: {why}")


def _tiles(figures: Mapping[str, Any]) -> Choice | None:
    rows = figures.get("rows", ())
    if not rows:
        return None
    costs = {float(row["length_ms"]): float(row["cost"]) for row in rows}
    cheap = [length_ms for length_ms, cost in costs.items() if cost <= MAX_TILE_COST]
    if cheap:
        chosen, why = min(cheap), "the shortest that costs no more"
    else:
        chosen, why = min(costs, key=lambda length_ms: costs[length_ms]), "none costs as little; this one the least"
    listed = ", ".join(f"{cost:+.1%} at {length_ms:g} ms" for length_ms, cost in costs.items())
    return Choice(
        "max_blocking_ms", chosen, f"tiles may cost {MAX_TILE_COST:.0%} of a long prefill, cost {listed}: {why}"
    )


def _batches(figures: Mapping[str, Any]) -> Choice | None:
    tokens = figures.get("batch_tokens")
    if not tokens:
        return None
    return Choice("max_batch_tokens", tokens, "where the profile's throughput stops growing with the batch")
