"""SGLang's hierarchical cache (HiCache) below several prefills at once: prefixes that are loaded back from host memory.

SGLang queues the load of a new batch's prefixes on a stream of its own, and the batch's forward pass waits for it layer
by layer. Three things differ where prefills are suspended. Which load a forward pass waits for is a part of its state
(``ForwardState``). A prefix whose load has been queued looks cached to the next batch, which SGLang runs behind the one
that waits for the load, and the hub maybe before it. And more loads may be under way than SGLang has counters for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any


class HostCache:
    """What a role asks of the cache in host memory. There is none."""

    def take_news(self) -> bool:
        """Process transfers that have ended. Whether there were any: KV cache that they held may be freed now."""
        return False

    def before_batch(self) -> None:
        """A batch is to be made, which may load prefixes."""

    def after_batch(self, batch: Any | None) -> None:
        """The ``batch``, a ScheduleBatch, has been made; None: for want of KV cache, it has not."""

    def wake_when_done(self) -> None:
        """Wake the hub when the transfers that are under way have ended."""


@dataclass(eq=False)
class HiCache(HostCache):
    """SGLang's."""

    tree: Any
    """``UnifiedRadixCache``."""
    wake: Callable[[], None]
    _under_way: set[Hashable] = field(default_factory=set, init=False)
    """Transfers that had not ended at the last look."""
    _awaited: SimpleQueue[Any] = field(default_factory=SimpleQueue, init=False)
    """Events of the device, for the thread that waits for them."""
    _awaited_last: list[Any] = field(default_factory=lambda: [None, None], init=False)
    """The last of writes, and of loads."""

    def __post_init__(self) -> None:
        threading.Thread(target=self._wait, name="flowprefill-hicache", daemon=True).start()

    @property
    def controller(self) -> Any:
        """SGLang's ``HiCacheController``."""
        return self.tree.cache_controller

    def take_news(self) -> bool:
        self.tree.check_hicache_events()
        before, self._under_way = self._under_way, self._transfers()
        return bool(before - self._under_way)

    def before_batch(self) -> None:
        """SGLang has a few counters of loaded layers, and takes the next one without asking. It is nearly always free:
        as many loads must be under way as there are counters.
        """
        counter = self.controller.layer_done_counter
        counter.events[(counter.producer_index + 1) % counter.num_counters].finish_event.synchronize()

    def after_batch(self, batch: Any | None) -> None:
        """The device runs what is queued from now on after the loads of others: their prefixes may be the batch's."""
        self._under_way |= self._transfers()
        if batch is None:
            self.wake_when_done()
            return
        loads = self.controller.ack_load_queue
        for load in loads[:-1] if batch.hicache_consumer_index >= 0 else loads:
            load.finish_event.wait()

    def wake_when_done(self) -> None:
        controller = self.controller
        for place, transfers in enumerate((controller.ack_write_queue, controller.ack_load_queue)):
            if transfers and transfers[-1].finish_event is not self._awaited_last[place]:
                self._awaited_last[place] = transfers[-1].finish_event
                self._awaited.put(transfers[-1].finish_event)

    def _transfers(self) -> set[Hashable]:
        writes, loads = self.tree.ongoing_write_through, self.tree.ongoing_load_back
        return {*(("write", node) for node in writes), *(("load", node) for node in loads)}

    def _wait(self) -> None:
        while True:
            self._awaited.get().synchronize()
            self.wake()


def host_cache(scheduler: Any, wake: Callable[[], None]) -> HostCache:
    """The cache in host memory of SGLang's ``scheduler``, if it has one."""
    if not scheduler.enable_hierarchical_cache:
        return HostCache()
    return HiCache(scheduler.tree_cache, wake)
