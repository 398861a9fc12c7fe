"""Times that a test may ask for on a busy machine, too."""

from __future__ import annotations

import time
from pathlib import Path


def stalled_s() -> float:
    """Time for which some process of the machine waited for a CPU, since its start; 0 where the kernel does not say."""
    try:
        some = Path("/proc/pressure/cpu").read_text()
    except OSError:
        return 0.0
    return int(some.partition("total=")[2].split()[0]) / 1e6


class Stopwatch:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._begin_s, self._stalled_before_s = time.monotonic(), stalled_s()

    @property
    def passed_s(self) -> float:
        return time.monotonic() - self._begin_s

    @property
    def waited_s(self) -> float:
        """Time for which some process of the machine waited for a CPU: on a busy machine, nearly all that passed."""
        return stalled_s() - self._stalled_before_s

    @property
    def own_s(self) -> float:
        """Time that passed while nobody waited: what the code itself needed, at most."""
        return self.passed_s - self.waited_s
