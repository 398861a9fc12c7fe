"""Models whose modules keep something of a forward pass from one operator to a later one, where no switch saves it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Final, NamedTuple

from torch import nn

from sgl_flowprefill.config import Granularity


class Kept(NamedTuple):
    """What modules of one class keep."""

    switch: str
    """Attribute of the module that says whether it does; empty: it always does."""
    what: str


KEPT: Final = {
    "GigaChat35AttentionMLA": Kept("gated_attention", "the input of its gated attention until the output matrix"),
    "KimiK3MLAAttention": Kept("use_output_gate", "the input of its attention's gate until the output matrix"),
    "Qwen4ExpPLELayer": Kept("", "the n-gram embeddings of a layer while the layer before runs"),
}
"""By the class' name: SGLang 0.5.23 has no others (tests/unit/test_module_state.py)."""
BACKEND: Final = "current_attention_backend"
"""Attribute in which attention modules of DeepSeek's kind keep which backend the last pass had, until they call it."""


def check_modules(model: nn.Module, granularity: Granularity, backends: Collection[str] = ()) -> None:
    """Raises SystemExit with one line for a ``model`` that would mix up forward passes that are suspended, which have
    these ``backends`` of attention.
    """
    if granularity == "chunk":
        return
    for module in model.modules():
        if len(set(backends)) > 1 and hasattr(module, BACKEND):
            raise SystemExit(
                f"sgl-flowprefill: {type(model).__name__} cannot have a --prefill-attention-backend and a "
                f"--decode-attention-backend that differ ({', '.join(backends)}): SGLang keeps in one place which of "
                "them runs; give one for both, --attention-backend"
            )
        kept = KEPT.get(type(module).__name__)
        if kept is not None and (not kept.switch or getattr(module, kept.switch, False)):
            raise SystemExit(
                f"sgl-flowprefill: {type(model).__name__} cannot be suspended within a prefill: SGLang keeps "
                f"{kept.what} in one place for all of them; serve it without FlowPrefill, or with "
                "--flowprefill-granularity chunk"
            )
