"""What a prefill instance is to the simulator, and its KV cache."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.requests import SimRequest


class Instance(Protocol):
    """A prefill server. The engine calls ``submit`` when a request can start, and ``step`` at ``next_s``."""

    next_s: float
    """When it does something by itself next; infinite when it waits for requests."""
    completed: list[SimRequest]
    """Requests whose prefill has ended since the engine emptied this list."""

    def submit(self, request: SimRequest, now_s: float) -> None:
        """``request`` can be started from now on."""

    def step(self) -> None:
        """Do what is due at ``next_s``."""


@dataclass(frozen=True)
class Slowdown:
    """From ``from_s`` on, what a machine computes takes ``factor`` times as long: less for one that becomes faster."""

    factor: float = 1.0
    from_s: float = math.inf

    def factor_at(self, now_s: float) -> float:
        """How many times as long as at first it takes what is computed at ``now_s``."""
        return self.factor if now_s >= self.from_s else 1.0

    def work_s(self, now_s: float) -> float:
        """How much would be computed by ``now_s`` on a machine that computes all the time; as fast as at first, a
        second's work is done in a second.
        """
        return now_s if now_s <= self.from_s else self.from_s + (now_s - self.from_s) / self.factor

    def end_s(self, begin_s: float, work_s: float) -> float:
        """When ``work_s`` seconds' work that is begun at ``begin_s`` ends."""
        end_s = self.work_s(begin_s) + work_s
        return end_s if end_s <= self.from_s else self.from_s + (end_s - self.from_s) * self.factor


STEADY: Final = Slowdown()


@dataclass(frozen=True)
class Machine:
    """An instance's hardware: its times, its KV cache, and the link to the decode instance."""

    cost: CostModel
    kv_tokens: int
    link_bytes_per_s: float = math.inf
    """KV transfers of an instance follow one another over a link of this bandwidth."""
    slowdown: Slowdown = STEADY


class KvCache:
    """KV cache and link of a prefill instance: a request holds its prompt's KV until it has been transferred."""

    def __init__(self, machine: Machine) -> None:
        self._free_tokens = self.total_tokens = machine.kv_tokens
        self._transfer_s_per_token = machine.cost.kv_bytes_per_token / machine.link_bytes_per_s
        self._link_free_s = 0.0
        self._transfers: deque[tuple[float, int]] = deque()

    def can_hold(self, request: SimRequest) -> bool:
        """Whether ``request`` fits an empty cache."""
        return sum(request.shape) <= self.total_tokens

    def fitting(self, requests: Sequence[SimRequest]) -> int:
        """How many of ``requests``, from the first on, fit together."""
        left = self._free_tokens
        for count, request in enumerate(requests):
            left -= sum(request.shape)
            if left < 0:
                return count
        return len(requests)

    def take(self, requests: Sequence[SimRequest]) -> None:
        """Allocate for ``requests``."""
        self._free_tokens -= sum(sum(request.shape) for request in requests)
        assert self._free_tokens >= 0, "a batch is started only when it fits"

    def send(self, request: SimRequest, tokens: int, now_s: float) -> None:
        """Send the KV of the next ``tokens`` of ``request``, after everything that is being sent."""
        self._link_free_s = max(self._link_free_s, now_s) + tokens * self._transfer_s_per_token
        request.sent_tokens += tokens

    def transfer(self, requests: Sequence[SimRequest], now_s: float) -> None:
        """Send the rest of the KV of ``requests``, whose prefill has ended. Once it is sent, the first token appears
        and the KV is free.
        """
        for request in requests:
            tokens = sum(request.shape)
            self.send(request, tokens - request.sent_tokens, now_s)
            request.first_token_s = self._link_free_s
            self._transfers.append((self._link_free_s, tokens))
        self.release(now_s)

    def release(self, now_s: float) -> bool:
        """Free the KV of transfers that have ended. Whether there was any."""
        freed = False
        while self._transfers and self._transfers[0][0] <= now_s:
            self._free_tokens += self._transfers.popleft()[1]
            freed = True
        return freed

    @property
    def next_release_s(self) -> float:
        """When the next transfer ends; infinite if there is none."""
        return self._transfers[0][0] if self._transfers else math.inf
