"""NIXL's progress thread sleeps until the network has something for it.

Target: ``nixl._bindings.nixlAgent`` (nixl 1.5.1), constructed by ``nixl._api.nixl_agent`` with a progress thread whose
delay is 0: it then polls UCX without ever sleeping and takes a whole core of every prefill and decode server. With a
delay it blocks in ``poll`` on the armed event descriptors of its UCX workers, which wake it at once; the delay only
bounds that wait. Without this seam two spinning threads compete with the forward pass of a small CPU machine.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "nixl_sleep"
TARGET: Final = "nixl._bindings.nixlAgent"
PROGRESS_DELAY_US: Final = 100_000


def apply() -> None:
    """Register the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    agent_class: Any = resolve(SEAM, TARGET)

    class SleepingAgent(agent_class):
        def __init__(self, name: str, config: Any) -> None:
            config.pthrDelay = PROGRESS_DELAY_US
            super().__init__(name, config)

    HookRegistry.register(TARGET, SleepingAgent, HookType.REPLACE)
