"""Waking the hub: a flag that a preemption checkpoint reads for next to nothing, and a file descriptor for a poller."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import zmq

logger = logging.getLogger(__name__)

Address = tuple[str, int]


class Wakeup:
    """Set by any thread of the scheduler process, cleared by the hub. Only the first of several tensor-parallel
    ranks sleeps and looks at its wakeup, so the wakeups of other ranks are made to wake the first.
    """

    def __init__(self) -> None:
        self.pending = False
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._socket: socket.socket | None = None
        self._forward_to: Address | None = None
        self._has_warned = False

    def notify(self) -> None:
        """Make ``pending`` true and end a sleep. Callable from any thread; raises nothing, whatever the network."""
        if not self.pending:
            self.pending = True
            if self._socket is not None and self._forward_to is not None:
                self._send(self._socket, self._forward_to)
            else:
                os.eventfd_write(self._fd, 1)

    def _send(self, sender: socket.socket, address: Address) -> None:
        try:
            sender.sendto(b"", address)
        except OSError as error:
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "FlowPrefill cannot send wake-ups to tensor-parallel rank 0 at %s port %d (%s): until it can, "
                    "rank 0 notices what happens here up to a second later",
                    *address,
                    error,
                )

    def listen(self, host: str) -> Address:
        """From now on, wake-ups that others forward to the returned address are notified here."""
        receiver = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
        receiver.bind((host, 0))

        def receive() -> None:
            while True:
                receiver.recv(1)
                self.notify()

        threading.Thread(target=receive, name="flowprefill-wakeups", daemon=True).start()
        bound: tuple[Any, ...] = receiver.getsockname()
        return bound[0], bound[1]

    def forward_to(self, address: Address) -> None:
        """From now on, what is notified here is notified at ``address``. The hub's own checks make up for a datagram
        that is lost or cannot be sent, as happens with a full buffer or a broken network."""
        self._forward_to = address
        self._socket = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_DGRAM)

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
    """The scheduler's sockets and its wakeup: one thing to test at a preemption checkpoint and to sleep on."""

    def __init__(self, arrivals: zmq.Socket[bytes], others: Sequence[zmq.Socket[bytes]], wakeup: Wakeup) -> None:
        self.wakeup = wakeup
        self._arrivals = arrivals
        self._poller = zmq.Poller()
        for source in (arrivals, *others, wakeup):
            self._poller.register(source, zmq.POLLIN)

    def clear(self) -> None:
        """``Wakeup.clear``. What is at the sockets is there until it is read."""
        self.wakeup.clear()

    def pending(self) -> bool:
        """Whether an arrival or a notification waits to be looked at. A flag and one ``getsockopt``."""
        return self.wakeup.pending or bool(int(self._arrivals.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def sleep(self, timeout_s: float) -> bool:
        """Sleep until something is there, at most ``timeout_s``. Whether something is there."""
        return bool(self._poller.poll(int(timeout_s * 1e3)))


class Woken:
    """The events of a rank that looks when the first one does, and sleeps while it waits for that one."""

    def __init__(self, wakeup: Wakeup) -> None:
        self.wakeup = wakeup

    def clear(self) -> None:
        self.wakeup.clear()

    def pending(self) -> bool:
        return False

    def sleep(self, timeout_s: float) -> bool:
        return False


class CallingEvents(EventSource):
    """The events of the first of several ranks that all have requests of their own: when its sleep ends, it ends those
    of the others. All ranks sleep equally often.
    """

    def __init__(self, arrivals: zmq.Socket[bytes], others: Sequence[zmq.Socket[bytes]], wakeup: Wakeup) -> None:
        super().__init__(arrivals, others, wakeup)
        self.ranks: Sequence[Address] = ()
        """Where the others are called (``CalledEvents.address``)."""
        self._caller = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sleeps = 0

    def sleep(self, timeout_s: float) -> bool:
        is_there = super().sleep(timeout_s)
        self._sleeps += 1
        for address in self.ranks:
            self._caller.sendto(self._sleeps.to_bytes(8), address)
        return is_there


class CalledEvents(EventSource):
    """The events of another of these ranks. The first one decides when all look at what there is, so it is told of what
    arrives here. A sleep ends with an arrival or when the first rank's ends; a call that came late ends no later one.
    """

    def __init__(self, arrivals: zmq.Socket[bytes], others: Sequence[zmq.Socket[bytes]], wakeup: Wakeup) -> None:
        super().__init__(arrivals, others, wakeup)
        self._calls = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._calls.bind(("127.0.0.1", 0))
        self._calls.setblocking(False)
        self._poller.register(self._calls, zmq.POLLIN)
        self._sleeps = 0
        self.address: Address = self._calls.getsockname()

    def telling(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """``interrupted``, before which the first rank is told if something has arrived here."""
        has_arrived = super().pending

        def told() -> bool:
            if has_arrived():
                self.wakeup.notify()
            return interrupted()

        return told

    def pending(self) -> bool:
        return False

    def sleep(self, timeout_s: float) -> bool:
        self._sleeps += 1
        end_s = time.monotonic() + timeout_s
        while not self._is_called():
            found = dict(self._poller.poll(max(0, int(1e3 * (end_s - time.monotonic())))))
            if set(found) != {self._calls.fileno()}:  # an arrival, or the time is over
                self.wakeup.notify()
                return bool(found)
        return True

    def _is_called(self) -> bool:
        """Whether the first rank has ended this sleep."""
        called = 0
        with suppress(BlockingIOError):
            while True:
                called = int.from_bytes(self._calls.recv(8))
        return called >= self._sleeps


def scheduler_events(scheduler: Any, wakeup: Wakeup, kind: type[EventSource] = EventSource) -> EventSource:
    """Event source of a SGLang scheduler that has sockets: its arrivals, remote calls and ``wakeup``."""
    channels = scheduler.ipc_channels
    others = [] if channels.recv_from_rpc is None else [channels.recv_from_rpc]
    return kind(channels.recv_from_tokenizer, others, wakeup)
