"""Which prefill instance takes a request."""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from sgl_flowprefill.bench.simulator.requests import SimRequest


class Router(Protocol):
    """Chooses an instance for each request and hears when its prefill has ended."""

    def choose(self, request: SimRequest) -> int:
        """Number of the instance that takes ``request``."""

    def completed(self, request: SimRequest, instance: int) -> None:
        """The prefill of ``request`` on ``instance`` has ended."""


class RoundRobin(Router):
    """One after the other, as the gateway's default and the paper's proxy do."""

    def __init__(self, instances: int) -> None:
        self._instances = instances
        self._next = 0

    def choose(self, request: SimRequest) -> int:
        chosen = self._next
        self._next = (chosen + 1) % self._instances
        return chosen

    def completed(self, request: SimRequest, instance: int) -> None:
        pass


class LeastWork(Router):
    """The instance whose unfinished requests have the least predicted time in all."""

    def __init__(self, instances: int) -> None:
        self._work_s = np.zeros(instances)

    def choose(self, request: SimRequest) -> int:
        chosen = int(self._work_s.argmin())
        self._work_s[chosen] += request.predicted_s
        return chosen

    def completed(self, request: SimRequest, instance: int) -> None:
        self._work_s[instance] -= request.predicted_s


ROUTERS: Final[dict[str, type[RoundRobin] | type[LeastWork]]] = {"round-robin": RoundRobin, "least-work": LeastWork}
