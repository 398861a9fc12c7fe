"""Tensor parallelism on the portable CPU platform splits a model as on a GPU: KV heads fewer than ranks are replicated.

Target: ``adjust_config_with_unaligned_cpu_tp``, which the model runner calls for device "cpu" before it
loads the model. For SGLang's own CPU engine it pads heads and intermediate sizes up to a multiple of the ranks, and the
weight loaders of that engine alone (``SGLANG_USE_CPU_ENGINE=1``) know how to fill the padding. Without this seam a
model with fewer KV heads than ranks, or with an intermediate size that is no multiple of 32 times the ranks, does not
load.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "cpu_tp"
TARGET: Final = "sglang.srt.model_executor.model_runner.adjust_config_with_unaligned_cpu_tp"


def apply() -> None:
    """Register the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, _keep, HookType.REPLACE)


def _keep(model_config: Any, load_config: Any, tp_size: int) -> Any:
    return model_config
