"""The SLO policy file of a running server: read again when it changes and on SIGHUP, and never half."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Final

from sgl_flowprefill.slo.policy import PolicyError, SloPolicy, parse

logger = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 1.0
Stamp = tuple[int, int, int] | None
"""By what a file is seen to have changed: time, size and inode; None for a file that is not there."""


def read_policy(
    path: str | os.PathLike[str], priorities_elsewhere: bool = False, may_be_empty: bool = True
) -> SloPolicy:
    """The policy in the file at ``path``. Raises PolicyError, also for priorities in it if they are said elsewhere, and
    for a file without a character where it may not be empty.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    if not text.strip() and not may_be_empty:
        raise PolicyError(f"{path} is empty; a policy without classes is {{}}")
    policy = parse(text, str(path))
    if priorities_elsewhere and policy.priorities:
        raise PolicyError(f"{path} has priorities, and so has --flowprefill-priority-ttft-slo; keep one of them")
    return policy


class PolicyFile:
    """Looks after one file, and hands each policy that it holds to ``use``."""

    def __init__(self, path: str, use: Callable[[SloPolicy], None], priorities_elsewhere: bool = False) -> None:
        """Reads the file. Raises PolicyError."""
        self._path = path
        self._use = use
        self._priorities_elsewhere = priorities_elsewhere
        self._read: Stamp = self._stamp()
        """The file as it was last read, well or not."""
        self._seen = self._read
        """The file as it was at the last look."""
        self._hangup = threading.Event()
        use(read_policy(path, priorities_elsewhere))

    def look(self, now: bool = False) -> None:
        """Read the file if it has changed. One that is still being written is left for the next look: it has to look
        the same twice, or be asked for ``now``, and has to be the same after it was read. An empty one is taken for
        one that was not written to its end.
        """
        stamp, seen = self._stamp(), self._seen
        self._seen = stamp
        if not now and (stamp == self._read or stamp != seen):
            return
        try:
            policy = read_policy(self._path, self._priorities_elsewhere, may_be_empty=False)
        except PolicyError as error:
            if self._stamp() == stamp:
                self._read = stamp
                logger.error("The SLO policy stays as it was: %s", error)
            return
        if self._stamp() != stamp:
            return
        self._read = stamp
        self._use(policy)
        logger.info("The SLO policy is that of %s as it is now: classes %s", self._path, ", ".join(policy.classes))

    def watch(self) -> None:
        """Look every second, and at once when SIGHUP asks for it, in a thread that ends with the process. What the
        program does at a SIGHUP, it goes on doing.
        """
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGHUP)

            def hang_up(number: int, frame: FrameType | None) -> None:
                self._hangup.set()
                if callable(before):
                    before(number, frame)

            signal.signal(signal.SIGHUP, hang_up)
        threading.Thread(target=self._watch, name="slo-policy", daemon=True).start()

    def _watch(self) -> None:
        while True:
            is_asked = self._hangup.wait(LOOK_EVERY_S)
            self._hangup.clear()
            self.look(now=is_asked)

    def _stamp(self) -> Stamp:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino
