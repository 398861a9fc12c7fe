"""A server gets the options that FlowPrefill works with, and one that prefills and cannot work with it is refused.

Targets: ``sglang.srt.server_args.ServerArgs.resolve_once``, before which a record holds what the user has asked for
and may be changed, so that what SGLang derives from it is as if the user had given the right options; and
``sglang.srt.entrypoints.engine.Engine._launch_subprocesses``, where the options arrive of HTTP servers, with Ray too,
and of engines without one. Without the first, users would have to set these options themselves; without the second, a
server would be refused in its scheduler process (``runtime.scheduler``), as one that is started elsewhere is (gRPC),
or, with Ray, run without FlowPrefill.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, Final, NoReturn

from sgl_flowprefill.compat import incompatible_option, refusals, risks, take_over, take_over_decode_server
from sgl_flowprefill.patches.base import expect

logger = logging.getLogger(__name__)

RESOLVE: Final = "sglang.srt.server_args.ServerArgs.resolve_once"
LAUNCH: Final = "sglang.srt.entrypoints.engine.Engine._launch_subprocesses"


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect("options")
    HookRegistry.register(RESOLVE, resolve, HookType.AROUND)
    HookRegistry.register(LAUNCH, _check, HookType.BEFORE)


def resolve(original: Callable[[Any], None], server_args: Any) -> None:
    """The hook: options of a server become those that FlowPrefill needs, before SGLang resolves them.

    Where SGLang refuses them then and an option is there that FlowPrefill refuses as well, the process ends with
    FlowPrefill's reason: SGLang's may be what FlowPrefill has set.
    """
    is_resolved = getattr(server_args, "_resolution_finished", False) or getattr(
        server_args, "_resolution_failed", False
    )
    if is_resolved:
        original(server_args)
        return
    only_decodes = server_args.disaggregation_mode == "decode"
    refusal = None if only_decodes else next(refusals(server_args), None)
    for risk in risks(server_args):
        logger.warning("FlowPrefill: %s", risk)
    for change in take_over_decode_server(server_args) if only_decodes else take_over(server_args):
        logger.log(logging.WARNING if change.asked else logging.INFO, "FlowPrefill: %s", change)
    try:
        original(server_args)
    except Exception:
        if refusal is None:
            raise
        _end(refusal.sentence)


def _check(_engine: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    from sglang.srt.arg_groups.overrides import resolving_view

    if server_args.disaggregation_mode == "decode":  # only its HTTP server takes part
        return
    server_args.resolve_once()  # an engine in Python comes here with what its user has given
    refusal = incompatible_option(resolving_view(server_args))
    if refusal is not None:
        _end(refusal)


def _end(sentence: str) -> NoReturn:
    print(f"sgl-flowprefill: {sentence}", file=sys.stderr, flush=True)
    raise SystemExit(2)
