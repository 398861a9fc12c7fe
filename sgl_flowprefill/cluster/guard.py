"""Ends what a launcher started, whatever becomes of the launcher.

Runs as a process of its own, outside of the launcher's session, and needs nothing but the standard library. It reads
lines from its standard input: ``session PID`` (the leader of a session to end) and ``directory PATH`` (to remove). At
end of file, when the launcher closes the pipe or dies, it kills every process of these sessions, then removes the
shared memory segments that only they had mapped, and the directories. So an orderly end and a crash take one path.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time

SHM = "/dev/shm/"
PATIENCE_S = 20.0


def main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    before = set(os.listdir(SHM))
    sessions: set[int] = set()
    directories: list[str] = []
    for line in sys.stdin:
        kind, _, value = line.rstrip("\n").partition(" ")
        if kind == "session":
            sessions.add(int(value))
        else:
            directories.append(value)
    end(sessions, before)
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


def end(sessions: set[int], keep: set[str]) -> None:
    """Kill all processes of ``sessions``, and remove the shared memory that only they had mapped, but for ``keep``."""
    segments = kill(sessions)
    in_use = {path for pid in processes() for path in mapped_segments(pid)}
    for path in segments - in_use:
        if os.path.basename(path) not in keep and os.path.exists(path):
            os.unlink(path)


def kill(sessions: set[int]) -> set[str]:
    """Kill all processes of ``sessions`` and wait for their end; returns the shared memory that they had mapped."""
    segments: set[str] = set()
    give_up_s = time.monotonic() + PATIENCE_S
    while alive := [pid for pid in processes() if session_of(pid) in sessions]:
        for pid in alive:
            segments |= mapped_segments(pid)
        for pid in alive:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > give_up_s:
            break
        time.sleep(0.02)
    return segments


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def session_of(pid: int) -> int | None:
    """Session of a process; None when it has ended, be it that nobody has waited for it yet."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            state, _, _, session = file.read().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state in "ZX" else int(session)


def mapped_segments(pid: int) -> set[str]:
    """Files in /dev/shm that a process has mapped."""
    try:
        with open(f"/proc/{pid}/maps") as file:
            return {line[line.index(SHM) :].rstrip("\n") for line in file if SHM in line and "(deleted)" not in line}
    except OSError:
        return set()


if __name__ == "__main__":
    main()
