"""What FlowPrefill finds in every model class of SGLang's registry.

Every class is built on the meta device by its own constructor, from its own configuration class where it has one
(tests/model_configs.py), with few layers. The rule of ``runtime.checkpoints`` is applied, and the model runs a forward
pass on the meta device, in which only attention, experts and logits are replaced by their shapes: every operator has to
come by its checkpoint, in tiles where it has tiles. ``python -m tests.model_registry`` writes docs/models.md.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.platforms.attention import attend_to_latents
from sgl_flowprefill.runtime.checkpoints import (
    CheckpointError,
    DecoderLayer,
    find_decoder_layers,
    install_checkpoints,
)
from sgl_flowprefill.runtime.tiles import tile_mlps
from tests.engine import PrefillEngine
from tests.model_configs import FIELDS, NO_FORWARD, configuration

TOKENS = 8
TILE_TOKENS = 4
PUBLISHED = Path(__file__).parents[1] / "docs" / "models.md"

REFUSED = {
    r"NextN$|MTP$|Eagle3?$|^Eagle3|DSpark|^DFlash|DraftModel$|Assistant": "draft model: `--speculative-algorithm`",
    r"^LLaDA2|^SDAR|^DiffusionGemma": "diffusion: `--dllm-algorithm`",
}
"""Name of the class: the option that serves it, in which it is no model by itself, or which ``compat`` refuses."""


@dataclass(frozen=True)
class Outcome:
    """What became of one model class."""

    architecture: str
    how: str
    """``rule``, ``exception``, ``refused`` or ``not built``."""
    detail: str = ""
    """Operators of the layers by class, or why there are none."""
    forward: str = ""
    """``runs``, or what the forward pass needs that is not here."""

    def row(self) -> str:
        return f"| {self.architecture} | {self.how} | {self.detail} | {self.forward} |"


def walk(only: Callable[[str], bool] = lambda architecture: True) -> list[Outcome]:
    """The outcome for every registered model class, in the order of their names. Takes the process's one scheduler."""
    PrefillEngine(str(embedded_model_path()))
    from sglang.srt.models.registry import ModelRegistry

    logging.disable(logging.WARNING)
    outcomes, unbuilt = [], []
    found: dict[type[nn.Module], str] = {}
    for name, model_class in sorted(ModelRegistry.models.items()):
        if only(name):
            outcome = examine(name, model_class, found)
            (unbuilt if outcome.how == "not built" else outcomes).append(outcome)
    for outcome in unbuilt:
        known = sorted(found[layer] for layer in reached(ModelRegistry.models[outcome.architecture]) & found.keys())
        text = f"the layers of {known[0]}; not built: {outcome.detail}" if known else outcome.detail
        outcomes.append(replace(outcome, how="source" if known else outcome.how, detail=text))
    return sorted(outcomes, key=lambda outcome: outcome.architecture)


def examine(architecture: str, model_class: type[nn.Module], found: dict[type[nn.Module], str]) -> Outcome:
    """The outcome for one class; adds its decoder layers to ``found``, with the class's name."""
    for pattern, reason in REFUSED.items():
        if re.search(pattern, architecture):
            return Outcome(architecture, "refused", reason)
    try:
        model = build(architecture, model_class)
    except Exception as error:
        return Outcome(architecture, "not built", _where(error))
    try:
        layers = find_decoder_layers(model)
    except CheckpointError as error:
        no_logits = "computes no logits" in str(error)
        return Outcome(architecture, "refused", "no first token" if no_logits else "no decoder layers with attention")
    for layer in layers:
        found.setdefault(type(model.get_submodule(layer.name)), architecture)
    how = "exception" if _is_exceptional(model, layers) else "rule"
    return Outcome(architecture, how, _describe(model, layers), _run(architecture, model, layers))


def reached(model_class: type[nn.Module]) -> set[type[nn.Module]]:
    """Module classes that the source of a class's constructors names, and those that theirs name."""
    seen: set[type[nn.Module]] = set()
    waiting: list[type[nn.Module]] = [model_class]
    while waiting:
        current = waiting.pop()
        for owner in current.__mro__:
            if not owner.__module__.startswith("sglang.srt.models") or owner in seen:
                continue
            seen.add(owner)
            waiting += _named_modules(owner)
    return seen


