"""A stream that a decode server hands back to its prefill server has the same objective there as before.

Target: ``Req.build_rebootstrap_payload`` (managers/schedule_batch.py), by which a decode server that was paused with
the mode "retract" and goes on asks the prefill server to compute the KV cache of a stream again. SGLang passes on some
of the sampling parameters, and ``custom_params`` are not among them, so the prefill would have the default objective.

The prefill server resolves what is passed on as it does what a client asks for, by its own SLO policy.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.slo import Objective

SEAM: Final = "handed_back"
TARGET: Final = "sglang.srt.managers.schedule_batch.Req.build_rebootstrap_payload"


def apply() -> None:
    """Register the seam in a process that may run a decode scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, keep_objective, HookType.AFTER)


def keep_objective(payload: dict[str, Any], req: Any) -> None:
    """Ask, in the body that SGLang has made for the prefill server, for what ``req`` was promised."""
    promised = Objective.resolved(req.sampling_params.custom_params)
    if promised is not None:
        payload["sampling_params"]["custom_params"] = promised.as_asked()
