"""A decode server gives running slots and KV cache to the request whose first token is due next, not to the oldest.

Target: ``DecodePreallocQueue.pop_preallocated`` (disaggregation/decode.py), which gives them to the
requests in its ``queue``, in that order, until one does not fit. A prefill may start only once its request has them, so
without this seam an urgent request waits there behind those that the prefill server puts off. SGLang's own priority
scheduling sorts the queue again, and leaves this order within a priority.

The ranks of a decode server agree about a request by its position in the queue, so all need the same order. Its times
are those of the HTTP server on all of them (``request_times``), and those that are alike stay as they came to the
queue, which is where the broadcast of requests put them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.policy.places import DueTimes, PlaceOrder

if TYPE_CHECKING:
    from sgl_flowprefill.slo.resolve import Resolver

SEAM: Final = "decode_order"
TARGET: Final = "sglang.srt.disaggregation.decode.DecodePreallocQueue.pop_preallocated"


def apply(config: FlowPrefillConfig) -> None:
    """Register the seam in a process that may run a decode scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    queue_order = QueueOrder(config)

    def pop(original: Callable[..., Any], queue: Any, *args: Any, **kwargs: Any) -> Any:
        queue.queue = queue_order.sorted(queue.queue)
        given, failed = original(queue, *args, **kwargs)
        queue_order.note(given, failed, queue.queue)
        return given, failed

    HookRegistry.register(TARGET, pop, HookType.AROUND)


class QueueOrder:
    """Keeps the order of running slots in step with SGLang's queue.

    Between two steps of a decode server, SGLang appends to the list that the last one left. That is seen by the list
    and by the first and the last request that it had, so a step looks only at what is new. Had SGLang done anything
    else with it, all of it is looked at.
    """

    def __init__(self, config: FlowPrefillConfig) -> None:
        self._config = config
        self._order: PlaceOrder[Any] = PlaceOrder(config.max_starvation_s)
        self._left: list[Any] = []
        """SGLang's list, and the first and the last request in it, as the last step left them."""
        self._ends: list[Any] = []
        self._known = 0
        """How many requests the last step left there."""

    def sorted(self, queue: list[Any]) -> list[Any]:
        """SGLang's ``queue`` in the order in which its requests are to get running slots."""
        known = self._known
        if not self._is_continued(queue):
            present = set(map(id, queue))
            for request in self._order.in_order():
                if id(request) not in present:
                    self._order.remove(request)
            known = 0
        for request in queue[known:]:
            if request not in self._order:
                self._order.add(request, self._due_times(request))
        return self._order.in_order()

    def note(self, given: list[Any], failed: list[Any], left: list[Any]) -> None:
        """Note what became of the requests last sorted: ``given`` have running slots, ``left`` wait."""
        for request in given:
            self._order.give_place(request)
        for request in failed:
            self._order.remove(request)
        self._left, self._ends, self._known = left, [*left[:1], *left[-1:]], len(left)

    def _is_continued(self, queue: list[Any]) -> bool:
        known = self._known
        if queue is not self._left or len(queue) < known or len(self._order) != known:
            return False
        return known == 0 or (queue[0] is self._ends[0] and queue[known - 1] is self._ends[1])

    @cached_property
    def _resolver(self) -> Resolver:
        from sgl_flowprefill.deadline import resolver

        return resolver(self._config)

    def _due_times(self, decode_req: Any) -> DueTimes:
        """Without a time from the HTTP server, requests count as late and keep SGLang's order."""
        from sgl_flowprefill.deadline import objective, received_by_http_s

        arrival_s = received_by_http_s(decode_req.req)
        if not arrival_s:
            return DueTimes(0.0, 0.0)
        return DueTimes(arrival_s, arrival_s + objective(decode_req.req, self._resolver).ttft_s)