@cache  # finding the source of a class takes long, and most name the same
def _named_modules(owner: type[nn.Module]) -> list[type[nn.Module]]:
    """Module classes that the source of ``owner`` names."""
    names = dict.fromkeys(re.findall(r"\w+", inspect.getsource(owner)))
    values = (vars(sys.modules[owner.__module__]).get(name) for name in names)
    return [value for value in values if isinstance(value, type) and issubclass(value, nn.Module)]


def build(architecture: str, model_class: type[nn.Module]) -> nn.Module:
    """The model on the meta device. What its configuration lacks is filled in as its constructor asks for it."""
    config = configuration(architecture)
    filled = set()
    while True:
        try:
            # Some classes ask for the current device of torch's accelerator, which a CPU build of torch has not.
            with torch.device("meta"), mock.patch.object(torch, "get_device_module", return_value=torch.cpu):
                return model_class(config=config, quant_config=None)
        except AttributeError as error:
            owner, field = error.obj, error.name
            if not _is_config(owner) or field not in FIELDS or (id(owner), field) in filled:
                raise
            filled.add((id(owner), field))
            setattr(owner, field, copy.deepcopy(FIELDS[field]))


def _is_config(value: Any) -> bool:
    return "Config" in type(value).__name__


def _where(error: Exception) -> str:
    """The error, and the innermost line of SGLang that it came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/sglang/" in frame.filename]
    line = f"{frames[-1].filename.split('/sglang/')[-1]}:{frames[-1].lineno}: " if frames else ""
    text = " ".join(str(error).split())[:90].replace("|", "/")
    return f"`{line}{type(error).__name__}` {text}".strip()


def _is_exceptional(model: nn.Module, layers: list[DecoderLayer]) -> bool:
    """Whether a layer's tokens are mixed by something else than SGLang's attention modules."""
    sglang = ("RadixAttention", "RadixLinearAttention")
    for layer in layers:
        for name in layer.attention:
            modules = model.get_submodule(name).modules()
            if not any(base.__name__ in sglang for module in modules for base in type(module).__mro__):
                return True
    return False


def _describe(model: nn.Module, layers: list[DecoderLayer]) -> str:
    """Where the layers are, and the classes of their operators."""
    kinds: dict[str, str] = {}
    for layer in layers:
        place = layer.name.rsplit(".", 1)[0]
        attention, mlp = (
            " + ".join(type(model.get_submodule(name)).__name__ for name in names) or "none"
            for names in (layer.attention, layer.mlp)
        )
        kinds.setdefault(f"{attention}, {mlp}", place)
    places = dict.fromkeys(kinds.values())
    return "; ".join(f"`{place}`: " + " / ".join(kind for kind, at in kinds.items() if at == place) for place in places)


# ---- a forward pass without kernels -------------------------------------------------------------------------------


def _run(architecture: str, model: nn.Module, layers: list[DecoderLayer]) -> str:
    """Run the model with preemption checkpoints and tiles; what the table says about it."""
    if architecture in NO_FORWARD:
        return f"not run: {NO_FORWARD[architecture]}"
    names = [name for layer in layers for name in (*layer.attention, *layer.mlp)]
    passed: list[str] = []
    try:
        with _no_kernels(), torch.no_grad(), torch.device("meta"):
            _fill_latent_weights(model)
            tile_mlps(model, [name for layer in layers for name in layer.mlp], lambda: TILE_TOKENS, lambda: None)
            for name in names:
                install_checkpoints(model, [DecoderLayer(name, (name,), ())], "operator", partial(passed.append, name))
            _forward(model)
    except _EndOfLayers:
        pass
    except Exception as error:
        return f"not run: {_where(error)}"
    silent = [name for name in names if name not in passed]
    if silent:
        return f"runs, but never calls {', '.join(silent[:4])}"
    passes = len(passed) / len(names)
    return "runs" if passes == 1 else f"runs its layers {passes:g} times"


def _fill_latent_weights(model: nn.Module) -> None:
    """What latent attention computes from its weights once they are loaded."""
    for module in model.modules():
        if getattr(module, "w_kc", model) is None:
            module.w_kc = torch.empty(module.num_local_heads, module.qk_nope_head_dim, module.kv_lora_rank)
            module.w_vc = torch.empty(module.num_local_heads, module.kv_lora_rank, module.v_head_dim)


class _EndOfLayers(Exception):
    """The layers have run; what comes after them is not of interest."""


class _NoAttention:
    """What layers ask an attention backend for, besides attention."""

    prefill_attention_backend_str = None
    decode_attention_backend_str = None
    token_to_kv_pool = None


@contextlib.contextmanager
def _no_kernels() -> Iterator[None]:
    """Attention, experts and logits without kernels; shapes as the real ones have."""
    from sglang.srt.layers.logits_processor import LogitsProcessor
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.moe.topk import StandardTopKOutput, TopK
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context

    def attention(self: Any, q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return q.new_empty(q.shape[0], self.tp_q_head_num * self.v_head_dim)

    def linear_attention(self: Any, forward_batch: Any, mixed_qkv: torch.Tensor, *args: Any, **kw: Any) -> torch.Tensor:
        return mixed_qkv.new_empty(1, mixed_qkv.shape[0], self.num_v_heads, self.head_v_dim)

    def experts(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.empty_like(hidden_states)

    def top_k(self: Any, hidden_states: torch.Tensor, router_logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        weights = router_logits[:, : self.topk_config.top_k]
        return StandardTopKOutput(weights, weights.int(), router_logits)

    def logits(self: Any, *args: Any, **kwargs: Any) -> None:
        raise _EndOfLayers

    attend_to_latents()
    with (
        mock.patch.object(RadixAttention, "forward", attention),
        mock.patch.object(RadixLinearAttention, "forward", linear_attention),
        mock.patch.object(FusedMoE, "forward", experts),
        mock.patch.object(TopK, "forward", top_k),
        mock.patch.object(LogitsProcessor, "forward", logits),
        forward_context(ForwardContext(attn_backend=_NoAttention())),  # type: ignore[arg-type]
    ):
        yield


def _forward(model: nn.Module) -> None:
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
    from sglang.srt.runtime_context import get_model

    one = torch.ones(1, dtype=torch.int64)
    positions = torch.arange(TOKENS)
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND,
        batch_size=1,
        input_ids=positions,
        req_pool_indices=one,
        seq_lens=one * TOKENS,
        out_cache_loc=positions,
        seq_lens_sum=TOKENS,
        positions=positions,
        extend_num_tokens=TOKENS,
        extend_seq_lens=one * TOKENS,
        extend_prefix_lens=one * 0,
        extend_start_loc=one * 0,
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[TOKENS],
        capture_hidden_mode=CaptureHiddenMode.NULL,
        mm_inputs=[None],
    )
    if getattr(model, "is_mrope_enabled", False):
        positions = positions.expand(3, -1)
        batch.mrope_positions = positions
    with get_model().override(shared_experts=getattr(model, "shared_experts_config", None)):
        model.forward(batch.input_ids, positions, batch)


# ---- the published table ------------------------------------------------------------------------------------------

HEADER = """| model class | found by | layers: attention, MLP | forward pass |
| --- | --- | --- | --- |"""
BEGIN, END = "<!-- begin: python -m tests.model_registry -->", "<!-- end -->"


def table(outcomes: list[Outcome]) -> str:
    return "\n".join([HEADER, *(outcome.row() for outcome in outcomes)])


def published() -> str:
    """The table as docs/models.md has it."""
    return PUBLISHED.read_text().split(BEGIN)[1].split(END)[0].strip()


def publish(outcomes: list[Outcome]) -> None:
    text = PUBLISHED.read_text()
    PUBLISHED.write_text(text.split(BEGIN)[0] + f"{BEGIN}\n{table(outcomes)}\n{END}" + text.split(END)[1])


def main(arguments: list[str]) -> int:
    """Write docs/models.md; ``--check`` prints what differs from it instead, and names print their rows."""
    names = set(arguments) - {"--check"}
    found = walk(lambda architecture: not names or architecture in names)
    if names:
        print(table(found))
    elif "--check" in arguments:
        lines = list(difflib.unified_diff(published().splitlines(), table(found).splitlines(), lineterm="", n=0))
        print("\n".join(lines))
        return int(bool(lines))
    else:
        publish(found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
