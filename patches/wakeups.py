"""Bootstrap and KV-transfer progress is announced, so that a scheduler can sleep instead of polling for it.

Target: ``CommonKVManager.update_status`` (disaggregation/common/conn.py), which every transfer backend's
threads call when a request's bootstrap completes and when its KV transfer ends or fails. Without this seam a scheduler
that sleeps would notice both only when a timer ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.patches.base import SeamError, expect, resolve

logger = logging.getLogger(__name__)

TARGET: Final = "sglang.srt.disaggregation.common.conn.CommonKVManager.update_status"

Listener = Callable[[int, Any], None]
"""Gets a bootstrap room and the ``KVPoll`` status that was reported for it, on the thread that reported it."""

listeners: list[Listener] = []
"""Listeners of this process; ``subscribe`` adds one."""


def apply() -> None:
    """Register the hook. Raises SeamError when the target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("wakeups")
    HookRegistry.register(TARGET, announce, HookType.AFTER)


def subscribe(listener: Listener) -> None:
    """Call ``listener`` after each status change in this process."""
    listeners.append(listener)


def expect_applied() -> None:
    """Raise SeamError if the hook is not in place: SGLang only logs hooks that it could not apply."""
    if not hasattr(resolve("wakeups", TARGET), "__wrapped__"):
        raise SeamError(f"wakeups: {TARGET} is not hooked; SGLang's log says why its hook registry did not do it.")


def announce(_result: None, _manager: Any, bootstrap_room: int, status: Any) -> None:
    """The hook: tell all listeners."""
    for listener in listeners:
        try:
            listener(bootstrap_room, status)
        except Exception:  # SGLang's thread serves all requests, and would end
            logger.exception(
                "FlowPrefill: a listener has failed for bootstrap room %s, status %s", bootstrap_room, status
            )
