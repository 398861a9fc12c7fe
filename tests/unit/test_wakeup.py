"""Waking the hub from other threads."""

from __future__ import annotations

import threading
import time

import zmq

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
