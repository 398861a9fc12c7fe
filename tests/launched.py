"""``launch.py`` as a process: what it prints and shows while it serves, and that it leaves nothing when it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psutil
import pytest
import requests

from sgl_flowprefill import paths
from sgl_flowprefill.cluster import phases
from sgl_flowprefill.cluster.base import KEY_VARIABLE
from sgl_flowprefill.cluster.gateway import bearer
from sgl_flowprefill.cluster.guard import SHM, look, mapped_segments
from sgl_flowprefill.processes import is_alive
from tests.namespaces import PrivateMemory, unshare
from tests.processes import still_alive
from tests.stopwatch import Stopwatch

ROOT: Final = Path(__file__).parents[1]
START_TIMEOUT_S: Final = 400
KEY: Final = "n0b0dy-shall-see-this"
END_S: Final = 5.0
"""How long a cluster may take to end, however it ends."""
DRAINED_S: Final = 30.0
"""How much longer where SIGTERM lets requests end first: SGLang looks every 5 s whether it is to end, and whether its
last request has, and a gateway stays open for a while."""
GUARD_KILLED: Final = "SIGKILL of the guard"
ENDS: Final = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, GUARD_KILLED]


@contextmanager
def private_memory(shared: Path) -> Iterator[PrivateMemory | None]:
    """A /dev/shm and a /tmp, but for ``shared``, where only what a test starts can leave something; None where nobody
    may have them."""
    with contextlib.chdir(ROOT):
        try:
            unshare("--mount")
        except pytest.skip.Exception:
            yield None
            return
        with PrivateMemory(needed=[ROOT, Path(sys.prefix), paths.cache_dir()], shared=shared) as memory:
            yield memory


class Remembered:
    """Processes, with the shared memory and the directories for temporary files that they have now."""

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self.processes = processes
        self._segments = {inode for process in processes for inode in mapped_segments(process.pid)}
        self._directories = {process.environ().get("TMPDIR", "") for process in processes} - {""}

    @property
    def guard(self) -> psutil.Process:
        return next(process for process in self.processes if is_guard(process))

    @property
    def servers(self) -> list[psutil.Process]:
        """The processes that lead a session of their own, but for the guard."""
        found = [(process, look(process.pid)) for process in self.processes if process != self.guard]
        return [process for process, now in found if now is not None and now.session == process.pid and now.is_alive]

    def assert_nothing_is_left(self, memory: PrivateMemory | None = None, timeout_s: float = 0.0) -> None:
        """Of the processes, and of what they had, which may have been in ``memory``."""
        assert still_alive(self.processes, timeout_s) == []
        assert [path for path in self._directories if os.path.exists(path)] == []
        if memory is None:
            assert [entry.path for entry in os.scandir(SHM) if entry.inode() in self._segments] == []
        else:
            assert memory.files() == []


def is_guard(process: psutil.Process) -> bool:
    """Whether it is the process of a launcher that ends what the launcher has started."""
    try:
        command = process.cmdline()
    except psutil.Error:  # it has ended
        return False
    return bool(command) and command[-1].endswith("guard.py")


class Launch:
    """``launch.py`` as a process. It is not hung up on, whatever the tests were started under, unless it is to be."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        memory: PrivateMemory | None = None,
        env: Mapping[str, str] | None = None,
        under_nohup: bool = False,
    ) -> None:
        self.logs = directory / "logs"
        self.memory = memory
        self._output = directory / "output"
        command = [sys.executable, "launch.py", "--ports", "0", "--log-dir", str(self.logs), *options]
        if memory is not None:
            command = [*memory.prefix, *command]
        # Without Python between fork and exec, where gRPC's handlers of forks may end a process that talks gRPC.
        command = ["env", f"--{'ignore' if under_nohup else 'default'}-signal=HUP", *command]
        with open(self._output, "w") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | (env or {}),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def text(self) -> str:
        return self._output.read_text()

    def wait_for(self, text: str) -> None:
        give_up_s = time.monotonic() + START_TIMEOUT_S
        while text not in self.text():
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < give_up_s, self.text()
            time.sleep(0.2)

    def curl_line(self) -> str:
        self.wait_for("\ncurl ")
        return next(line for line in self.text().splitlines() if line.startswith("curl "))

    @property
    def curl_url(self) -> str:
        """What the curl line asks."""
        return shlex.split(self.curl_line())[1]

    def remember(self) -> Remembered:
        """All that it has started."""
        return Remembered(psutil.Process(self.process.pid).children(recursive=True))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def assert_curl_line_works(launcher: Launch) -> None:
    """In a shell that has the key."""
    curl = launcher.curl_line()
    if shutil.which("curl"):
        env = os.environ | {KEY_VARIABLE: KEY}
        answer = subprocess.run(["sh", "-c", curl], env=env, capture_output=True, check=True).stdout
        assert json.loads(answer)["usage"]["completion_tokens"] == 16


