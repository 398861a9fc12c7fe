"""Server processes with a log file each, and the guard that ends them."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import psutil

from sgl_flowprefill.cluster import guard, logs
from sgl_flowprefill.cluster.base import ClusterError, StartError
from sgl_flowprefill.processes import is_alive

SGLANG_TITLE: Final = "sglang::"
"""How the names of SGLang's own processes begin: schedulers, detokenizers and what distributes requests to them."""
GUARD_S: Final = guard.PATIENCE_S + guard.TRACKER_S
"""Longest that the guard takes to end everything."""
REAP_S: Final = 1.0
"""How long a killed process may take to be gone; one that the kernel holds on to is left to it."""
UNSEEN: Final = (psutil.Error, OSError, RuntimeError)
"""What psutil raises for processes and sockets that this user may not see, or that change while they are read."""


class Server:
    """A running server. It leads a session of its own, so a Ctrl-C in the terminal reaches the launcher only."""

    def __init__(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        with logs.opened(log) as output:
            self.log_start = output.tell()
            """Where the server's own lines begin in its log."""
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = guard.Session.led_by(self.pid)
        assert started is not None  # only ``reap`` lets go of it
        self.session: Final = started
        self._children: list[psutil.Process] = []

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch_children(self) -> None:
        """From now on, the end of one of SGLang's own processes counts as the server's, which SGLang ends itself about
        a second later (``SubprocessWatchdog``). Helpers of libraries may come and go."""
        self._children = [child for child in self._processes()[1:] if _title(child).startswith(SGLANG_TITLE)]

    def ended(self) -> str | None:
        """How the server has ended, as half a sentence; None while it runs."""
        how = self._how_it_ended()
        if how is not None:
            return f"the {self.name} server has ended ({how})"
        for child in self._children:
            if not is_alive(child):
                return f"process {child.pid} of the {self.name} server has ended"
        return None

    def _how_it_ended(self) -> str | None:
        """Leaves the process to be reaped: until then, its number and its session's belong to nobody else."""
        if self._process.returncode is not None:
            return _in_words(self._process.returncode)
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:
            return None
        return _in_words(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status)

    def bind(self, cpus: Sequence[int], except_on: Sequence[Sequence[int]]) -> None:
        """Move all threads of the server to ``cpus``, but for processes that are bound within one of ``except_on``."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                if not any(set(process.cpu_affinity()) <= set(own) for own in except_on):
                    _bind_threads(process, cpus)

    def suspend(self) -> None:
        """Stop all processes of the server (SIGSTOP)."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Let all processes of the server go on (SIGCONT)."""
        for process in self._processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def listens_on(self, port: int) -> bool:
        """Whether a process of the server listens there, or their sockets cannot be looked at."""
        try:
            return any(_listens_on(process, port) for process in self._processes())
        except UNSEEN:
            return True

    def _processes(self) -> list[psutil.Process]:
        """The server's process and all that it has started; none once it has ended."""
        try:
            leader = psutil.Process(self.pid)
            return [leader, *leader.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def terminate(self) -> None:
        """Ask the server to end once its requests have ended."""
        self._children = []
        self._process.terminate()

    def last_lines(self) -> str:
        """The last lines of the server's log."""
        return logs.last_lines(self.log)

    def last_words(self, how: str) -> str:
        """How the server has ended, with the last lines of its log."""
        return f"{how}. The last lines of {self.log}:\n{self.last_lines()}"

    def check(self) -> None:
        """Raises ClusterError if the server has ended."""
        if how := self.ended():
            raise ClusterError(self.last_words(how))

    def reap(self) -> None:
        """Collect the exit status after the server's session has ended. Another process may get its number then."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(REAP_S)


class Guard:
    """Owns the servers' processes and their directory for temporary files; leaving the context ends them all.

    A process of its own ends them, also when this process dies. Should the other process die first, this one ends them.
    """

    _process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        """Process id of the guard's own process."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Guard:
        self._servers: list[Server] = []
        self._followed: list[guard.Session] = []
        self._segments_before = set(os.listdir(guard.SHM))
        self._segments: set[int] = set()
        self._process = subprocess.Popen(
            [sys.executable, "-S", guard.__file__],
            stdin=subprocess.PIPE,
            text=True,
            errors="surrogateescape",  # names in /dev/shm may be of any bytes
            start_new_session=True,
        )
        # Not below TMPDIR: the path of a ZeroMQ ipc socket must stay under 108 characters.
        self.directory = Path(f"/tmp/flowprefill-{secrets.token_hex(6)}")
        for name in self._segments_before:
            self._tell(f"keep {name}")
        self._tell(f"directory {self.directory}")  # before it is there: a signal may come in between
        try:
            self.directory.mkdir(mode=0o700)
        except OSError as error:
            self.__exit__(None, None, None)
            reason = f"{self.directory} cannot be made ({error.strerror})"
            raise StartError(f"{reason}; give this user a /tmp to write to, such as a tmpfs of a container") from None
        return self

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str], log: Path) -> Server:
        """Start a server whose temporary files go to the guard's directory, and whose lines go to the end of ``log``.
        Raises StartError for a log that cannot be written."""
        server = Server(name, command, dict(env) | {"TMPDIR": str(self.directory)}, log)
        self._servers.append(server)
        self._tell(f"session {server.pid}")
        return server

    def follow(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
        """Start a process that reports on its standard output and writes its log to standard error. ``wait`` for it
        rather than poll it, so that its number stays its own until the guard knows that it has ended. Raises StartError
        for a log that cannot be written."""
        with logs.opened(log, anew=True) as errors:
            process = subprocess.Popen(
                command,
                env=dict(env) | {"TMPDIR": str(self.directory)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # a Ctrl-C reaches it through us, or not at all
            )
        session = guard.Session.led_by(process.pid)
        assert session is not None  # nobody has waited for it yet
        self._followed.append(session)
        self._tell(f"session {process.pid}")
        return process

    def wait(self, process: subprocess.Popen[str]) -> None:
        """Wait until a process that is followed has ended, and end what is left of its session."""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        session = next(session for session in self._followed if session.pid == process.pid)
        guard.end([session], self._segments_before)
        self._tell(f"ended {process.pid}")  # before its number can be another process's
        self._followed.remove(session)
        process.wait()

    def ask_to_end(self, server: Server) -> None:
        """Ask ``server`` to end once its requests have. What shared memory it has is told now: when it has ended by
        itself, nobody can see it any more.
        """
        for inode in guard.segments_of(server.session):
            self._segments.add(inode)
            self._tell(f"segment {inode}")
        server.terminate()

    def end(self, server: Server) -> None:
        """End what is left of one server, and only that."""
        guard.end([server.session], self._segments_before)
        self._tell(f"ended {server.pid}")  # before its number can be another process's
        self._servers.remove(server)
        server.reap()

    def ended(self) -> str | None:
        """How the guard's own process has ended, as half a sentence; None while it runs."""
        exit_code = self._process.poll() if self._process else None
        return None if exit_code is None else f"the launcher's guard has ended ({_in_words(exit_code)})"

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GUARD_S)
        if self._process.returncode != 0:
            known = [*self._followed, *(server.session for server in self._servers)]
            guard.end({*known, *guard.led_with(str(self.directory))}, self._segments_before, self._segments)
            shutil.rmtree(self.directory, ignore_errors=True)
        for server in self._servers:
            server.reap()

    def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # ``ended`` says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()


def _in_words(exit_code: int) -> str:
    return f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"


def _title(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return str(process.name())
    return ""


def listener(port: int) -> str:
    """The process of this machine that listens at ``port``, in words."""
    with suppress(*UNSEEN):
        for connection in psutil.net_connections("tcp"):
            if _is_listening(connection, port) and connection.pid is not None:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "a process that this user cannot see"


def _listens_on(process: psutil.Process, port: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return any(_is_listening(connection, port) for connection in process.net_connections("tcp"))
    return False


def _is_listening(connection: Any, port: int) -> bool:
    return bool(connection.status == psutil.CONN_LISTEN and connection.laddr.port == port)


def _bind_threads(process: psutil.Process, cpus: Sequence[int]) -> None:
    for thread in process.threads():
        with suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cpus)
