"""A server that FlowPrefill cannot work with is refused before it starts, with one line.

Target: ``sglang.srt.entrypoints.engine.Engine._launch_subprocesses`` (SGLang 0.5.23), where the options arrive of HTTP
servers, with Ray too, and of engines without one. Without this seam such a server would be refused in its scheduler
process (``runtime.setup``), as one that is started elsewhere is (gRPC), or, with Ray, run without FlowPrefill.
"""

from __future__ import annotations

import sys
from typing import Any, Final

from sgl_flowprefill.compat import incompatible_option
from sgl_flowprefill.patches.base import expect_parameters

LAUNCH: Final = "sglang.srt.entrypoints.engine.Engine._launch_subprocesses"


def apply() -> None:
    """Register the hook. Raises SeamError when the target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect_parameters("options", LAUNCH, ("server_args",))
    HookRegistry.register(LAUNCH, _check, HookType.BEFORE)


def _check(_engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    if server_args.disaggregation_mode == "decode":  # only its HTTP server takes part
        return
    refusal = incompatible_option(resolving_view(server_args))
    if refusal is not None:
        print(f"sgl-flowprefill: {refusal}", file=sys.stderr, flush=True)
        raise SystemExit(2)
