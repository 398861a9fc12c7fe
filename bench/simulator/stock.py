"""SGLang's own scheduler of prefills: forwards filled in an order up to a budget of tokens, none ever interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Final

from sgl_flowprefill.bench.simulator.instance import Instance, KvCache, Machine
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.ttft import PrefillShape

MAX_PREFILL_TOKENS: Final = 16384
"""SGLang's --max-prefill-tokens: new tokens of an unchunked forward of several requests."""

SORTED_REQUESTS: Final = 128
"""SGLang's WAITING_QUEUE_PREFIX_MATCH_MAX: with more requests waiting, lpm and hrrn are first come first served."""

ORDERS: Final[dict[str, Callable[[SimRequest, int], tuple[float, ...]]]] = {
    "fcfs": lambda request, waited_tokens: (request.ready_s,),
    "lpm": lambda request, waited_tokens: (-request.shape.cached_tokens, request.ready_s),
    "spf": lambda request, waited_tokens: (request.shape.new_tokens, request.ready_s),
    "hrrn": lambda request, waited_tokens: (-waited_tokens / request.shape.new_tokens, request.ready_s),
    "priority": lambda request, waited_tokens: (round(request.deadline_s - request.arrival_s, 3), request.ready_s),
}
"""SGLang's fcfs, longest prefix match, shortest prefill first, highest response ratio next (by the tokens that were
computed while a request waited), and priority scheduling with the tighter SLO as the higher priority."""


@dataclass(slots=True)
class _Part:
    """A request that is being computed in chunks."""

    request: SimRequest
    done_tokens: int = 0


class StockInstance(Instance):
    """Without ``chunk_tokens``, whole prompts up to MAX_PREFILL_TOKENS together, and longer ones alone.

    With it, forwards of at most that many new tokens: the prompt that is under way first, then others by ``order``, the
    last of them cut. With shortest prefill first the prompt under way leaves room for shorter ones that wait
    (``SchedulePolicy.shortest_prefill_chunk_limit``), and no second one is cut beside it. KV is sent chunk by chunk.
    """

    def __init__(self, machine: Machine, order: str, chunk_tokens: int | None, kv: KvCache | None = None) -> None:
        self._cost = machine.cost
        self._slowdown = machine.slowdown
        self.kv = kv or KvCache(machine)
        self._order = order
        self._chunk_tokens = chunk_tokens
        self._computed_tokens = 0
        self._computed_at_arrival: dict[int, int] = {}
        self._waiting: list[tuple[tuple[float, ...], int, SimRequest]] = []
        self._part: _Part | None = None
        self._finishing: list[SimRequest] = []
        self._busy = False
        self.next_s = math.inf
        self.completed: list[SimRequest] = []

    def submit(self, request: SimRequest, now_s: float) -> None:
        if not self.kv.can_hold(request):
            self.completed.append(request)
            return
        self._enqueue(request)
        if not self._busy:
            self._forward(now_s)

    def _enqueue(self, request: SimRequest) -> None:
        self._computed_at_arrival[request.index] = self._computed_tokens
        heappush(self._waiting, (self._key(request), request.index, request))

    def step(self) -> None:
        now_s = self.next_s
        self.kv.release(now_s)
        if self._finishing:
            self.kv.transfer(self._finishing, now_s)
            self.completed.extend(self._finishing)
            self._finishing = []
        if self._part is not None:
            self._send(self._part, now_s)
        self._forward(now_s)

    def _forward(self, now_s: float) -> None:
        shapes = self._next_batch(now_s)
        self._busy = bool(shapes)
        if shapes:
            self.next_s = self._slowdown.end_s(now_s, self._cost.predict_s(shapes))
        else:
            self.next_s = self.kv.next_release_s if self._waiting else math.inf

    def _key(self, request: SimRequest) -> tuple[float, ...]:
        by = "fcfs" if self._order in ("lpm", "hrrn") and len(self._waiting) > SORTED_REQUESTS else self._order
        return ORDERS[by](request, self._computed_tokens - self._computed_at_arrival[request.index])

    def _next_batch(self, now_s: float, other_tokens: int = 0) -> list[PrefillShape]:
        """What the next forward computes, beside ``other_tokens`` that are in it anyway."""
        if self._order in ("lpm", "hrrn"):
            self._waiting = [(self._key(request), index, request) for _, index, request in self._waiting]
            heapify(self._waiting)
        shapes: list[PrefillShape] = []
        budget = (self._chunk_tokens or MAX_PREFILL_TOKENS) - other_tokens
        if self._part is not None and budget > 0:
            budget -= self._add(self._part, budget - self._room_for_shorter(self._part, budget), shapes)
        while self._waiting and budget > 0:
            request = self._waiting[0][2]
            if self._must_wait(request, budget, alone=not shapes):
                break
            if not self.kv.fitting([request]):
                break
            heappop(self._waiting)
            del self._computed_at_arrival[request.index]
            self.kv.take([request])
            part = _Part(request)
            self._send(part, now_s)
            most = budget if self._chunk_tokens else request.shape.new_tokens
            budget -= self._add(part, most, shapes)
        return shapes

    def _must_wait(self, request: SimRequest, budget: int, alone: bool) -> bool:
        """Whether ``request`` stays out of this forward: longer than what is left of it, and not to be cut."""
        if self._chunk_tokens is None:
            return not alone and request.shape.new_tokens >= budget
        return self._order == "spf" and self._part is not None and request.shape.new_tokens > budget

    def _send(self, part: _Part, now_s: float) -> None:
        """Send the KV that there is: the cached prefix when a prompt starts, then each chunk when it has ended."""
        request = part.request
        self.kv.send(request, request.shape.cached_tokens + part.done_tokens - request.sent_tokens, now_s)

    def _room_for_shorter(self, part: _Part, budget: int) -> int:
        """Tokens of the forward that the prompt under way leaves to shorter ones."""
        room = 0
        if self._order == "spf":
            left = part.request.shape.new_tokens - part.done_tokens
            for _, _, request in sorted(self._waiting):
                tokens = request.shape.new_tokens
                if tokens >= left or room + tokens >= budget:
                    break
                room += tokens
        return room

    def _add(self, part: _Part, most_tokens: int, shapes: list[PrefillShape]) -> int:
        """Compute up to ``most_tokens`` more of ``part`` in this forward. Returns how many."""
        new_tokens, cached_tokens = part.request.shape
        tokens = min(most_tokens, new_tokens - part.done_tokens)
        shapes.append(PrefillShape(tokens, cached_tokens + part.done_tokens))
        part.done_tokens += tokens
        self._computed_tokens += tokens
        if part.done_tokens == new_tokens:
            self._finishing.append(part.request)
            if self._part is part:
                self._part = None
        else:
            self._part = part
        return tokens
