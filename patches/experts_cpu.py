"""Statistics of experts on the portable CPU platform: a device that captures no graphs and caches no memory.

Target: ``torch`` in ``sglang.srt.eplb.expert_distribution``, which asks the module of the device whether a graph is being
captured while nothing is recorded, and has it free cached memory at the first dump. ``torch.cpu`` knows neither:
without this seam a server with ``--expert-distribution-recorder-mode`` fails at its first forward pass or its first
dump.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "experts_cpu"
RECORDER: Final = "sglang.srt.eplb.expert_distribution.ExpertDistributionRecorder"
HOST: Final = SimpleNamespace(is_current_stream_capturing=lambda: False, empty_cache=lambda: None)
"""What is asked of the module of a device."""


class OnHost(ModuleType):
    """PyTorch, whose device is the host."""

    def __init__(self) -> None:
        super().__init__(torch.__name__)

    def get_device_module(self) -> Any:
        return HOST

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def apply() -> None:
    """Take the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    expect(SEAM)
    vars(sys.modules[resolve(SEAM, RECORDER).__module__])["torch"] = OnHost()
