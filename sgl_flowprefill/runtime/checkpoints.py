"""Where a running prefill can be suspended: after each attention and each MLP module of any SGLang decoder.

Found by structure, not by name: SGLang's decoders hold their layers in a ``ModuleList`` and their attention in a module
that contains a ``RadixAttention`` (or a linear-attention counterpart). Of a layer's direct children, those that contain
attention are the attention modules; of the others, those with a matrix among their weights are MLP or MoE modules: that
leaves norms out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

from torch import nn

Granularity = Literal["operator", "layer"]


class CheckpointError(RuntimeError):
    """The model has no place at which a prefill could be suspended."""


@dataclass(frozen=True)
class DecoderLayer:
    """The operators of one decoder layer, by qualified module name, in the order in which they run."""

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]


def find_decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Decoder layers of an SGLang model. Raises CheckpointError for a model in which none are found."""
    attention_names = [name for name, module in model.named_modules() if _is_attention(module)]
    layers: list[DecoderLayer] = []
    for list_name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList):
            continue
        for index, layer in enumerate(module):
            layer_name = f"{list_name}.{index}"
            inside = [name for name in attention_names if name.startswith(f"{layer_name}.")]
            if not inside or any(name.startswith(f"{outer.name}.") for outer in layers for name in inside):
                continue
            attention, mlp = [], []
            for child_name, child in layer.named_children():
                name = f"{layer_name}.{child_name}"
                if any(_is_within(attention_name, name) for attention_name in inside):
                    attention.append(name)
                elif any(parameter.dim() >= 2 for parameter in child.parameters()):
                    mlp.append(name)
            layers.append(DecoderLayer(layer_name, tuple(attention), tuple(mlp)))
    if not layers:
        raise CheckpointError(
            f"{type(model).__name__} has no decoder layers with attention that FlowPrefill could find, so its prefills "
            "could not be suspended. Serve it without FlowPrefill, or use --flowprefill-granularity chunk."
        )
    return layers


def install_checkpoints(
    model: nn.Module, layers: Sequence[DecoderLayer], granularity: Granularity, checkpoint: Callable[[], None]
) -> Progress:
    """Call ``checkpoint`` after every operator (or layer) of ``model``; what lies behind each in a forward pass."""

    def after_operator(module: nn.Module, args: Any, output: Any) -> None:
        checkpoint()

    is_attention: list[bool] = []
    for layer in layers:
        names = (layer.name,) if granularity == "layer" else (*layer.attention, *layer.mlp)
        for name in names:
            model.get_submodule(name).register_forward_hook(after_operator)
            is_attention.append(name in layer.attention)
    return Progress(is_attention)


class Progress:
    """How much of a forward pass is left behind each of its checkpoints."""

    def __init__(self, is_attention: Sequence[bool]) -> None:
        """``is_attention`` says of every checkpoint, in order, whether it follows attention (else: MLP, or a layer)."""
        self.checkpoints = len(is_attention)
        self._attention = [0, *accumulate(is_attention)]

    def left(self, passed: int, attention_share: float) -> float:
        """Share of the time that is left after ``passed`` checkpoints, when attention takes ``attention_share``."""
        passed = min(passed, self.checkpoints)
        attention, all_attention = self._attention[passed], self._attention[-1]
        others, all_others = passed - attention, self.checkpoints - all_attention
        if not all_attention or not all_others:
            return 1.0 - passed / self.checkpoints
        done = attention_share * attention / all_attention + (1.0 - attention_share) * others / all_others
        return max(0.0, 1.0 - done)


def _is_attention(module: nn.Module) -> bool:
    """Attention as SGLang's backends see it: ``RadixAttention``, ``RadixLinearAttention`` and their subclasses."""
    return any(base.__name__ in ("RadixAttention", "RadixLinearAttention") for base in type(module).__mro__)


def _is_within(name: str, module_name: str) -> bool:
    return name == module_name or name.startswith(f"{module_name}.")
