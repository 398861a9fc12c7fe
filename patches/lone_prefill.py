"""A prefill server that no decode server is paired with starts without a library for KV transfers.

Its requests carry SGLang's fake bootstrap host, for which SGLang makes senders that send nothing; but a prefill server
makes the transfer library's manager all the same, and refuses "fake" on its command line.

Target: ``Scheduler.init_disaggregation`` (SGLang 0.5.23), which reads the transfer backend and makes the manager.
"""

from __future__ import annotations

import os
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "lone_prefill"
ENV_SWITCH: Final = "FLOWPREFILL_LONE"
TARGET: Final = "sglang.srt.managers.scheduler.Scheduler.init_disaggregation"
FAKE: Final = "fake"
FAKE_BOOTSTRAP_HOST: Final = "2.2.2.2"
"""SGLang's (``sglang.srt.disaggregation.utils``): what clients of such a server put into their requests."""


def is_enabled() -> bool:
    """Whether the environment says that no decode server comes."""
    return os.environ.get(ENV_SWITCH, "0") == "1"


def apply() -> None:
    """Register the seam in a process that may run a scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, transfer_nothing, HookType.BEFORE)


def transfer_nothing(*_args: Any, **_kwargs: Any) -> None:
    """From now on, this process's schedulers are made with SGLang's fake transfer backend."""
    from sglang.srt.runtime_context import get_disagg

    get_disagg()._set("disaggregation_transfer_backend", FAKE)
