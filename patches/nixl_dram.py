"""KV memory on the portable CPU platform is host memory for NIXL.

Target: ``NixlKVManager.register_buffer_to_engine`` (disaggregation/nixl/conn.py), the first user of the
NIXL agent that SGLang just made. SGLang names KV and state memory "VRAM" in many places, which UCX refuses for host
memory; the agent (nixl 1.5.1) translates all these names through one table of its own. Without this seam a
prefill or decode server on the CPU fails at start.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "nixl_dram"
TARGET: Final = "sglang.srt.disaggregation.nixl.conn.NixlKVManager.register_buffer_to_engine"


def apply() -> None:
    """Register the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, name_host_memory, HookType.BEFORE)


def name_host_memory(manager: Any) -> None:
    """The hook: what NIXL takes for device memory is host memory."""
    kinds = manager.agent.nixl_mems
    kinds["VRAM"] = kinds["DRAM"]
