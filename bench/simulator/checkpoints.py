"""Where a running prefill can stop: after each attention and each MLP, and between the tiles of long ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

ROUNDING: Final = 1e-9
"""Share of a step by which a time may miss a boundary that it stands for."""


@dataclass(frozen=True)
class Preemption:
    """How finely a forward pass can be suspended."""

    granularity: str = "operator"
    max_operator_s: float = math.inf
    """An operator that takes longer runs in tiles of at most this (granularity operator)."""
    lookahead: int = 0
    """Operators that are already queued on the device when a stop is wanted, and run first."""


class Checkpoints:
    """The boundaries of one forward pass. Elapsed times count while it runs."""

    __slots__ = ("_attention_s", "_duration_s", "_layer_s", "_per_layer", "_preemption", "total")

    def __init__(self, duration_s: float, layers: int, attention_share: float, preemption: Preemption) -> None:
        self._duration_s = duration_s
        self._preemption = preemption
        self._layer_s = duration_s / layers
        self._attention_s = self._layer_s * attention_share
        self._per_layer = {"operator": 2, "layer": 1, "chunk": 0}[preemption.granularity]
        self.total = self._per_layer * layers
        """Preemption checkpoints of the whole forward pass, by which the runtime tells its progress."""

    def next_stop_s(self, elapsed_s: float) -> float:
        """The first elapsed time after ``elapsed_s`` at which the forward pass can be suspended, or its end."""
        for _ in range(self._preemption.lookahead + 1):
            elapsed_s = self._boundary_after_s(elapsed_s)
        return elapsed_s

    def passed(self, elapsed_s: float) -> int:
        """Preemption checkpoints passed after ``elapsed_s``."""
        layers, rest_s = self._place(elapsed_s)
        in_layer = self._per_layer == 2 and rest_s >= self._attention_s * (1 - ROUNDING)
        return min(self.total, self._per_layer * layers + in_layer)

    def _boundary_after_s(self, elapsed_s: float) -> float:
        if not self._per_layer:
            return self._duration_s
        layers, rest_s = self._place(elapsed_s)
        if self._per_layer == 1:
            return min(self._duration_s, (layers + 1) * self._layer_s)
        in_attention = rest_s < self._attention_s * (1 - ROUNDING)
        begin_s = layers * self._layer_s + (0.0 if in_attention else self._attention_s)
        operator_s = self._attention_s if in_attention else self._layer_s - self._attention_s
        tile_s = operator_s / max(1, math.ceil(operator_s / self._preemption.max_operator_s))
        tile = math.floor((elapsed_s - begin_s) / tile_s + ROUNDING) + 1
        return min(self._duration_s, begin_s + tile * tile_s)

    def _place(self, elapsed_s: float) -> tuple[int, float]:
        """Whole layers done, and the time since."""
        layers = math.floor(elapsed_s / self._layer_s + ROUNDING)
        return layers, max(0.0, elapsed_s - layers * self._layer_s)
