"""Copies between device and host memory that are made late, as an asynchronous device may make them: when something
waits for them, or by chance before that.

What stands for SGLang's device module in its hierarchical cache. The portable CPU platform copies at once, so nothing
that forgets to wait for a load would be seen there.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sgl_flowprefill.patches.hicache_cpu import copy


@dataclass(eq=False)
class Stream:
    """A queue of copies. The one that forward passes run on has none: all that is queued there has run."""

    device: LateTransfers
    queued: list[Callable[[], None]] = field(default_factory=list)
    run: int = 0
    """How many of them have been made."""

    def run_to(self, place: int) -> None:
        with self.device.one_at_a_time:
            while self.run < place:
                copy = self.queued[self.run]
                self.run += 1
                copy()

    def synchronize(self) -> None:
        self.run_to(len(self.queued))

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def wait_stream(self, other: object) -> None:
        """``other`` is the one that forward passes run on."""


@dataclass(eq=False)
class Event:
    """A place in a queue, as ``torch.cuda.Event`` without timing."""

    device: LateTransfers
    stream: Stream | None = None
    place: int = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.device.now
        self.place = len(self.stream.queued)

    def query(self) -> bool:
        if self.stream is None:
            return True
        if self.device.rng.random() < self.device.progress:
            self.stream.run_to(min(self.stream.run + 1, len(self.stream.queued)))
        return self.stream.run >= self.place

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run_to(self.place)

    def wait(self, stream: Stream | None = None) -> None:
        """What is queued on ``stream`` from now on runs later than what was queued before this place."""
        waited, place = self.stream, self.place
        if waited is not None:
            self.device.submit(stream or self.device.now, lambda: waited.run_to(place))


class LateTransfers:
    """In place of ``torch.cpu`` in the modules of the hierarchical cache."""

    __name__ = "late"

    def __init__(self, seed: int, progress: float = 0.2) -> None:
        self.rng = random.Random(seed)
        self.progress = progress
        """How often a copy is made where somebody only asks."""
        self.one_at_a_time = threading.RLock()
        """The thread that waits for the end of transfers makes copies as well as the scheduler's."""
        self.compute = self.now = Stream(self)
        self.copies = 0

    def submit(self, stream: Stream, work: Callable[[], None]) -> None:
        if stream is self.compute:
            work()
        else:
            stream.queued.append(work)

    # ---- what SGLang uses of a device module -----------------------------------------------------------------------

    def Event(self) -> Event:
        return Event(self)

    def Stream(self) -> Stream:
        return Stream(self)

    def current_stream(self) -> Stream:
        return self.now

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    # ---- the copies -------------------------------------------------------------------------------------------------

    def copy(self, **arguments: Any) -> None:
        """``hicache_cpu.copy`` on the stream of now."""
        kept = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
        self.copies += 1
        self.submit(self.now, lambda: copy(**kept))


def make_late(seed: int) -> LateTransfers:
    """Let hierarchical caches that are made in this process from now on copy late."""
    from sglang.srt.managers import cache_controller
    from sglang.srt.mem_cache import l2_transfer
    from sglang.srt.mem_cache.pool_host import mha

    from sgl_flowprefill.patches import hicache_cpu

    device = LateTransfers(seed)
    for module in (cache_controller, l2_transfer):
        assert hasattr(module, "device_module"), f"{module.__name__} has no name that could be replaced"
        module.device_module = device
    hicache_cpu.copy = device.copy
    mha.transfer_kv_direct = device.copy
    return device
