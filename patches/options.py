"""A server that prefills gets the options that FlowPrefill works with, and one that it cannot work with is refused.

Targets: ``sglang.srt.server_args.ServerArgs.resolve_once``, before which a record holds what the user
has asked for and may be changed, and ``sglang.srt.entrypoints.engine.Engine._launch_subprocesses``, where the options
arrive of HTTP servers, with Ray too, and of engines without one. Without the first, users would have to set these
options themselves; without the second, a server would be refused in its scheduler process (``runtime.scheduler``), as
one that is started elsewhere is (gRPC), or, with Ray, run without FlowPrefill.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from sgl_flowprefill.compat import incompatible_option, take_over
from sgl_flowprefill.patches.base import expect

logger = logging.getLogger(__name__)

RESOLVE: Final = "sglang.srt.server_args.ServerArgs.resolve_once"
LAUNCH: Final = "sglang.srt.entrypoints.engine.Engine._launch_subprocesses"


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("options")
    HookRegistry.register(RESOLVE, _take_over, HookType.BEFORE)
    HookRegistry.register(LAUNCH, _check, HookType.BEFORE)


def _take_over(server_args: Any) -> None:
    is_resolved = getattr(server_args, "_resolution_finished", False) or getattr(
        server_args, "_resolution_failed", False
    )
    if server_args.disaggregation_mode != "decode" and not is_resolved:
        for line in take_over(server_args):
            logger.info("FlowPrefill: %s", line)


def _check(_engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    if server_args.disaggregation_mode == "decode":  # only its HTTP server takes part
        return
    refusal = incompatible_option(resolving_view(server_args))
    if refusal is not None:
        print(f"sgl-flowprefill: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(2)
