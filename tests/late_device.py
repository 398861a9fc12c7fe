"""A device whose work is over later than it was queued, with the CPU's results."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sgl_flowprefill.hub.device import QueueDevice


class LateDevice(QueueDevice):
    """Passes its events in their order, each some looks after it was recorded: ``1 / pass_probability`` on average."""

    def __init__(self, lookahead: int, seed: int, pass_probability: float = 0.3) -> None:
        super().__init__(lookahead)
        self.rng = random.Random(seed)
        self.pass_probability = pass_probability
        self.recorded = self.passed = 0
        self.deepest = 0
        self.early_wakes = 0
        self.is_beside = False
        """Whether what runs now is beside the queue."""

    def record(self) -> None:
        super().record()
        self.deepest = max(self.deepest, len(self._queued))

    def catch_up(self, interrupted: Any) -> bool:
        caught_up = super().catch_up(interrupted)
        self.early_wakes += not caught_up
        return caught_up

    def fetch(self, batch: Any, result: Any) -> None:
        assert result.copy_done is None
        result.copy_done = self._new_event()
        result.copy_to_cpu(return_logprob=batch.return_logprob, return_hidden_states=batch.return_hidden_states)
        self.record()

    def stamp(self) -> LateStamp:
        event = self._new_event()
        event.record()
        return LateStamp(event, time.monotonic())

    @contextmanager
    def beside_the_queue(self) -> Iterator[None]:
        self.is_beside = True
        yield
        self.is_beside = False

    def _new_event(self) -> LateEvent:
        return LateEvent(self)

    def _pause(self) -> None:
        pass


@dataclass(frozen=True)
class LateStamp:
    """An event at a time of the host's."""

    event: LateEvent
    time_s: float

    def query(self) -> bool:
        return self.event.query()

    def seconds_until(self, later: LateStamp) -> float:
        return later.time_s - self.time_s


class LateEvent:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self.place = 0

    def record(self) -> None:
        self._device.recorded += 1
        self.place = self._device.recorded

    def query(self) -> bool:
        device = self._device
        if device.passed < device.recorded and device.rng.random() < device.pass_probability:
            device.passed += 1
        return self.place <= device.passed

    def synchronize(self) -> None:
        self._device.passed = max(self._device.passed, self.place)
