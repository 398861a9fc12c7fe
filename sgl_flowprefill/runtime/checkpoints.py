"""Where a running prefill can be suspended: after each attention and each MLP module of any SGLang decoder.

Found by structure, not by name: SGLang's decoders hold their layers in a ``ModuleList``, of which at least one contains
a decoder's ``RadixAttention`` (or a linear-attention counterpart). A layer's direct children that contain attention are
the attention modules; other children with a matrix among their weights are MLP or MoE modules, which leaves norms out.
docs/models.md lists what is found in every model class of SGLang's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

from torch import nn

from sgl_flowprefill.config import Granularity
from sgl_flowprefill.hub.progress import Progress

_ATTENTION: Final = frozenset(
    {
        "RadixLinearAttention",
        "MambaMixer1",
        "MambaMixer2",
        "Lfm2ShortConv",
        "Lfm2MoeShortConv",
        "JetBlock",
    }
)
"""Classes that mix a sequence's tokens without a ``RadixAttention``: SGLang's linear attention, and models' own."""

_HELPERS: Final = frozenset({"Gemma3nAltUp", "GatedResidual"})
"""Classes with matrices that a layer calls around its operators, by other methods than ``forward``."""


class CheckpointError(RuntimeError):
    """The model has no place at which a prefill could be suspended."""


@dataclass(frozen=True)
class DecoderLayer:
    """The operators of one decoder layer, by qualified module name, in the order in which they run."""

    name: str
    attention: tuple[str, ...]
    mlp: tuple[str, ...]


def find_decoder_layers(model: nn.Module) -> list[DecoderLayer]:
    """Decoder layers of an SGLang model. Raises CheckpointError for one that has none, or that computes no logits."""
    modules = dict(model.named_modules())
    if not any(type(module).__name__ == "LogitsProcessor" for module in modules.values()):
        raise CheckpointError(f"{type(model).__name__} computes no logits: its prefills do not end with a first token.")
    attention_names = [name for name, module in modules.items() if _is_attention(module)]
    # SGLang's Transformers backend keeps its RadixAttention outside of transformers' own modules.
    attention_names = attention_names or [
        name for name, module in modules.items() if hasattr(module, "layer_idx") and hasattr(module, "is_causal")
    ]
    layers: list[DecoderLayer] = []
    lists: list[str] = []
    for name, module in modules.items():
        if not isinstance(module, nn.ModuleList) or any(_is_within(name, outer) for outer in lists):
            continue
        inside = [attention for attention in attention_names if _is_within(attention, name)]
        if not inside:
            continue
        lists.append(name)
        operators = (_find_operators(f"{name}.{index}", layer, inside) for index, layer in enumerate(module))
        layers += [layer for layer in operators if layer.attention or layer.mlp]
    if not layers:
        raise CheckpointError(
            f"{type(model).__name__} has no decoder layers with attention that FlowPrefill could find, so its prefills "
            "could not be suspended. Serve it without FlowPrefill, or use --flowprefill-granularity chunk."
        )
    return layers


def install_checkpoints(
    model: nn.Module, layers: Sequence[DecoderLayer], granularity: Granularity, checkpoint: Callable[[], None]
) -> Progress:
    """Call ``checkpoint`` after every operator (or layer) of ``model``; where each is in a forward pass.

    Takes the place of each ``forward``: SGLang calls some operators by it (``nemotron_h.py``), which runs no hooks.
    """
    is_attention: list[bool] = []
    names: list[str] = []
    for layer in layers:
        for name in (layer.name,) if granularity == "layer" else (*layer.attention, *layer.mlp):
            module = model.get_submodule(name)
            module.forward = _then(module.forward, checkpoint)
            is_attention.append(granularity == "operator" and name in layer.attention)
            names.append(name)
    return Progress(is_attention, names)


def _then(forward: Callable[..., Any], checkpoint: Callable[[], None]) -> Callable[..., Any]:
    @wraps(forward)
    def operator(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        checkpoint()
        return output

    return operator


def _find_operators(layer_name: str, layer: nn.Module, attention_names: Sequence[str]) -> DecoderLayer:
    """Attention and MLP modules of one layer. Single matrices count only where it has no MLP of several."""
    attention: list[str] = []
    mlp: list[str] = []
    matrices: list[str] = []
    for name, child in _called_children(layer_name, layer):
        if any(_is_within(attention_name, name) for attention_name in attention_names):
            attention.append(name)
        elif type(child).__name__ not in _HELPERS and any(weight.dim() >= 2 for weight in child.parameters()):
            (mlp if any(True for _ in child.children()) else matrices).append(name)
    return DecoderLayer(layer_name, tuple(attention), tuple(mlp or matrices))


def _called_children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct children by qualified name; in place of a ``ModuleList``, which is never called, its children."""
    for child_name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from _called_children(f"{name}.{child_name}", child)
        else:
            yield f"{name}.{child_name}", child


def _is_attention(module: nn.Module) -> bool:
    """What mixes the tokens of a sequence: causal attention as SGLang's backends see it, and its stated exceptions."""
    names = {base.__name__ for base in type(module).__mro__}
    if "RadixAttention" in names:
        return bool(module.attn_type.name.startswith("DECODER"))
    return not names.isdisjoint(_ATTENTION)


def _is_within(name: str, module_name: str) -> bool:
    return name == module_name or name.startswith(f"{module_name}.")
