"""Server processes with a log file each, and the guard that ends them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final

import psutil

from sgl_flowprefill.cluster import guard

LAST_LINES: Final = 25


class Server:
    """A running server. It leads a session of its own, so a Ctrl-C in the terminal reaches the launcher only."""

    def __init__(
        self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path, append: bool = False
    ) -> None:
        self.name = name
        self.log = log
        with open(log, "ab" if append else "wb") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._children: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch_children(self) -> None:
        """From now on, the end of one of its processes counts as its own: SGLang takes a minute to notice that."""
        self._children = [child for child in psutil.Process(self.pid).children() if child.is_running()]

    def ended(self) -> str | None:
        """How it has ended, as half a sentence; None while it runs."""
        exit_code = self._process.poll()
        if exit_code is not None:
            how = f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
            return f"the {self.name} server has ended ({how})"
        for child in self._children:
            if not child.is_running() or child.status() == psutil.STATUS_ZOMBIE:
                return f"process {child.pid} of the {self.name} server has ended"
        return None

    def bind(self, cpus: Sequence[int], except_on: Sequence[Sequence[int]]) -> None:
        """Move all its threads to ``cpus``, but for processes that are bound within one of ``except_on``."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                if not any(set(process.cpu_affinity()) <= set(own) for own in except_on):
                    _bind_threads(process, cpus)

    def suspend(self) -> None:
        """Stop all its processes (SIGSTOP)."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Let them go on (SIGCONT)."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def _processes(self) -> list[psutil.Process]:
        """It and all that it has started; nothing once it has ended."""
        try:
            leader = psutil.Process(self.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        """Ask it to end once its requests have ended."""
        self._children = []
        self._process.terminate()

    def wait(self, timeout_s: float) -> None:
        """Wait until it has ended, for at most ``timeout_s``."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, timeout_s))

    def last_lines(self) -> str:
        """The end of its log."""
        with open(self.log, errors="replace") as file:
            return "".join(deque(file, LAST_LINES)).strip()

    def reap(self) -> None:
        """Collect the exit status after the guard has ended it."""
        self._process.wait()


class Guard:
    """Owns the servers' processes and their directory for temporary files; leaving the context ends them all."""

    def __enter__(self) -> Guard:
        self._servers: list[Server] = []
        self._segments_before = set(os.listdir(guard.SHM))
        self._process = subprocess.Popen(
            [sys.executable, "-S", guard.__file__], stdin=subprocess.PIPE, text=True, start_new_session=True
        )
        # Not below TMPDIR: the path of a ZeroMQ ipc socket must stay under 108 characters.
        self.directory = Path(tempfile.mkdtemp(prefix="flowprefill-", dir="/tmp"))
        self._tell(f"directory {self.directory}")
        return self

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Server:
        """Start a server whose temporary files go to the guard's directory. One started again appends to its log."""
        again = any(server.log == log for server in self._servers)
        server = Server(name, command, dict(env) | {"TMPDIR": str(self.directory)}, log, append=again)
        self._tell(f"session {server.pid}")
        self._servers.append(server)
        return server

    def end(self, server: Server) -> None:
        """End what is left of one server, and only that."""
        guard.end({server.pid}, self._segments_before)
        server.reap()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        for server in self._servers:
            server.reap()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()


def _bind_threads(process: psutil.Process, cpus: Sequence[int]) -> None:
    for thread in process.threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cpus)
