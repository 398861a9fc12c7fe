"""Long inputs: an operator that would block for too long runs in row tiles, and can be suspended between them.

An MLP works row by row, so its tiles compute what the whole would. Attention is tiled by the backend that computes it
(``platforms.attention``), which calls ``between_tiles`` after each query tile. Paper, section 6, names one operator on
an extremely long input as what still blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import nn

SMALLEST_TILE_TOKENS: Final = 256
"""Smaller tiles would cost throughput: a matrix product of fewer rows no longer keeps the core busy."""


def tile_tokens(max_blocking_s: float, operator_s_per_token: float) -> int:
    """Rows of a tile that takes about ``max_blocking_s``, a multiple of the smallest tile."""
    tiles = int(max_blocking_s / operator_s_per_token / SMALLEST_TILE_TOKENS)
    return max(1, tiles) * SMALLEST_TILE_TOKENS


def tile_mlps(model: nn.Module, names: Iterable[str], rows: int, between_tiles: Callable[[], None]) -> int:
    """Run the dense MLPs called ``names`` in tiles of ``rows`` tokens; how many are. Mixtures of experts are not:
    how their kernels group tokens depends on all of them. Nor are single matrices, whose output is not a tensor alone.
    """
    count = 0
    for name in names:
        mlp = model.get_submodule(name)
        if any(True for _ in mlp.children()) and not _is_mixture(mlp):
            mlp.forward = _tiled(mlp.forward, rows, between_tiles)
            count += 1
    return count


def _tiled(forward: Callable[..., Any], rows: int, between_tiles: Callable[[], None]) -> Callable[..., Any]:
    def tiled(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(hidden_states) <= rows:
            return forward(hidden_states, *args, **kwargs)
        output = None
        for start in range(0, len(hidden_states), rows):
            part = forward(hidden_states[start : start + rows], *args, **kwargs)
            if output is None:
                output = part.new_empty((len(hidden_states), *part.shape[1:]))
            output[start : start + len(part)] = part
            if start + rows < len(hidden_states):
                between_tiles()
        return output

    return tiled


def _is_mixture(mlp: nn.Module) -> bool:
    return any("MoE" in type(module).__name__ or "Experts" in type(module).__name__ for module in mlp.modules())
