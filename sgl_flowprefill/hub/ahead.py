"""When the next decode step is queued behind the one in flight, so that the device goes from one to the other.

A device finds the tokens of a step where the step itself has put them: for the next one, the host has nothing to add
that it reads from the result. What it does about a result, and the preparation of the step after, then go by while the
device computes. As late as the host can: whatever arrives until then has not one more step to wait for.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from sgl_flowprefill.hub.task import DecodeStep, PrefillTask

LEADS: Final = 32
"""Steps by which the time is judged that queueing one takes the host, the last ones."""
LEAD_QUANTILE: Final = 0.9
"""Share of these that took no longer than what is planned with: one long turn lets no arrivals wait for many steps."""
LEAD_FACTOR: Final = 1.5
"""Multiple of that quantile that is planned with: a step that is queued too late costs more than an arrival that waits
for a bit of one."""


@dataclass(eq=False)
class StepAhead:
    """Says when to queue the next step, from what is seen of those before."""

    _leads_s: deque[float] = field(default_factory=lambda: deque(maxlen=LEADS), init=False)
    _begun_s: float = field(default=-math.inf, init=False)
    """When the step in flight began at the device, at the latest."""
    _step_s: float = field(default=0.0, init=False)
    """What the last step took, at least; 0 before the first."""

    @property
    def queue_at_s(self) -> float:
        """When to queue the step behind the one in flight. Where nothing is known of its time, at once."""
        if not self._leads_s:
            return -math.inf
        lead_s = sorted(self._leads_s)[int(LEAD_QUANTILE * len(self._leads_s))]
        return self._begun_s + self._step_s - LEAD_FACTOR * lead_s

    def queued(self, step: DecodeStep, looked_s: float, now_s: float) -> None:
        """``step`` has been queued, by a host that had begun to look at what has happened at ``looked_s``."""
        if step.is_ahead:
            self._leads_s.append(now_s - looked_s)
        self._begun_s = now_s

    def arrived(self, done: PrefillTask | DecodeStep, now_s: float) -> None:
        """The result of ``done`` is on the host: a step that is queued behind it has begun."""
        if isinstance(done, DecodeStep):
            self._step_s = done.least_s
        self._begun_s = max(self._begun_s, now_s)
