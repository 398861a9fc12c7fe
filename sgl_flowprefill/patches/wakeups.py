"""Bootstrap and KV-transfer progress wake the hub.

Target: ``CommonKVManager.update_status`` (SGLang 0.5.23, disaggregation/common/conn.py), which every transfer backend's
threads call when a request's bootstrap completes and when its KV transfer ends or fails. Without this seam the hub
would have to poll for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sgl_flowprefill.patches.base import expect_parameters

TARGET = "sglang.srt.disaggregation.common.conn.CommonKVManager.update_status"


def install(notify: Callable[[], None], bootstrapped_s: dict[int, float]) -> None:
    """Call ``notify`` after each status change in this process, from whichever thread made it.

    ``bootstrapped_s`` receives, by bootstrap room, when the room's handshake was complete (``time.monotonic``).
    """
    from sglang.srt.disaggregation.base import KVPoll
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect_parameters("wakeups", TARGET, ("self", "bootstrap_room", "status"))

    def after(result: None, manager: Any, bootstrap_room: int, status: Any) -> None:
        if status == KVPoll.WaitingForInput:
            bootstrapped_s[bootstrap_room] = time.monotonic()
        notify()

    HookRegistry.register(TARGET, after, HookType.AFTER)
    HookRegistry.apply_hooks()
