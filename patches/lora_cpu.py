"""Adapters (LoRA) on the portable CPU platform: host memory that is not pinned.

Targets: ``torch`` in ``sglang.srt.lora.layers`` and in ``sglang.srt.lora.backend.torch_backend``, which ask it for
pinned tensors, and ``Tensor.pin_memory``, which they call. PyTorch pins memory by an accelerator's driver: without this
seam a server with ``--enable-lora`` fails at start.
"""

from __future__ import annotations

from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.patches.torch_on_host import UNPINNED, replace_in_modules

SEAM: Final = "lora_cpu"
LAYERS: Final = "sglang.srt.lora.layers.BaseLayerWithLoRA"
BACKEND: Final = "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend"


def apply() -> None:
    """Take the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    expect(SEAM)
    replace_in_modules(SEAM, (LAYERS, BACKEND), UNPINNED)
    torch.Tensor.pin_memory = _itself


def _itself(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor
