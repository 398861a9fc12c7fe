"""Long inputs: an operator that would block for too long runs in row tiles, and can be suspended between them.

MLPs, norms and linear layers work row by row, so their tiles compute what the whole would. Attention is tiled by query
(``tiled_attention``). Paper, section 6, names one operator on an extremely long input as what still blocks.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import torch
from torch import nn

from sgl_flowprefill.runtime.checkpoints import DecoderLayer
from sgl_flowprefill.ttft import OperatorTimes, PrefillShape, TTFTModel

logger = logging.getLogger(__name__)

SMALLEST_TILE_TOKENS: Final = 256
"""Smaller tiles would cost throughput: a matrix product of fewer rows no longer keeps the core busy."""
SAMPLE_TOKENS: Final = 2048
"""Prompt length at which the time of a row is taken: long enough for efficient kernels, short for attention."""
NORM_FACTOR: Final = 4
"""A row of a norm costs at most this part of one of an MLP (on a CPU, with an MLP twice as wide as the model)."""
LEAST_LINEAR_FACTOR: Final = 2
"""A row of a linear layer of attention costs at most half of one of an MLP."""


@dataclass(frozen=True)
class Tiles:
    """How much of an operator runs between two places at which a task can be suspended."""

    rows: int
    """Tokens of an MLP tile."""
    pairs: float
    """Most pairs of a query and a key of an attention tile."""


WHOLE: Final = Tiles(sys.maxsize, math.inf)


def plan_tiles(max_blocking_s: float, layers: int, ttft: TTFTModel, operators: OperatorTimes | None) -> Tiles:
    """Tiles that take about ``max_blocking_s``, by the profile's times of operators; where it has none, of MLPs by the
    time of a whole layer, which bounds theirs, and of attention without a bound.
    """
    if operators is not None and operators.mlp_s_per_token > 0:
        mlp_s_per_token = operators.mlp_s_per_token / layers
    else:
        mlp_s_per_token = ttft.predict_s([PrefillShape(SAMPLE_TOKENS)]) / layers / SAMPLE_TOKENS
    attention_s_per_pair = 0.0 if operators is None else operators.attention_s_per_pair / layers
    return Tiles(
        rows=max(1, int(max_blocking_s / mlp_s_per_token / SMALLEST_TILE_TOKENS)) * SMALLEST_TILE_TOKENS,
        pairs=max_blocking_s / attention_s_per_pair if attention_s_per_pair else math.inf,
    )


def tile_layers(model: nn.Module, layers: Sequence[DecoderLayer], rows: int, between_tiles: Callable[[], None]) -> None:
    """Run MLPs, norms and the linear layers of attention in tiles: ``rows`` tokens of an MLP."""
    count = tile_mlps(model, chain(*(layer.mlp for layer in layers)), rows, between_tiles)
    count += tile_around_attention(model, layers, rows, between_tiles)
    logger.info("FlowPrefill runs %d modules in tiles, MLPs in those of %d tokens", count, rows)


def tile_mlps(model: nn.Module, names: Iterable[str], rows: int, between_tiles: Callable[[], None]) -> int:
    """Run the dense MLPs called ``names`` in tiles of ``rows`` tokens; how many are. Mixtures of experts are not:
    how their kernels group tokens depends on all of them. Nor are single matrices of layers without an MLP.
    """
    count = 0
    for name in names:
        mlp = model.get_submodule(name)
        if any(True for _ in mlp.children()) and not _is_mixture(mlp):
            mlp.forward = in_tiles(mlp.forward, rows, between_tiles)
            count += 1
    return count


def tile_around_attention(
    model: nn.Module, layers: Sequence[DecoderLayer], rows: int, between_tiles: Callable[[], None]
) -> int:
    """Run the norms of the decoder, and the linear layers inside its attention modules, in tiles; how many are.

    Not the norms of an encoder: tensor-parallel ranks may share its images out, and have to pass the same interruption
    points.
    """
    linear = [
        (module, _linear_factor(model, layer, module))
        for layer in layers
        for name in layer.attention
        for module in model.get_submodule(name).modules()
        if type(module).__name__.endswith("Linear")
    ]
    inside = tuple(f"{layer.name}." for layer in layers)
    beside = {layer.name.rpartition(".")[0].rpartition(".")[0] for layer in layers}  # what holds the list of layers
    norms = [
        (module, float(NORM_FACTOR))
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm") and (name.startswith(inside) or name.rpartition(".")[0] in beside)
    ]
    for module, factor in (*linear, *norms):
        module.forward = in_tiles(module.forward, int(factor * rows), between_tiles)
    return len(linear) + len(norms)


def _linear_factor(model: nn.Module, layer: DecoderLayer, linear: nn.Module) -> float:
    """How many rows of ``linear`` take as long as one of the layer's dense MLP, by their parameters; as many as of a
    norm at most, whatever their quantisations make of the comparison.

    Tiles of what is light cost most: putting them together takes a fifth of a product's time, half of a norm's.
    """
    own = sum(weight.numel() for weight in linear.parameters())
    mlps = [model.get_submodule(name) for name in layer.mlp]
    mlp = sum(weight.numel() for one in mlps if not _is_mixture(one) for weight in one.parameters())
    factor = mlp / own if own else 0.0
    return min(max(LEAST_LINEAR_FACTOR, factor), NORM_FACTOR)


def in_tiles(forward: Callable[..., Any], rows: int, between_tiles: Callable[[], None]) -> Callable[..., Any]:
    """``forward`` in tiles of ``rows`` rows of its first tensor. Arguments with as many rows are cut alike, others are
    passed on; its result is a tensor, or a tuple of tensors and None.
    """

    def tiled(*args: Any, **kwargs: Any) -> Any:
        tokens = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if tokens <= rows:
            return forward(*args, **kwargs)
        output: Any = None
        for start in range(0, tokens, rows):
            tile = slice(start, min(start + rows, tokens))
            part = forward(
                *(_cut(value, tokens, tile) for value in args),
                **{name: _cut(value, tokens, tile) for name, value in kwargs.items()},
            )
            if output is None:
                output = tuple(_room(p, tokens) for p in part) if isinstance(part, tuple) else _room(part, tokens)
            for whole, rows_of_it in zip(output, part, strict=True) if isinstance(part, tuple) else [(output, part)]:
                if whole is not None:
                    whole[tile] = rows_of_it
            if tile.stop < tokens:
                between_tiles()
        return output

    return tiled


def _cut(value: Any, tokens: int, tile: slice) -> Any:
    return value[tile] if isinstance(value, torch.Tensor) and value.dim() and len(value) == tokens else value


def _room(part: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    return None if part is None else part.new_empty((tokens, *part.shape[1:]))


def _is_mixture(mlp: nn.Module) -> bool:
    return any("MoE" in type(module).__name__ or "Experts" in type(module).__name__ for module in mlp.modules())
