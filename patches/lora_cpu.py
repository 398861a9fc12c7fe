"""Adapters (LoRA) on the portable CPU platform: host memory that is not pinned.

Targets: ``torch`` in ``sglang.srt.lora.layers`` and in ``sglang.srt.lora.backend.torch_backend``, which ask it for
pinned tensors, and ``Tensor.pin_memory``, which they call. PyTorch pins memory by an accelerator's driver: without this
seam a server with ``--enable-lora`` fails at start.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "lora_cpu"
LAYERS: Final = "sglang.srt.lora.layers.BaseLayerWithLoRA"
BACKEND: Final = "sglang.srt.lora.backend.torch_backend.TorchNativeLoRABackend"
MAKERS: Final = ("tensor", "zeros")
"""Functions of PyTorch that are asked for pinned tensors there."""


class Unpinned(ModuleType):
    """PyTorch, whose tensors on the host are not pinned."""

    def __init__(self) -> None:
        super().__init__(torch.__name__)
        for name in MAKERS:
            setattr(self, name, _unpinned(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def apply() -> None:
    """Take the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    expect(SEAM)
    unpinned = Unpinned()
    for target in (LAYERS, BACKEND):
        vars(sys.modules[resolve(SEAM, target).__module__])["torch"] = unpinned
    torch.Tensor.pin_memory = _itself


def _unpinned(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        return make(*args, **options | {"pin_memory": False})

    return made


def _itself(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
    return tensor
