"""A decode server gives places and KV cache to the request whose first token is due next, not to the oldest.

Target: ``DecodePreallocQueue.pop_preallocated`` (SGLang 0.5.23, disaggregation/decode.py), which gives them to the
requests in its ``queue``, in that order, until one does not fit. A prefill may start only once its request has them, so
without this seam an urgent request waits there behind those that the prefill server puts off. SGLang's own priority
scheduling sorts the queue again, and leaves this order within a priority.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.patches.base import expect_parameters, expect_source
from sgl_flowprefill.policy.places import DueTimes, PlaceOrder

SEAM: Final = "decode_order"
TARGET: Final = "sglang.srt.disaggregation.decode.DecodePreallocQueue.pop_preallocated"
KEPT_IN: Final = "flowprefill_due_times"
"""Attribute of SGLang's ``DecodeRequest``."""


def apply(config: FlowPrefillConfig) -> None:
    """Register the seam in a process that may run a decode scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect_parameters(SEAM, TARGET, ("self",))
    expect_source(SEAM, TARGET, "self._resolve_pending_reqs()", "for i, decode_req in enumerate(self.queue):")

    order: PlaceOrder[Any] = PlaceOrder(
        lambda decode_req: _due_times(decode_req, config.default_ttft_slo), config.max_starvation_s
    )

    def pop(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
        queue.queue = order.order(queue.queue)
        preallocated, failed = original(queue, *args, **kwargs)
        order.given(preallocated)
        return preallocated, failed

    HookRegistry.register(TARGET, pop, HookType.AROUND)


def _due_times(decode_req: Any, default_slo_s: float) -> DueTimes:
    """Found out once; every step of the decode server asks for them again."""
    if not hasattr(decode_req, KEPT_IN):
        from sgl_flowprefill.runtime.deadline import slo_s

        # Without a time from the HTTP server (0), requests count as late and keep SGLang's order.
        arrival_s = float(decode_req.req.time_stats.created_time)
        setattr(decode_req, KEPT_IN, DueTimes(arrival_s, arrival_s + slo_s(decode_req.req, default_slo_s)))
    due_times: DueTimes = getattr(decode_req, KEPT_IN)
    return due_times
