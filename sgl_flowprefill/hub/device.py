"""How far the CPU runs ahead of the device, and how it waits without missing what happens meanwhile.

A GPU runs its operators after they were queued, so a preemption checkpoint that is passed says nothing about what has
run. Two things follow. A preemption waits for everything that was queued before it: the CPU may run ahead of the
device, but only so far that the device always finds its next operator in the queue. And a forward pass returns before
its sampled token exists: the next task starts while the token is on its way.

All kernels of all tasks are queued on one stream, the one that is current in the scheduler's loop. That is what makes
it safe to suspend a forward pass with its tensors: the caching allocator hands memory that Python has freed to later
kernels of the same stream, which run after those that still read it. What reads back a result that has arrived does it
beside that stream.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final, Protocol, Self

POLL_S: Final = 50e-6
"""Pause between two looks at an unfinished event. An operator takes longer, and ``lookahead`` of them are queued behind
the one that is waited for, so that the device has work for longer than the pause keeps the CPU."""


class Event(Protocol):
    """A place in the device's queue (``torch.cuda.Event``)."""

    def query(self) -> bool:
        """Whether the device has passed it."""


class Stamp(Event, Protocol):
    """A place in the device's queue that has a time."""

    def seconds_until(self, later: Self) -> float:
        """Device time between this place and a later one; the device must have passed both."""


def never() -> bool:
    """What interrupts a wait that nothing may interrupt."""
    return False


class Device(Protocol):
    """What the runtime asks of the device that the kernels run on."""

    def record(self) -> None:
        """An operator, or a tile of one, has been queued completely. Called at every interruption point."""

    def catch_up(self, interrupted: Callable[[], bool]) -> bool:
        """Wait until another operator may be queued: at most ``lookahead`` of those queued have not run. False, before
        that, as soon as ``interrupted()``.
        """

    def wait(self, event: Event, interrupted: Callable[[], bool]) -> bool:
        """Wait until the device has passed ``event``. False, before that, as soon as ``interrupted()``."""

    def fetch(self, batch: Any, result: Any) -> None:
        """A forward pass has been queued completely: queue the copy to the host of what SGLang reads of ``result`` (a
        GenerationBatchResult of ``batch``). Its ``copy_done`` tells when that has arrived; None: it is there already.
        """

    def stamp(self) -> Stamp:
        """The end of the queue as it is now."""

    def beside_the_queue(self) -> AbstractContextManager[Any]:
        """A context in which reads from the device do not wait for its queue; only what has run may be read."""


@dataclass(frozen=True, slots=True)
class HostStamp:
    """On a device that keeps no queue, a time of the host's."""

    time_s: float

    def query(self) -> bool:
        return True

    def seconds_until(self, later: HostStamp) -> float:
        return later.time_s - self.time_s


class CpuDevice:
    """An operator that returns has run: nothing is ever queued."""

    def record(self) -> None:
        pass

    def catch_up(self, interrupted: Callable[[], bool]) -> bool:
        return True

    def wait(self, event: Event, interrupted: Callable[[], bool]) -> bool:
        return True

    def fetch(self, batch: Any, result: Any) -> None:
        pass

    def stamp(self) -> HostStamp:
        return HostStamp(time.monotonic())

    def beside_the_queue(self) -> AbstractContextManager[Any]:
        return nullcontext()


class QueueDevice:
    """A device with one in-order queue. Subclasses say how its end is marked and how the host waits."""

    def __init__(self, lookahead: int) -> None:
        self.lookahead = lookahead
        self._queued: deque[Any] = deque()
        """Ends of the operators that had not run when we last looked, in their order: at most ``lookahead`` + 1."""
        self._unused: list[Any] = []

    def record(self) -> None:
        event = self._unused.pop() if self._unused else self._new_event()
        event.record()
        self._queued.append(event)

    def catch_up(self, interrupted: Callable[[], bool]) -> bool:
        while len(self._queued) > self.lookahead:
            if not self.wait(self._queued[0], interrupted):
                return False
            self._unused.append(self._queued.popleft())
        return True

    def wait(self, event: Event, interrupted: Callable[[], bool]) -> bool:
        while not event.query():
            self._pause()
            if interrupted():  # before another operator is queued, also if the event was passed during the pause
                return False
        return True

    def _new_event(self) -> Any:
        raise NotImplementedError

    def _pause(self) -> None:
        raise NotImplementedError
