"""SGLang's storage behind its hierarchical cache: requests whose prefixes are read from it while they wait.

SGLang asks its storage about every request that comes, and threads of its own read into host memory what is there.
``--hicache-storage-prefetch-policy`` says when the request may start: at once, with what has been read by then; when
all has been read; or then, but after some time in any case. SGLang's loop asks for that in every round. Here the hub
sleeps, so it is woken by what the threads have to say, and when that time is over; and it is not told of a request that
may not start yet, or it would choose one of which nothing can be made.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sgl_flowprefill.contract import require

READ_S: Final = "flowprefill_read_s"
"""Attribute of SGLang's Req: when the hub noticed that it has not to wait for storage any longer."""


class Reads:
    """What a role asks of the reads from storage. There are none, as on a server without a hierarchical cache."""

    @property
    def awaited(self) -> Collection[Any]:
        """Requests of SGLang's waiting queue that may not start before reads of their prefixes have ended."""
        return ()

    def listen(self) -> None:
        """There is a storage now: wake the hub at what its threads have to say."""

    def may_start(self, queued: Sequence[Any]) -> Sequence[Any]:
        """Those of the ``queued`` requests and of the awaited ones that may start; the others are awaited."""
        return queued

    def take_ended(self) -> Sequence[Any]:
        """Requests whose reads have ended since the last call: more of their prompts may be cached."""
        return ()

    def forget_all_but(self, queued: Sequence[Any]) -> None:
        """Only the ``queued`` requests still wait."""

    def begun_again(self, req: Any) -> None:
        """SGLang has asked its storage again about ``req``, which waits."""

    def with_prefixes(self, reqs: Sequence[Any]) -> Sequence[Any]:
        """Those of ``reqs``, which are about to start, that have not lost a prefix which storage may have."""
        return reqs

    def pass_by(self) -> None:
        """A batch has been made, if it could be. The others may be asked about again, as SGLang's options say."""


@dataclass(eq=False)
class StorageReads(Reads):
    """SGLang's, behind its hierarchical cache."""

    scheduler: Any
    """SGLang's scheduler."""
    wake: Callable[[], None]
    _awaited: dict[Any, float] = field(default_factory=dict, init=False)
    """Each with the time at which its wait is over in any case."""
    _beside: list[Any] = field(default_factory=list, init=False)
    """Requests that may start though their prefixes are being read, which ends that."""
    _ended: list[Any] = field(default_factory=list, init=False)
    _alarm: threading.Timer | None = field(default=None, init=False)
    _alarm_s: float = field(default=math.inf, init=False)
    """When the alarm wakes the hub."""

    def __post_init__(self) -> None:
        if self.scheduler.enable_hicache_storage:
            self.listen()

    @property
    def tree(self) -> Any:
        """``UnifiedRadixCache``."""
        return self.scheduler.tree_cache

    @property
    def awaited(self) -> Collection[Any]:
        return self._awaited

    def listen(self) -> None:
        require("storage")
        controller = self.tree.cache_controller
        for queue in (controller.prefetch_hit_queue, controller.ack_prefetch_queue, controller.ack_backup_queue):
            queue.put = Waking(queue.put, self.wake)

    def may_start(self, queued: Sequence[Any]) -> Sequence[Any]:
        before, self._awaited = self._awaited, {}
        ready = []
        for req in (*before, *queued):
            if self._has_to_wait(req):
                self._awaited[req] = before.get(req) or self._waits_until_s(req)
            else:
                ready.append(req)
                if req in before:
                    setattr(req, READ_S, time.monotonic())
                    self._ended.append(req)
                elif self._is_read_for(req):
                    self._beside.append(req)
        self._set_alarm()
        return ready

    def take_ended(self) -> Sequence[Any]:
        if self._beside:
            self._ended += [req for req in self._beside if not self._is_read_for(req)]
            self._beside = [req for req in self._beside if self._is_read_for(req)]
        ended, self._ended = self._ended, []
        return ended

    def forget_all_but(self, queued: Sequence[Any]) -> None:
        if self._awaited:
            waiting = set(queued)
            self._awaited = {req: until_s for req, until_s in self._awaited.items() if req in waiting}

    def begun_again(self, req: Any) -> None:
        if self._has_to_wait(req):
            self._awaited[req] = self._waits_until_s(req)
            self._set_alarm()
            self.wake()
        elif self._is_read_for(req):
            self._beside.append(req)

    def with_prefixes(self, reqs: Sequence[Any]) -> Sequence[Any]:
        scheduler = self.scheduler
        if not scheduler.enable_hicache_storage:
            return reqs
        for req in reqs:
            req.init_next_round_input(self.tree, cow_mamba=False)
            scheduler._prefetch_after_device_hit_loss(req)
        return [req for req in reqs if req not in self._awaited]

    def pass_by(self) -> None:
        if self.scheduler.enable_hicache_storage:
            self.scheduler._process_storage_prefetch_retries()

    def _is_read_for(self, req: Any) -> bool:
        return bool(self.tree.has_ongoing_prefetch(req.cache_request_handle))

    def _has_to_wait(self, req: Any) -> bool:
        """Asked as SGLang's admission asks, which ends a read whose time is over, and so nothing that may be cut off at
        any time.
        """
        if not self._is_read_for(req) or self.tree.prefetch_stop_policy == "best_effort":
            return False
        is_ready = bool(self.tree.check_prefetch_progress(req.cache_request_handle))
        req.time_stats.observe_storage_prefetch_ready(is_ready)
        return not is_ready

    def _waits_until_s(self, req: Any) -> float:
        """SGLang counts from the first time that it was asked in vain."""
        wait = self.tree._storage_prefetch_wait.get(req.cache_request_handle)
        return math.inf if wait is None else time.monotonic() + wait.timeout_s - wait.timer.elapsed()

    def _set_alarm(self) -> None:
        next_s = min(self._awaited.values(), default=math.inf)
        if next_s == self._alarm_s:
            return
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        self._alarm_s = next_s
        if next_s < math.inf:
            self._alarm = threading.Timer(next_s - time.monotonic(), self.wake)
            self._alarm.daemon = True
            self._alarm.start()


@dataclass(frozen=True)
class Waking:
    """The ``put`` of a queue from which the hub has to take what is put there."""

    put: Callable[..., None]
    wake: Callable[[], None]

    def __call__(self, item: Any) -> None:
        self.put(item)
        self.wake()


def storage_reads(scheduler: Any, wake: Callable[[], None]) -> Reads:
    """What is read from the storage of SGLang's ``scheduler``, if it may have one."""
    return StorageReads(scheduler, wake) if scheduler.enable_hierarchical_cache else Reads()
