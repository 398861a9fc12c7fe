"""The guard ends sessions and removes what they leave, also when the launcher is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sgl_flowprefill.cluster.process import Guard

SERVER = """
import subprocess, sys, time
from multiprocessing import resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(segment.name, child.pid, flush=True)
time.sleep(600)
"""


def start(guard, tmp_path):
    """A server with a child process and a shared memory segment; returns its pids and the segment's path."""
    log = tmp_path / "server.log"
    server = guard.start("test", [sys.executable, "-c", SERVER], os.environ, log)
    while not log.read_text().endswith("\n"):
        time.sleep(0.05)
    name, child = log.read_text().split()
    return server, int(child), Path("/dev/shm") / name


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until(done, timeout_s=30):
    """Signals take effect when their process gets a core."""
    give_up_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_leaving_the_context_ends_processes_and_removes_what_they_left(tmp_path):
    with Guard() as guard:
        server, child, segment = start(guard, tmp_path)
        (guard.directory / "socket").touch()
        assert segment.exists()
    assert not psutil.pid_exists(server.pid)
    assert gone(child)
    assert not segment.exists()
    assert not guard.directory.exists()


def test_a_server_stops_with_all_its_processes_and_goes_on(tmp_path):
    with Guard() as guard:
        server, child, _ = start(guard, tmp_path)
        processes = [psutil.Process(pid) for pid in (server.pid, child)]
        server.suspend()
        wait_until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in processes))
        server.resume()
        wait_until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in processes))


def test_shared_memory_of_others_stays(tmp_path):
    segment = Path("/dev/shm") / f"flowprefill-test-{os.getpid()}"
    try:
        with Guard() as guard:
            start(guard, tmp_path)
            segment.touch()
        assert segment.exists()
    finally:
        segment.unlink()


def test_a_server_that_was_killed_is_reported_with_its_last_lines(tmp_path):
    with Guard() as guard:
        server, child, _ = start(guard, tmp_path)
        server.watch_children()
        assert server.ended() is None
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: server.ended() == f"process {child} of the test server has ended")
        os.kill(server.pid, signal.SIGKILL)
        wait_until(lambda: server.ended() == "the test server has ended (killed by signal 9)")
        assert str(child) in server.last_lines()


LAUNCHER = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from sgl_flowprefill.cluster.process import Guard
from tests.unit.test_guard import start
with Guard() as guard:
    server, child, segment = start(guard, pathlib.Path({tmp!r}))
    print(server.pid, child, segment, guard.directory, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_a_launcher_that_is_killed_takes_its_servers_along(tmp_path, number):
    root = str(Path(__file__).parents[2])
    script = LAUNCHER.format(root=root, tmp=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server, child, segment, directory = launcher.stdout.readline().split()
    launcher.send_signal(number)
    launcher.wait()
    wait_until(lambda: gone(int(server)) and not Path(directory).exists(), timeout_s=10)
    assert gone(int(server))
    assert gone(int(child))
    assert not Path(segment).exists()
    assert not Path(directory).exists()
