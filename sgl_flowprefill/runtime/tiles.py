"""Long inputs: an operator that would block for too long runs in row tiles, and can be suspended between them.

MLPs, norms and linear layers work row by row, so their tiles compute what the whole would. That holds for quantised
ones too where a row has a scale of its own or a constant one, as in SGLang on CUDA (tests/unit/test_gpu_contracts.py);
with one scale of the whole batch (per tensor and dynamic, on AMD) it would not, so on AMD quantised layers run whole.
So do layers with adapters (LoRA), which go through the rows of the whole batch, and MLPs made of these.
Attention is tiled by query (``tiled_attention``). Paper, section 6, names one operator on an extremely long input as
what still blocks.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from sgl_flowprefill.runtime.checkpoints import DecoderLayer
from sgl_flowprefill.ttft import YARDSTICK, OperatorTimes

logger = logging.getLogger(__name__)

TILE_STEP_TOKENS: Final = 64
"""Tiles are multiples of this, and at least as long: a matrix product of fewer rows no longer keeps the core busy."""
SHORT: Final = 0.25
"""Share of a tile's rows: so few need no interruption point of their own, nor a tile. A tile with so many more takes
longer by that, within the half of the longest blocking time by which the 99th percentile may exceed it."""
LEAST_CHANGE: Final = 0.03
"""Relative change of the engine's speed below which tiles stay as they are."""
LIGHTEST: Final = 16
"""A row of a norm or of a linear layer is taken to cost at least this part of an MLP's, whatever a fit to noisy times
says of it."""

ADAPTED: Final = "LinearWithLoRA"
"""How SGLang's linear layers with adapters are called."""


@dataclass(frozen=True)
class Tiles:
    """How much of an operator runs between two places at which a task can be suspended."""

    rows: int
    """Tokens of an MLP tile."""
    attention_rows: int
    """Rows of a tile of a linear layer or norm inside attention."""
    norm_rows: int
    """Rows of a tile of another norm."""
    pairs: float
    """Most pairs of a query and a key of an attention tile."""


WHOLE: Final = Tiles(sys.maxsize, sys.maxsize, sys.maxsize, math.inf)


