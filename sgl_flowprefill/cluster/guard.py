"""Ends what a launcher started, whatever becomes of the launcher.

Runs as a process of its own, outside of the launcher's session, and needs nothing but the standard library. It reads
lines from its standard input: ``keep NAME`` (shared memory of other processes), ``session PID`` (the leader of a
session to end), ``ended PID`` (the session is no more), ``segment INODE`` (shared memory of a session that may end by
itself) and ``directory PATH`` (to remove). At end of file, when the launcher closes the pipe or dies, it kills every
process of these sessions, then removes the shared memory that only they had, and the directories. So an orderly end and
a crash take one path.

A launcher that is interrupted or killed between the start of a process and the line about it has said nothing of that
session. Its leader is known by the directory, which it was given for its temporary files.

The kernel gives the number of a session to no other process while anyone is in it, or its leader has not been reaped.
The launcher reaps a leader only after it has ended the rest of the session and said so. So the number still means the
same session, unless its leader is a process that started at another time.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Collection, Iterable
from typing import NamedTuple

SHM = "/dev/shm/"
PATIENCE_S = 20.0
TRACKER_S = 3.0
"""How long Python's resource trackers have to remove what their processes left, when all other processes have ended."""


class Process(NamedTuple):
    """What ``/proc/PID/stat`` says of a process."""

    pid: int
    state: str
    session: int
    started: int
    """Start of the process in ticks since the machine's start; with ``pid``, it names one process for ever."""

    @property
    def is_alive(self) -> bool:
        """False when it has ended and nobody has waited for it yet."""
        return self.state not in "ZX"


class Session(NamedTuple):
    """A session, by its leader."""

    pid: int
    started: int

    @classmethod
    def led_by(cls, pid: int) -> Session | None:
        """None when there is no such process."""
        leader = look(pid)
        return None if leader is None else cls(pid, leader.started)

    def members(self, running: Collection[Process]) -> list[Process]:
        """The processes of ``running`` that belong to the session and are alive."""
        if any(process.pid == self.pid and process.started != self.started for process in running):
            return []  # everyone in it has ended, and its number belongs to somebody else
        return [process for process in running if process.session == self.pid and process.is_alive]


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    keep: set[str] = set()
    sessions: dict[int, Session] = {}
    directories: list[str] = []
    segments: set[int] = set()
    for line in sys.stdin.buffer:
        kind, _, value = os.fsdecode(line.rstrip(b"\n")).partition(" ")
        if kind == "session":
            session = Session.led_by(int(value))
            if session is not None:
                sessions[session.pid] = session
        elif kind == "ended":
            sessions.pop(int(value), None)
        elif kind == "segment":
            segments.add(int(value))
        elif kind == "directory":
            directories.append(value)
        else:
            keep.add(value)
    end({*sessions.values(), *(session for path in directories for session in led_with(path))}, keep, segments)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def end(sessions: Iterable[Session], keep: set[str], segments: Iterable[int] = ()) -> None:
    """Kill all processes of ``sessions``, and remove the shared memory that only they had, ``segments`` of it before,
    but for ``keep``.
    """
    left = kill(sessions).union(segments)
    if left:
        left -= {inode for process in processes() for inode in mapped_segments(process.pid)}
    for entry in os.scandir(SHM):
        if entry.inode() in left and entry.name not in keep:
            try:
                os.unlink(entry.path)
            except FileNotFoundError:
                continue


def kill(sessions: Iterable[Session]) -> set[int]:
    """Kill all processes of ``sessions`` and wait for their end; returns the shared memory that they had mapped.

    Resource trackers end by themselves when the processes that use them have ended, and then remove their semaphores
    and their shared memory, also what is mapped no more; a tracker that does not is killed.
    """
    sessions = list(sessions)
    segments: set[int] = set()
    begin_s = time.monotonic()
    trackers_until_s: float | None = None
    while alive := _members(sessions):
        for process in alive:
            segments |= mapped_segments(process.pid)
        now_s = time.monotonic()
        trackers = {process for process in alive if _is_resource_tracker(process.pid)}
        if trackers_until_s is None and len(trackers) == len(alive):
            trackers_until_s = now_s + TRACKER_S
        spared = trackers_until_s is None or now_s < trackers_until_s
        for process in alive:
            _send(process, signal.SIGCONT if process in trackers and spared else signal.SIGKILL)
        if now_s - begin_s > PATIENCE_S:
            break
        time.sleep(0.02)
    return segments


def segments_of(session: Session) -> set[int]:
    """The shared memory that the processes of ``session`` have mapped now."""
    return {inode for process in _members([session]) for inode in mapped_segments(process.pid)}


def _members(sessions: Iterable[Session]) -> list[Process]:
    running = processes()
    return [process for session in sessions for process in session.members(running)]


def led_with(directory: str) -> list[Session]:
    """The sessions whose leaders were started with ``directory`` for their temporary files, as far as these have not
    changed their titles since: that overwrites what is read here.
    """
    leaders = (process for process in processes() if process.pid == process.session and process.is_alive)
    return [Session(leader.pid, leader.started) for leader in leaders if _has_for_files(leader.pid, directory)]


def _has_for_files(pid: int, directory: str) -> bool:
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return f"TMPDIR={directory}".encode() in file.read().split(b"\0")
    except OSError:
        return False


def _send(process: Process, number: int) -> None:
    """Send a signal to ``process``, not to one that has got its number since it was looked at."""
    now = look(process.pid)
    if now is not None and (now.session, now.started) == (process.session, process.started):
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            return


def _is_resource_tracker(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return b"multiprocessing.resource_tracker" in file.read()
    except OSError:
        return False


def processes() -> list[Process]:
    """All processes, also those that have ended and that nobody has waited for yet."""
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())
    return [process for process in found if process is not None]


def look(pid: int) -> Process | None:
    """None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # the name in it may be of any bytes
            fields = file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return None
    return Process(pid, fields[0], int(fields[3]), int(fields[19]))


def mapped_segments(pid: int) -> set[int]:
    """Inode numbers of the files in /dev/shm that a process has mapped. Not their paths: a semaphore has got another
    one since it was mapped."""
    try:
        with open(f"/proc/{pid}/maps", "rb") as file:
            return {int(line.split(maxsplit=5)[4]) for line in file if SHM.encode() in line}
    except OSError:
        return set()


if __name__ == "__main__":
    main()
