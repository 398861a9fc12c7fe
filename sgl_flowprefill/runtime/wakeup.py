"""Waking the hub: a flag that a checkpoint reads for next to nothing, and a file descriptor that a poller sleeps on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import zmq


class Wakeup:
    """Set by any thread of the scheduler process, cleared by the hub."""

    def __init__(self) -> None:
        self.pending = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def notify(self) -> None:
        """Make ``pending`` true and end a sleep. Callable from any thread."""
        if not self.pending:
            self.pending = True
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Forget what was notified so far. The hub calls this before it looks at what there is, never after."""
        # The descriptor before the flag, and in any case. The other way round, a notifier between the two would leave a
        # flag that keeps the next ones from writing, with nothing in the descriptor to end a sleep.
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        self.pending = False

    def fileno(self) -> int:
        return self._fd


class EventSource:
    """The scheduler's sockets and its wakeup, as one thing to test at a checkpoint and to sleep on when idle."""

    def __init__(self, arrivals: zmq.Socket[bytes], others: Sequence[zmq.Socket[bytes]], wakeup: Wakeup) -> None:
        self.wakeup = wakeup
        self._arrivals = arrivals
        self._poller = zmq.Poller()
        for source in (arrivals, *others, wakeup):
            self._poller.register(source, zmq.POLLIN)

    def pending(self) -> bool:
        """Whether an arrival or a notification waits to be looked at. A flag and one ``getsockopt``."""
        return self.wakeup.pending or bool(int(self._arrivals.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def sleep(self, timeout_s: float) -> bool:
        """Sleep until something is there, at most ``timeout_s``. Whether something is there."""
        return bool(self._poller.poll(int(timeout_s * 1e3)))


def scheduler_events(scheduler: Any, wakeup: Wakeup) -> EventSource:
    """Event source of a SGLang scheduler: ``recv_from_tokenizer`` and ``recv_from_rpc`` of rank 0, and ``wakeup``."""
    channels = scheduler.ipc_channels
    others = [] if channels.recv_from_rpc is None else [channels.recv_from_rpc]
    return EventSource(channels.recv_from_tokenizer, others, wakeup)
