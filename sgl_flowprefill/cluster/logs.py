"""Log files of servers: each is one launcher's at a time, appended to, and shown from its end."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from sgl_flowprefill.cluster.base import StartError

LAST_LINES: Final = 25
LAST_BYTES: Final = 1 << 16
"""Most that is read for the last lines: a log may have no lines at all."""
KEPT_BYTES: Final = 64 << 20
"""Most that is kept of the log of the launcher before."""


def opened(log: Path, anew: bool = False) -> IO[bytes]:
    """``log``, emptied or as it is, to append to; its folder is made if it is not there. Raises StartError."""
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            log.write_bytes(b"")
        return open(log, "ab")
    except OSError as error:
        raise StartError(
            f"the log {log} cannot be written ({error.strerror}); name another directory with --log-dir"
        ) from None


@contextmanager
def held(log: Path) -> Iterator[None]:
    """A context in which ``log``, empty at first, is this launcher's alone. The end of what it had is in
    ``earlier(log)``. Raises StartError."""
    with opened(log) as file:
        if log.is_file():  # and no device, such as /dev/null
            _lock(file, log)
            if file.tell():
                with suppress(OSError):  # a full disk: the log can be emptied all the same
                    _copy_end(log, earlier(log))
        log.write_bytes(b"")
        yield


def earlier(log: Path) -> Path:
    """Where the last lines of the launcher before are kept that had the same log."""
    return log.with_suffix(f".1{log.suffix}")


def _copy_end(log: Path, to: Path) -> None:
    with open(log, "rb") as source, open(to, "wb") as copy:
        source.seek(max(0, source.seek(0, os.SEEK_END) - KEPT_BYTES))
        shutil.copyfileobj(source, copy)


def _lock(file: IO[bytes], log: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StartError(
            f"another launcher that is running has its log in {log}; give this one another directory with --log-dir"
        ) from None
    except OSError:  # the file system has no locks
        pass


def last_lines(log: Path) -> str:
    """The last lines of ``log``; none of one that cannot be read."""
    with suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - LAST_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-LAST_LINES:]).strip()
    return ""
