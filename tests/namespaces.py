"""Namespaces of their own for processes of a test, where the system lets the user have them."""

from __future__ import annotations

import os
import subprocess
from functools import cache

import pytest


@cache
def unshare(*flags: str) -> tuple[str, ...]:
    """Command prefix that runs a command in new namespaces, as root there; skips the test where that is not allowed."""
    for prefix in (("unshare", *flags), ("unshare", "--map-root-user", *flags)):
        if os.getuid() == 0 or "--map-root-user" in prefix:
            try:
                if subprocess.run([*prefix, "true"], capture_output=True, timeout=60).returncode == 0:
                    return prefix
            except FileNotFoundError:
                break
    pytest.skip(f"this system lets nobody unshare {' '.join(flags)}")


def unshare_pids() -> tuple[str, ...]:
    """... with process numbers that start at 1."""
    return unshare("--pid", "--fork", "--kill-child", "--mount-proc")
