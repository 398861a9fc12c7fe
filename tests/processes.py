"""Whether processes have ended. One that nobody has waited for has: PID 1 of a container may be no init process."""

from __future__ import annotations

import time
from collections.abc import Sequence

import psutil

from sgl_flowprefill.processes import is_alive


def still_alive(processes: Sequence[psutil.Process], within_s: float = 30.0) -> list[psutil.Process]:
    """The processes of ``processes`` that have not ended within ``within_s`` seconds."""
    give_up_s = time.monotonic() + within_s
    while (left := [process for process in processes if is_alive(process)]) and time.monotonic() < give_up_s:
        time.sleep(0.05)
    return left
