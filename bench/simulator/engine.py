"""The event loop: requests in order of arrival, instances in order of what they do next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from heapq import heappop, heappush

from sgl_flowprefill.bench.simulator.instance import Instance
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.router import Router


def simulate(requests: Sequence[SimRequest], instances: Sequence[Instance], router: Router) -> None:
    """Run until every request is done; fills in their ``first_token_s``.

    ``requests`` are in order of ``ready_s``. A request whose KV fits no instance keeps an infinite ``first_token_s``.
    """
    due: list[tuple[float, int]] = []
    for request in requests:
        now_s = request.ready_s
        while due and due[0][0] <= now_s:
            _step(due, instances, router)
        chosen = router.choose(request)
        instance = instances[chosen]
        before_s = instance.next_s
        instance.submit(request, now_s)
        if instance.next_s != before_s:
            heappush(due, (instance.next_s, chosen))
    while due:
        _step(due, instances, router)


def _step(due: list[tuple[float, int]], instances: Sequence[Instance], router: Router) -> None:
    """Let the instance whose turn it is act, if the entry is still true."""
    when_s, number = heappop(due)
    instance = instances[number]
    if instance.next_s != when_s:
        return
    instance.step()
    for request in instance.completed:
        router.completed(request, number)
    instance.completed.clear()
    if instance.next_s < math.inf:
        heappush(due, (instance.next_s, number))