def assert_nobody_sees_the_key(launcher: Launch, *names: str) -> None:
    """Neither in a list of processes nor in what the launcher prints or its servers ``names`` log."""
    started = psutil.Process(launcher.process.pid).children(recursive=True)
    everyone = [psutil.Process(launcher.process.pid), *started]
    commands = [Path(f"/proc/{process.pid}/cmdline").read_bytes() for process in everyone]
    assert [command for command in commands if KEY.encode() in command] == []
    assert_no_output_shows_the_key(launcher, *names)


def assert_no_output_shows_the_key(launcher: Launch, *names: str) -> None:
    assert KEY not in launcher.text()
    logs = sorted(launcher.logs.iterdir())
    assert [log.stem for log in logs] == sorted(names)
    assert [log.name for log in logs if KEY.encode() in log.read_bytes()] == []
    assert "'api_key': '***'" in (launcher.logs / f"{names[-1]}.log").read_text()


def assert_phases_are_told(lines: Sequence[str], logs: Path, *names: str) -> None:
    """``lines`` of a launcher say what its servers ``names`` do while they start, the first of which it waits for."""
    told = [line for line in lines if f"waiting for the {names[0]} server" in line]
    assert told
    waits = [line for line in lines if "waiting for the " in line]
    assert [line for line in waits if "no connection" in line] == []
    known = {name for _, name in phases.PHASES}
    assert {line.split("; ")[1].rstrip(")") for line in told} <= known
    texts = [(logs / f"{name}.log").read_text() for name in names]
    for marker, _ in phases.PHASES:
        elsewhere = "CUDA" in marker or "FlowPrefill measure" in marker  # on a GPU; where there is no profile yet
        assert elsewhere or all(marker in text for text in texts), marker


def end_and_assert_nothing_is_left(launcher: Launch, end: signal.Signals | str, drained_s: float = 0.0) -> None:
    """End it in one of ENDS. Its servers are killed within END_S, also on a busy machine, or after ``drained_s`` more,
    in which requests end. All processes and what they had are gone by then, not counting the time for which some
    process of the machine waited for a CPU."""
    longest_s = END_S + drained_s
    remembered = launcher.remember()
    servers = remembered.servers
    watch = Stopwatch()
    if isinstance(end, signal.Signals):
        launcher.process.send_signal(end)
    else:
        remembered.guard.kill()
    while all(is_alive(server) for server in servers):
        assert watch.passed_s < longest_s, f"{end!r}: no server was killed: {launcher.text()}"
        time.sleep(0.01)
    decided_s = watch.passed_s
    exit_code = launcher.process.wait(20 + drained_s)
    if isinstance(end, signal.Signals):
        assert exit_code == (-end if end == signal.SIGKILL else 128 + end)
    else:
        assert exit_code == 1
        assert "guard has ended (killed by signal 9)" in launcher.text()
    remembered.assert_nothing_is_left(launcher.memory, timeout_s=20)
    took_s, waited_s = watch.passed_s, watch.waited_s
    took = f"{end!r}: killed after {decided_s:.1f} s, nothing is left after {took_s:.1f} s, {waited_s:.1f} s of waiting"
    print(took)
    assert took_s - waited_s < longest_s, took


STREAM_TOKENS: Final = 400
"""Seconds, with the embedded model."""


def assert_a_stream_outlives_sigterm(launcher: Launch, url: str, key: str | None = None) -> None:
    """All its tokens come although the launcher is asked to end after the first, and then nothing is left."""
    sampling = {"max_new_tokens": STREAM_TOKENS, "temperature": 0, "ignore_eos": True}
    request = {"text": "Hello", "sampling_params": sampling, "stream": True}
    headers = bearer(key)
    with (
        ThreadPoolExecutor(1) as pool,
        requests.post(f"{url}/generate", json=request, headers=headers, stream=True, timeout=120) as response,
    ):
        assert response.status_code == 200, response.text
        lines = response.iter_lines()
        assert next(lines).startswith(b"data: {")
        rest = pool.submit(list, lines)
        end_and_assert_nothing_is_left(launcher, signal.SIGTERM, DRAINED_S)
        *_, last = (line for line in rest.result(10) if line.startswith(b"data: {"))
    assert json.loads(last.removeprefix(b"data: "))["meta_info"]["completion_tokens"] == STREAM_TOKENS
    assert "waiting up to 120 s for the requests here to end" in launcher.text()
