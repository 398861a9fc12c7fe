"""Whether a process still runs."""

from __future__ import annotations

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Whether ``process`` has not ended. One that nobody has waited for has, and one that is reaped meanwhile."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
