"""Namespaces of their own for processes of a test, where the system lets the user have them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

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


class PrivateMemory:
    """A /dev/shm and, where nothing that is ``needed`` is below it, a /tmp that only processes started with ``prefix``
    see, but for the directory ``shared``."""

    def __init__(self, needed: Sequence[Path], shared: Path) -> None:
        self._shared = shared
        self._places = [Path("/dev/shm")]
        if not any(path.resolve().is_relative_to("/tmp") for path in needed):
            self._places.append(Path("/tmp"))

    def __enter__(self) -> PrivateMemory:
        prefix = unshare("--mount")
        steps = [f"mount --bind {self._shared} /mnt"]
        steps += [f"mount -t tmpfs tmpfs {place}" for place in self._places]
        steps += [f"mkdir -p {self._shared}", f"mount --bind /mnt {self._shared}", "echo ready", "exec sleep infinity"]
        self._holder = subprocess.Popen([*prefix, "sh", "-c", " && ".join(steps)], stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        user = ("--user", "--preserve-credentials") if "--map-root-user" in prefix else ()
        self.prefix = ("nsenter", f"--target={self._holder.pid}", "--mount", *user, f"--wdns={os.getcwd()}")
        self._before = self._listed()
        return self

    def __exit__(self, *error: object) -> None:
        self._holder.kill()
        self._holder.wait()

    def files(self) -> list[str]:
        """What has come to be there and still is."""
        return sorted(self._listed() - self._before)

    def _listed(self) -> set[str]:
        root = Path(f"/proc/{self._holder.pid}/root")
        return {str(path) for place in self._places for path in (root / place.relative_to("/")).iterdir()}
