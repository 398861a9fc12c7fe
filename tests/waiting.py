"""Waiting for what comes true by itself, in another process or thread."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object],
    within_s: float,
    *,
    say: Callable[[], object] = lambda: "still not so",
    every_s: float = 0.05,
) -> None:
    """Return when ``condition()`` is true. Raises AssertionError with what ``say()`` returns when it is not in time."""
    give_up_s = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < give_up_s, say()
        time.sleep(every_s)