@dataclass(frozen=True)
class TilePlan:
    """How tiles with interruption points about ``max_blocking_s`` apart follow from the engine's speed.

    Of the profile's times of operators only the proportions count: how fast the engine is, its prefills say.
    """

    max_blocking_s: float
    layers: int
    norms: int
    """Norms outside of attention."""
    operators: OperatorTimes | None
    """None: all tiles are planned by the time of a whole layer, and attention is not bounded."""
    mlp_piece: float = 1.0
    """The longest stretch of an MLP's tile without an interruption point (``longest_mlp_piece``)."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        layers: Sequence[DecoderLayer],
        norms: Sequence[nn.Module],
        max_blocking_s: float,
        operators: OperatorTimes | None,
    ) -> TilePlan:
        """The plan for ``model``, its decoder ``layers`` and ``norms``."""
        return cls(max_blocking_s, len(layers), len(norms), operators, longest_mlp_piece(model, layers))

    def tiles(self, yardstick_s: float) -> Tiles:
        """Tiles of an engine that takes ``yardstick_s`` for the YARDSTICK (``ttft.base``). A linear layer inside
        attention is planned by the time per token of all of them in its layer, a norm by that of all that is neither
        attention nor MLP, over the number of norms: both bound theirs.
        """
        layer_s = yardstick_s / self.layers / YARDSTICK.new_tokens
        if self.operators is None:
            rows = _steps(self.max_blocking_s / layer_s)
            return Tiles(rows, rows, rows, math.inf)
        operators, scale = self.operators, yardstick_s / self.operators.forward_s([YARDSTICK])
        mlp_s = scale * operators.mlp_s_per_token / self.layers or layer_s
        attention_s = scale * operators.attention_s_per_token / self.layers
        pair_s = scale * operators.attention_s_per_pair / self.layers
        norm_s = scale * operators.rest_s_per_token / max(1, self.norms)
        return Tiles(
            rows=_steps(self.max_blocking_s / mlp_s / self.mlp_piece),
            attention_rows=_steps(self.max_blocking_s / max(attention_s, mlp_s / LIGHTEST)),
            norm_rows=_steps(self.max_blocking_s / max(norm_s, mlp_s / LIGHTEST)),
            pairs=self.max_blocking_s / pair_s if pair_s else math.inf,
        )


class TileSizes:
    """The tiles of what starts now, by how fast the engine is."""

    def __init__(self, plan: Callable[[float], Tiles], yardstick_s: float = 0.0) -> None:
        """``plan``: tiles by the time of the YARDSTICK, which is ``yardstick_s`` until one has been agreed on."""
        self.now = plan(yardstick_s)
        self._plan = plan
        self._yardstick_s = 0.0

    def follow(self, yardstick_s: float) -> None:
        """The YARDSTICK is expected to take ``yardstick_s`` now, as all ranks have agreed."""
        if abs(yardstick_s - self._yardstick_s) > LEAST_CHANGE * self._yardstick_s:
            self._yardstick_s = yardstick_s
            self.now = self._plan(yardstick_s)


def tile_layers(
    model: nn.Module,
    layers: Sequence[DecoderLayer],
    norms: Sequence[nn.Module],
    sizes: TileSizes,
    between_tiles: Callable[[], None],
) -> None:
    """Run MLPs, ``norms``, and the linear layers and norms inside attention in tiles."""
    count = tile_mlps(model, _mlps(layers), lambda: sizes.now.rows, between_tiles)
    inside = [
        module
        for layer in layers
        for name in layer.attention
        for module in model.get_submodule(name).modules()
        if type(module).__name__.endswith(("Linear", "Norm")) and _is_exact_in_tiles(module)
    ]
    for module in inside:
        module.forward = in_tiles(module.forward, lambda: sizes.now.attention_rows, between_tiles)
    for module in norms:
        module.forward = in_tiles(module.forward, lambda: sizes.now.norm_rows, between_tiles)
    logger.info("FlowPrefill runs %d modules in %s", count + len(inside) + len(norms), sizes.now)


def find_norms(model: nn.Module, layers: Sequence[DecoderLayer]) -> list[nn.Module]:
    """Norms of the decoder outside of its attention modules.

    Not the norms of an encoder: tensor-parallel ranks may share its images out, and have to pass the same interruption
    points.
    """
    attention = tuple(f"{name}." for layer in layers for name in layer.attention)
    inside = tuple(f"{layer.name}." for layer in layers)
    beside = {layer.name.rpartition(".")[0].rpartition(".")[0] for layer in layers}  # what holds the list of layers
    return [
        module
        for name, module in model.named_modules()
        if type(module).__name__.endswith("Norm")
        and not name.startswith(attention)
        and (name.startswith(inside) or name.rpartition(".")[0] in beside)
    ]


def tile_mlps(
    model: nn.Module, names: Iterable[str], rows: Callable[[], int], between_tiles: Callable[[], None]
) -> int:
    """Run the dense MLPs called ``names`` in tiles of ``rows()`` tokens; how many are. A tile can be suspended between
    two linear layers as well, so that it may be longer: the weights of a matrix product are prepared for each tile.
    """
    mlps = _dense_mlps(model, names)
    whole = [mlp for mlp in mlps if _has_adapters(mlp)]
    for mlp in mlps:
        if mlp not in whole:
            mlp.forward = in_tiles(mlp.forward, rows, between_tiles)
        for linear in _linear_layers(mlp)[:-1]:
            linear.forward = _interruptible_after(linear.forward, rows, between_tiles)
    if whole:
        logger.info("FlowPrefill does not split %d MLPs with adapters", len(whole))
    return len(mlps) - len(whole)


def has_dense_mlps(model: nn.Module, layers: Iterable[DecoderLayer]) -> bool:
    """Whether there are MLPs within which ``tile_mlps`` lets a task be suspended."""
    return bool(_dense_mlps(model, _mlps(layers)))


def has_whole_mlps(model: nn.Module, layers: Iterable[DecoderLayer]) -> bool:
    """Whether there are MLPs that ``tile_mlps`` does not split for their adapters."""
    return any(map(_has_adapters, _dense_mlps(model, _mlps(layers))))


def longest_mlp_piece(model: nn.Module, layers: Iterable[DecoderLayer]) -> float:
    """Share of an MLP's time that passes between two interruption points of a tile, at most: that of its largest
    linear layer, by weights.
    """
    shares = []
    for mlp in _dense_mlps(model, _mlps(layers)):
        weights = [sum(weight.numel() for weight in linear.parameters()) for linear in _linear_layers(mlp)]
        shares.append(max(weights) / sum(weights) if any(weights) else 1.0)
    return max(shares, default=1.0)


def _mlps(layers: Iterable[DecoderLayer]) -> list[str]:
    return [name for layer in layers for name in layer.mlp]


def _dense_mlps(model: nn.Module, names: Iterable[str]) -> list[nn.Module]:
    """Not mixtures of experts: how their kernels group tokens depends on all of them. Nor single matrices of layers
    without an MLP.
    """
    modules = map(model.get_submodule, names)
    return [
        module
        for module in modules
        if any(True for _ in module.children()) and not _is_mixture(module) and _is_exact_in_tiles(module)
    ]


def _is_exact_in_tiles(module: nn.Module) -> bool:
    return torch.version.hip is None or not any(map(_is_quantised, module.modules()))


def _is_quantised(module: nn.Module) -> bool:
    method = getattr(module, "quant_method", None)  # of SGLang's linear layers
    return method is not None and not type(method).__name__.startswith("Unquantized")


def _linear_layers(mlp: nn.Module) -> list[nn.Module]:
    return [child for child in mlp.children() if type(child).__name__.endswith(("Linear", ADAPTED))]


def _has_adapters(mlp: nn.Module) -> bool:
    return any(type(module).__name__.endswith(ADAPTED) for module in mlp.modules())


def _interruptible_after(
    forward: Callable[..., Any], rows: Callable[[], int], between_tiles: Callable[[], None]
) -> Callable[..., Any]:
    """``forward``, with an interruption point behind it unless it is SHORT."""

    def interruptible(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        if _tokens(args, kwargs) > SHORT * rows():
            between_tiles()
        return output

    return interruptible


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of the first tensor."""
    values = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim())
    return next(map(len, values), 0)


def in_tiles(
    forward: Callable[..., Any], rows: Callable[[], int], between_tiles: Callable[[], None]
) -> Callable[..., Any]:
    """``forward`` in tiles of so many rows of its first tensor, asked for at each call. Arguments with as many rows are
    cut alike, others are passed on; its result is a tensor, or a tuple of tensors and None. Without a tensor that has
    rows, as where a layer is handed a tuple of quantised activations and their scales, it runs whole.

    ``between_tiles`` is called after the last tile as well: what comes next would lengthen it.
    """

    def tiled(*args: Any, **kwargs: Any) -> Any:
        tokens, most = _tokens(args, kwargs), rows()
        tiles = list(row_tiles(tokens, most))
        output: Any = None
        if len(tiles) <= 1:
            output = forward(*args, **kwargs)
            if tokens > SHORT * most:
                between_tiles()
            return output
        for tile in tiles:
            part = forward(
                *(_cut(value, tokens, tile) for value in args),
                **{name: _cut(value, tokens, tile) for name, value in kwargs.items()},
            )
            if output is None:
                output = tuple(_room(p, tokens) for p in part) if isinstance(part, tuple) else _room(part, tokens)
            _put(part, output, tile)
            del part  # a task may be suspended here, or inside the next tile
            between_tiles()
        return output

    return tiled


def row_tiles(tokens: int, most: int) -> Iterator[slice]:
    """Rows of each tile: ``most``, and in the last one what is left. What would be a SHORT one is part of that before
    it: a matrix product of few rows takes nearly as long as one of many, as all weights are read for it."""
    start = 0
    while start < tokens:
        stop = start + most if tokens - start > (1 + SHORT) * most else tokens
        yield slice(start, stop)
        start = stop


def _steps(rows: float) -> int:
    return max(1, int(rows / TILE_STEP_TOKENS)) * TILE_STEP_TOKENS


def _cut(value: Any, tokens: int, tile: slice) -> Any:
    return value[tile] if isinstance(value, torch.Tensor) and value.dim() and len(value) == tokens else value


def _room(part: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    return None if part is None else part.new_empty((tokens, *part.shape[1:]))


def _put(part: Any, output: Any, tile: slice) -> None:
    """Write what was computed of a ``tile`` to its rows."""
    for whole, rows in zip(output, part, strict=True) if isinstance(part, tuple) else [(output, part)]:
        if whole is not None:
            whole[tile] = rows


def _is_mixture(mlp: nn.Module) -> bool:
    return any("MoE" in type(module).__name__ or "Experts" in type(module).__name__ for module in mlp.modules())
