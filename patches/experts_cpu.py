"""Experts on the portable CPU platform: a device that captures no graphs and caches no memory, and ranks that each have
some of the experts.

Targets: ``torch`` in the modules of ``sglang.srt.eplb`` that ask PyTorch's module of the device whether a graph is
being captured, and have it free cached memory; that of the CPU knows neither. And ``moe_forward_native``
(layers/moe/fused_moe_native.py), SGLang's experts in PyTorch, which takes the -1 that stands for an expert of another
rank for an expert. Without this seam a server with ``--expert-distribution-recorder-mode`` fails at its first forward
pass or dump, and one with ``--ep-size`` above 1 at its first forward pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import expect, resolve
from sgl_flowprefill.patches.torch_on_host import replace_in_modules

SEAM: Final = "experts_cpu"
ASK_FOR_DEVICE: Final = (
    "sglang.srt.eplb.expert_distribution.ExpertDistributionRecorder",
    "sglang.srt.eplb.eplb_manager.EPLBManager",
    "sglang.srt.eplb.expert_location_updater.ExpertLocationUpdater",
)
"""In the modules that ask for the device's."""
FORWARD: Final = "sglang.srt.layers.moe.fused_moe_native.moe_forward_native"
HOST: Final = SimpleNamespace(
    is_current_stream_capturing=lambda: False, empty_cache=lambda: None, synchronize=lambda: None
)
"""What is asked of the module of a device."""


def apply() -> None:
    """Take the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    expect(SEAM)
    replace_in_modules(SEAM, ASK_FOR_DEVICE, {"get_device_module": lambda: HOST})
    forward = resolve(SEAM, FORWARD)
    setattr(sys.modules[forward.__module__], forward.__name__, of_this_rank(forward))


def of_this_rank(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` with the experts that this rank has: what they add for each token."""

    def moe_forward_native(layer: Any, x: torch.Tensor, topk_output: Any, moe_runner_config: Any) -> torch.Tensor:
        if layer.moe_ep_size == 1:
            return forward(layer, x, topk_output, moe_runner_config)
        tokens, choices = (topk_output.topk_ids >= 0).nonzero(as_tuple=True)
        total = torch.zeros_like(x)
        if len(tokens) == 0:
            return total
        # A row for each token and expert, instead of one for each token with several.
        own = topk_output._replace(
            topk_ids=topk_output.topk_ids[tokens, choices, None],
            topk_weights=topk_output.topk_weights[tokens, choices, None],
        )
        return total.index_add_(0, tokens, forward(layer, x[tokens], own, moe_runner_config))

    return moe_forward_native
