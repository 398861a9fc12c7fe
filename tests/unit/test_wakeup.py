"""Waking the hub from other threads."""

from __future__ import annotations

import errno
import logging
import random
import socket
import threading
import time
from typing import Any

import pytest
import zmq

from sgl_flowprefill.patches import wakeups
from sgl_flowprefill.runtime.wakeup import CalledEvents, CallingEvents, EventSource, Wakeup


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


class Sleepers:
    """Two ranks with sockets of their own, one of which decides when both look: what they read, and how late."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.senders, sources = [], []
        for rank, kind in enumerate((CallingEvents, CalledEvents)):
            arrivals, sender = context.socket(zmq.PULL), context.socket(zmq.PUSH)
            arrivals.bind(f"inproc://rank-{rank}")
            sender.connect(f"inproc://rank-{rank}")
            self.senders.append(sender)
            sources.append((kind(arrivals, [], Wakeup()), arrivals))
        (self.first, _), (self.second, _) = self.sources = sources
        self.second.wakeup.forward_to(self.first.wakeup.listen("127.0.0.1"))
        self.first.ranks = [self.second.address]
        self.late_s: list[float] = []
        self._meeting = threading.Barrier(2)

    def serve(self, rank: int, messages: int) -> None:
        """The hub's turns: both meet, look, and sleep, until ``messages`` in all have been read."""
        events, arrivals = self.sources[rank]
        while True:
            self._meeting.wait(10.0)
            if len(self.late_s) == messages:
                return
            self._meeting.wait(10.0)
            events.clear()
            while arrivals.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                self.late_s.append(time.monotonic() - float(arrivals.recv()))
            self._meeting.wait(10.0)
            events.sleep(5.0)


def test_what_arrives_at_any_rank_is_read_at_once_by_ranks_that_look_together() -> None:
    rng, messages = random.Random(0), 300
    with zmq.Context() as context:
        ranks = Sleepers(context)
        threads = [threading.Thread(target=ranks.serve, args=(rank, messages)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for _ in range(messages):
            rng.choice(ranks.senders).send(repr(time.monotonic()).encode())
            time.sleep(rng.choice([0.0, 0.0005, 0.005]))
        for thread in threads:
            thread.join(30.0)
        assert len(ranks.late_s) == messages
        assert max(ranks.late_s) < 2.5, "a rank slept through an arrival"
        context.destroy(linger=0)


def test_a_late_call_ends_no_later_sleep() -> None:
    with zmq.Context() as context:
        ranks = Sleepers(context)
        ranks.senders[1].send(b"request")
        assert ranks.second.sleep(5.0)  # by itself
        assert ranks.first.sleep(5.0)  # told of it, it calls for the sleep that is over
        ranks.sources[1][1].recv()
        ranks.first.clear()
        ranks.second.clear()
        started_s = time.monotonic()
        assert not ranks.second.sleep(0.2)
        assert time.monotonic() - started_s > 0.1
        assert ranks.first.sleep(5.0), "the first rank is told when another one is awake"
        context.destroy(linger=0)


def test_the_first_rank_is_told_of_an_arrival_while_a_task_runs() -> None:
    with zmq.Context() as context:
        ranks = Sleepers(context)
        interrupted = ranks.second.telling(lambda: False)
        assert not interrupted()
        assert not ranks.first.pending()
        ranks.senders[1].send(b"request")
        deadline_s = time.monotonic() + 5.0
        while not ranks.first.pending():
            assert not interrupted()
            assert time.monotonic() < deadline_s
        assert not ranks.second.pending()
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
