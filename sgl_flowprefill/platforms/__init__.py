"""SGLang platform plugin: the portable CPU platform, chosen where there is no accelerator or when asked for."""

from __future__ import annotations

import os
from typing import Final

PLATFORM_NAME: Final = "flowprefill_cpu"
"""Entry point name of the portable CPU platform, which is what ``SGLANG_PLATFORM`` selects it by."""
ATTENTION_BACKEND: Final = "flowprefill_cpu"
"""What ``--attention-backend`` selects the platform's attention by."""

_PLATFORM_CLASS: Final = "sgl_flowprefill.platforms.cpu:PortableCpuPlatform"


def activate() -> str | None:
    """Qualified name of the platform class, or None to leave the choice to SGLang.

    Called by ``sglang.srt.platforms`` once per process: with ``SGLANG_PLATFORM=flowprefill_cpu`` this platform is
    asked for by name; without it, it serves machines that have no accelerator. ``SGLANG_USE_CPU_ENGINE=1`` asks for
    SGLang's own CPU engine and wins.
    """
    if os.environ.get("SGLANG_PLATFORM") == PLATFORM_NAME:
        return _PLATFORM_CLASS
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or _has_accelerator():
        return None
    return _PLATFORM_CLASS


def is_active() -> bool:
    """Whether this process runs on the portable CPU platform."""
    return activate() is not None


def _has_accelerator() -> bool:
    """Whether SGLang would find a device of its own (the probes of ``sglang.srt.platforms._resolve_platform``)."""
    from sglang.srt import platforms

    probes = (
        platforms._is_cuda_available,
        platforms._is_rocm_available,
        platforms._is_npu_available,
        platforms._is_xpu_available,
        platforms._is_musa_available,
        platforms._is_mps_available,
    )
    return any(probe() for probe in probes)
