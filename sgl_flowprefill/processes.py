"""Whether a process still runs, and who has its standard output."""

from __future__ import annotations

import os
import sys

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Whether ``process`` has not ended. One that nobody has waited for has, and one that is reaped meanwhile."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def own_stdout() -> int:
    """A descriptor of this process's standard output, for the caller alone: what SGLang and other libraries print there
    from now on goes to standard error, which is the log file.
    """
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return own
