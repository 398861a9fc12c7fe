"""Waking the hub from other threads."""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from typing import Any

import pytest
import zmq

from sgl_flowprefill.patches import wakeups
from sgl_flowprefill.runtime.wakeup import EventSource, Wakeup


def source(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[EventSource, zmq.Socket[bytes], Wakeup]:
    arrivals, sender, wakeup = context.socket(zmq.PULL), context.socket(zmq.PUSH), Wakeup()
    arrivals.bind("inproc://arrivals")
    sender.connect("inproc://arrivals")
    return EventSource(arrivals, [], wakeup), sender, wakeup


def test_a_notification_ends_a_sleep_and_is_seen_until_cleared() -> None:
    with zmq.Context() as context:
        events, _, wakeup = source(context)
        assert not events.pending()
        assert not events.sleep(0.01)
        threading.Timer(0.05, wakeup.notify).start()
        started_s = time.monotonic()
        assert events.sleep(5.0)
        assert time.monotonic() - started_s < 1.0
        assert events.pending()
        wakeup.clear()
        assert not events.pending()
        assert not events.sleep(0.01)
        context.destroy(linger=0)


def test_an_arrival_is_pending_until_it_is_read() -> None:
    with zmq.Context() as context:
        events, sender, _ = source(context)
        sender.send(b"request")
        assert events.sleep(1.0)
        assert events.pending()
        context.destroy(linger=0)


def test_notifying_while_clearing_never_costs_a_sleep() -> None:
    """The hub clears, looks and sleeps; a sleep that a notification should have ended would last its whole time."""
    with zmq.Context() as context:
        events, _, wakeup = source(context)
        done = 0

        def work() -> None:
            nonlocal done
            for _ in range(3_000):
                done += 1
                wakeup.notify()
                time.sleep(0.0002)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        while True:
            alive = any(thread.is_alive() for thread in threads)
            wakeup.clear()
            seen = done
            started_s = time.monotonic()
            woken = events.sleep(1.0)
            if not woken:
                assert not alive or seen == done, "a notification did not end the sleep"
            if not alive:
                break
            assert time.monotonic() - started_s < 1.0 or seen == done
        context.destroy(linger=0)


def test_a_network_that_refuses_a_wake_up_is_reported_once_and_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As with ENETUNREACH: the notifier is a thread that transfers the KV cache of all requests."""

    class Refusing:
        sent = 0

        def sendto(self, data: bytes, address: tuple[str, int]) -> None:
            self.sent += 1
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    wakeup, refusing = Wakeup(), Refusing()
    monkeypatch.setattr(socket, "socket", lambda *kind: refusing)
    wakeup.forward_to(("10.1.2.3", 4567))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            wakeup.notify()
            assert wakeup.pending
            wakeup.clear()
    assert refusing.sent == 3
    [line] = [record.getMessage() for record in caplog.records]
    assert "10.1.2.3 port 4567" in line
    assert "Network is unreachable" in line


def test_a_listener_that_fails_breaks_neither_the_thread_that_announces_nor_the_others(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    heard: list[tuple[int, Any]] = []

    def fail(room: int, status: Any) -> None:
        raise ValueError("deaf")

    monkeypatch.setattr(wakeups, "listeners", [fail, lambda room, status: heard.append((room, status))])
    wakeups.announce(None, None, 7, "done")
    assert heard == [(7, "done")]
    assert "deaf" in caplog.text
