"""A decode scheduler with nothing to compute sleeps until a request or a KV-transfer status wakes it.

Target: ``Scheduler.on_idle``, which the decode loops call when there is no batch to run. Without this
seam an idle decode scheduler takes 94% of a core, and 50% with ``--sleep-on-idle``, whose sleeper sees requests but no
transfers, and so is skipped while a request waits for its KV cache. With data-parallel attention, whose ranks meet in
each round, it goes on looking a thousand times a second.
"""

from __future__ import annotations

import os
from typing import Any, Final

import zmq

from sgl_flowprefill.config import ENV_DECODE_SLEEP
from sgl_flowprefill.patches import wakeups
from sgl_flowprefill.patches.base import expect

SEAM: Final = "decode_idle"
ON_IDLE: Final = "sglang.srt.managers.scheduler.Scheduler.on_idle"

IDLE_MS: Final = 1000
"""Longest sleep with no request in the server; SGLang's idle housekeeping runs this often."""
SHORTEST_WAIT_MS: Final = 1
LONGEST_WAIT_MS: Final = 64
"""Sleeps while requests wait for something that nobody signals (peer discovery, metadata, timeouts) grow between these;
bootstrap and transfer statuses end them at once."""


def is_enabled() -> bool:
    """Whether the environment asks for a sleeping decode scheduler."""
    return os.environ.get(ENV_DECODE_SLEEP, "0") == "1"


def apply() -> None:
    """Register the seam in a process that runs a scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)

    wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    sleepers: dict[Any, DecodeSleeper] = {}

    def after_idle(_result: None, scheduler: Any) -> None:
        from sglang.srt.disaggregation.utils import DisaggregationMode

        if scheduler.disaggregation_mode == DisaggregationMode.DECODE and not scheduler.gracefully_exit:
            if scheduler not in sleepers:
                sleepers[scheduler] = DecodeSleeper(scheduler, wakeup)
            sleepers[scheduler].sleep()

    wakeups.subscribe(lambda room, status: os.eventfd_write(wakeup, 1))
    HookRegistry.register(ON_IDLE, after_idle, HookType.AFTER)


class DecodeSleeper:
    """Decides how long an idle decode scheduler may sleep, and sleeps.

    ``wakeup`` is an eventfd that a transfer thread writes after each status; it stays readable until the scheduler has
    been woken by it, so a status that comes between the scheduler's look and its sleep is not lost.

    Of several tensor-parallel ranks, only the first has sockets. The others do not sleep here: each of their rounds
    begins with a broadcast of requests, in which they wait for the first one, and would keep it waiting. With
    data-parallel attention several have sockets, of requests of their own, and meet twice in each round: a rank with
    nothing to do sleeps no longer than the others may be kept waiting by it.
    """

    def __init__(self, scheduler: Any, wakeup: int) -> None:
        self._scheduler = scheduler
        self._wakeup = wakeup
        self._forwards = -1
        self._wait_ms = SHORTEST_WAIT_MS
        self._poller = zmq.Poller()
        self._poller.register(wakeup, zmq.POLLIN)
        channels = scheduler.ipc_channels
        sockets = [channels.recv_from_tokenizer, channels.recv_from_rpc]
        self._sockets = [socket for socket in sockets if isinstance(socket, zmq.Socket)]
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)

    def sleep(self) -> None:
        """Sleep until something arrives, or until it is time to look at what nobody signals."""
        if not self._sockets:
            return
        if self._scheduler.forward_ct != self._forwards:
            self._forwards = self._scheduler.forward_ct
            self._wait_ms = SHORTEST_WAIT_MS
        events = dict(self._poller.poll(self._longest_ms()))
        if self._wakeup in events:
            os.eventfd_read(self._wakeup)
        self._wait_ms = SHORTEST_WAIT_MS if events else min(2 * self._wait_ms, LONGEST_WAIT_MS)

    def _longest_ms(self) -> int:
        """How long to sleep where nothing comes."""
        if self._scheduler.attn_dp_enabled:
            return SHORTEST_WAIT_MS
        return IDLE_MS if self._is_idle() else self._wait_ms

    def _is_idle(self) -> bool:
        """Whether no request is anywhere in the scheduler (SGLang's own notion leaves out peer discovery)."""
        return self._scheduler.is_fully_idle() and not self._scheduler.disagg_decode_prealloc_queue.pending_reqs
