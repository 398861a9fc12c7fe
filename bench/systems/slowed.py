"""Servers on a machine that becomes slower: their processes are stopped for some milliseconds, again and again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Final

import psutil

STOP_S: Final = 0.005
"""How long processes are stopped at a time: well below the time of a decode step."""


@contextmanager
def slowed(pids: Iterable[int], share: float, from_s: float) -> Iterator[None]:
    """From ``from_s`` (``time.monotonic()``) until the context ends, the processes ``pids`` and those that they have
    started take ``1 + share`` times as long for whatever they compute.
    """
    tree = [one.pid for pid in pids for one in _with_children(pid)]
    ended = threading.Event()
    thread = threading.Thread(target=_stop_and_go, args=(tree, share, from_s, ended), daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _stop_and_go(pids: Sequence[int], share: float, from_s: float, ended: threading.Event) -> None:
    stopped_s = STOP_S
    is_over = ended.wait(max(0.0, from_s - time.monotonic()))
    while not is_over and not ended.wait(stopped_s / share):
        begin_s = time.monotonic()
        _send(signal.SIGSTOP, pids)
        try:
            is_over = ended.wait(STOP_S)
        finally:
            _send(signal.SIGCONT, pids)
        stopped_s = time.monotonic() - begin_s  # longer on a busy machine: then they run for longer, too


def _send(number: signal.Signals, pids: Sequence[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _with_children(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
