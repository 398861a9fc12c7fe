"""The guard ends sessions and removes what they leave, also when the launcher is killed."""

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from sgl_flowprefill.cluster.base import StartError
from sgl_flowprefill.cluster.process import Guard
from sgl_flowprefill.processes import is_alive
from tests.namespaces import unshare_pids

SERVER = """
import subprocess, sys, tempfile, time
from multiprocessing import get_context, resource_tracker, shared_memory
segment = shared_memory.SharedMemory(create=True, size=4096)
resource_tracker.unregister(segment._name, "shared_memory")
semaphore = get_context("spawn").Semaphore(1)
resource_tracker.unregister(semaphore._semlock.name, "semaphore")
passed_on = shared_memory.SharedMemory(create=True, size=4096)
passed_on.close()  # mapped by nobody now
file = tempfile.NamedTemporaryFile(delete=False)
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=subprocess.PIPE)
child.stdout.readline()
names = [f"/dev/shm/{{name}}" for name in (segment.name, f"sem.{{semaphore._semlock.name[1:]}}", passed_on.name)]
print(child.pid, *names, file.name, flush=True)
time.sleep(600)
"""
CHILD = """
import time, setproctitle
setproctitle.setproctitle("sglang::scheduler")
print(flush=True)
time.sleep(600)
"""


def start(guard, tmp_path, child=CHILD):
    """A server with a child process; returns both, and the paths of what a server leaves when it is killed: shared
    memory, a semaphore and a temporary file."""
    log = tmp_path / "server.log"
    server = guard.start("test", [sys.executable, "-c", SERVER.format(child=child)], os.environ, log)
    while not log.read_text().endswith("\n"):
        assert server.ended() is None, log.read_text()
        time.sleep(0.05)
    pid, *left = log.read_text().split()
    return server, int(pid), [Path(path) for path in left]


def gone(pid):
    return not psutil.pid_exists(pid) or not is_alive(psutil.Process(pid))


def wait_until(done, timeout_s=30):
    """Signals take effect when their process gets a core."""
    give_up_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < give_up_s
        time.sleep(0.01)


def test_leaving_the_context_ends_processes_and_removes_what_they_left(tmp_path):
    with Guard() as guard:
        server, child, left = start(guard, tmp_path)
        assert [path for path in left if not path.exists()] == []
    assert not psutil.pid_exists(server.pid)
    assert gone(child)
    assert [path for path in left if path.exists()] == []
    assert not guard.directory.exists()


def test_one_server_is_ended_with_all_that_it_left_and_others_stay(tmp_path):
    (tmp_path / "other").mkdir()
    with Guard() as guard:
        server, child, left = start(guard, tmp_path)
        other, _, others = start(guard, tmp_path / "other")
        server.suspend()
        guard.end(server)
        assert gone(server.pid)
        assert gone(child)
        assert [path for path in left[:3] if path.exists()] == []
        assert other.ended() is None
        assert [path for path in others if not path.exists()] == []


@pytest.mark.parametrize("is_guard_alive", [True, False])
def test_what_a_server_leaves_that_ends_when_it_is_asked_to_is_removed(tmp_path, is_guard_alive):
    with Guard() as guard:
        server, child, left = start(guard, tmp_path)
        guard.ask_to_end(server)
        psutil.Process(child).kill()
        wait_until(lambda: server.ended() and gone(child))
        assert left[0].exists()
        if not is_guard_alive:
            os.kill(guard.pid, signal.SIGKILL)
    assert [path for path in left if path.exists()] == []


def test_servers_end_without_the_guard(tmp_path):
    with Guard() as guard:
        server, child, left = start(guard, tmp_path)
        assert guard.ended() is None
        os.kill(guard.pid, signal.SIGKILL)
        wait_until(lambda: guard.ended() == "the launcher's guard has ended (killed by signal 9)")
        another, _, more = start(guard, tmp_path)
        begin_s = time.monotonic()
    assert time.monotonic() - begin_s < 5
    assert [pid for pid in (server.pid, child, another.pid) if not gone(pid)] == []
    assert [path for path in (*left, *more, guard.directory) if path.exists()] == []


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


def test_a_directory_for_temporary_files_that_cannot_be_made_ends_the_start_in_one_sentence(monkeypatch):
    def refuse(path, **how):
        raise OSError(errno.EROFS, "Read-only file system")

    guard = Guard()
    monkeypatch.setattr(Path, "mkdir", refuse)
    reason = r"/tmp/flowprefill-\w+ cannot be made \(Read-only file system\); give this user a /tmp to write to"
    with pytest.raises(StartError, match=reason), guard:
        pytest.fail("it has started")
    assert guard.ended() == "the launcher's guard has ended (exit code 0)"


UNREADABLE = """
import mmap, os, sys, time
with open("/proc/self/comm", "wb") as file:
    file.write(b"\\xc3(")
with open(os.path.join(os.fsencode(sys.argv[1]), b"\\xe8"), "wb+") as file:
    file.truncate(1)
    mapped = mmap.mmap(file.fileno(), 1)
print(flush=True)
time.sleep(600)
"""
"""Neither its name nor that of a file that it maps is UTF-8."""


@pytest.mark.parametrize("whose", ["a server's", "somebody else's"])
def test_names_that_are_no_utf_8_do_not_keep_the_guard_from_its_work(tmp_path, whose):
    command = [sys.executable, "-c", UNREADABLE, str(tmp_path)]
    child = f"import os, sys; os.execv(sys.executable, {command!r})" if whose == "a server's" else CHILD
    segment = Path("/dev/shm") / os.fsdecode(b"flowprefill-test-%d-\xe8" % os.getpid())
    segment.touch()
    other = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with Guard() as guard:
            server, pid, left = start(guard, tmp_path, child=child)
        assert guard.ended() == "the launcher's guard has ended (exit code 0)"
        assert gone(server.pid)
        assert gone(pid)
        assert [path for path in left if path.exists()] == []
        assert not gone(other.pid)
        assert segment.exists()
    finally:
        segment.unlink()
        other.kill()
        other.communicate()


@pytest.mark.parametrize("guarded", [True, False])
def test_a_process_that_reports_ends_with_all_that_it_left(tmp_path, guarded):
    with Guard() as guard:
        command = [sys.executable, "-c", SERVER.format(child=CHILD)]
        process = guard.follow(command, os.environ, tmp_path / "log")
        child, *left = process.stdout.readline().split()
        assert [path for path in left if not Path(path).exists()] == []
        if not guarded:
            os.kill(guard.pid, signal.SIGKILL)
    wait_until(lambda: gone(process.pid))
    assert gone(int(child))
    assert [path for path in left if Path(path).exists()] == []


def test_what_a_server_made_before_the_guard_has_started_is_removed(tmp_path):
    with Guard() as guard:
        os.kill(guard.pid, signal.SIGSTOP)
        _, _, left = start(guard, tmp_path)
        os.kill(guard.pid, signal.SIGCONT)
    assert [path for path in left if path.exists()] == []


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


def test_a_helper_of_a_library_may_end(tmp_path):
    with Guard() as guard:
        server, child, _ = start(guard, tmp_path, child="import time; print(flush=True); time.sleep(600)")
        server.watch_children()
        os.kill(child, signal.SIGTERM)
        wait_until(lambda: gone(child))
        assert server.ended() is None


LAUNCHER = """
import pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)  # whatever started the tests may have these ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {root!r})
from sgl_flowprefill.cluster.process import Guard
from tests.unit.test_guard import start
with Guard() as guard:
    server, child, left = start(guard, pathlib.Path({tmp!r}))
    print(server.pid, child, *left, guard.directory, flush=True)
    time.sleep(600)
"""
ROOT = str(Path(__file__).parents[2])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_launcher_that_is_killed_takes_its_servers_along(tmp_path, number):
    script = LAUNCHER.format(root=ROOT, tmp=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    server, child, *left = launcher.stdout.readline().split()
    assert len(left) == 5
    launcher.send_signal(number)
    launcher.wait()
    wait_until(lambda: gone(int(server)) and not Path(left[-1]).exists(), timeout_s=10)
    assert gone(int(server))
    assert gone(int(child))
    assert [path for path in left if Path(path).exists()] == []


INTERRUPTED = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sgl_flowprefill.cluster.process import Guard

class Interrupted(subprocess.Popen):
    def __init__(self, command, **options):
        super().__init__(command, **options)
        if command[0] == "sleep":
            print(self.pid, flush=True)
            os.kill(os.getpid(), {number})
            time.sleep(60)

subprocess.Popen = Interrupted
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
with Guard() as guard:
    print(guard.directory, flush=True)
    if not {guarded}:
        os.kill(guard.pid, signal.SIGKILL)
    getattr(guard, {method!r})(*{arguments!r}, os.environ, Path({log!r}))
"""


@pytest.mark.parametrize("method", ["start", "follow"])
@pytest.mark.parametrize(
    ("number", "guarded"), [(signal.SIGTERM, True), (signal.SIGTERM, False), (signal.SIGKILL, True)]
)
def test_a_launcher_that_is_ended_while_it_starts_a_process_takes_it_along(tmp_path, method, number, guarded):
    """Before it could tell the guard of it."""
    command = ["sleep", "600"]
    arguments = ["test", command] if method == "start" else [command]
    script = INTERRUPTED.format(
        number=int(number), guarded=guarded, method=method, arguments=arguments, log=str(tmp_path / "log")
    )
    launcher = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert launcher.returncode == (-number if number == signal.SIGKILL else 128 + number)
    directory, pid = launcher.stdout.split()
    try:
        wait_until(lambda: gone(int(pid)))
        wait_until(lambda: not Path(directory).exists())
    finally:
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


RECYCLED = """
import os, pathlib, subprocess, sys, time
sys.path.insert(0, {root!r})
from sgl_flowprefill.cluster import guard as program
from sgl_flowprefill.cluster.process import Guard

def another_with(pid, *command):
    "A process that has nothing to do with a guard, leads a session and has got this number; None if it cannot."
    for _ in range(20):
        with open("/proc/sys/kernel/ns_last_pid", "w") as file:
            file.write(str(pid - 1))
        other = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
        if other.pid == pid:
            return other
        other.kill()
        other.wait()

{script}
"""


def in_a_pid_namespace(script):
    """What a script prints that can choose the numbers of its processes."""
    command = [*unshare_pids(), sys.executable, "-c", RECYCLED.format(root=ROOT, script=script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_the_number_of_a_server_stays_its_own_until_its_session_has_ended():
    assert in_a_pid_namespace("""
with Guard() as guard:
    server = guard.start("test", ["true"], os.environ, pathlib.Path(os.devnull))
    while server.ended() is None:
        time.sleep(0.01)
    print(another_with(server.pid, "sleep", "60"))
    guard.end(server)
    other = another_with(server.pid, "sh", "-c", "sleep 60 & echo $!")
    of_its_session = int(other.stdout.readline())
    other.wait()
print(program.look(of_its_session).is_alive)
""") == ["None", "True"]


def test_the_number_of_a_process_that_was_waited_for_is_free():
    assert in_a_pid_namespace("""
with Guard() as guard:
    process = guard.follow(["sleep", "1"], os.environ, pathlib.Path(os.devnull))  # the guard looks at it meanwhile
    guard.wait(process)
    other = another_with(process.pid, "sh", "-c", "sleep 60 & echo $!")
    of_its_session = int(other.stdout.readline())
    other.wait()
print(process.returncode, program.look(of_its_session).is_alive)
""") == ["0", "True"]


def test_what_is_left_of_a_process_that_was_waited_for_is_ended_and_others_stay(tmp_path):
    with Guard() as guard:
        process, other = (
            guard.follow(["sh", "-c", f"sleep 600 & echo $!; {last}"], os.environ, tmp_path / "log")
            for last in ("exit 3", "wait")
        )
        child, of_other = (int(each.stdout.readline()) for each in (process, other))
        guard.wait(process)
        assert process.returncode == 3
        assert gone(child)
        assert not gone(of_other)
    assert gone(of_other)


def test_a_session_with_a_recycled_number_is_left_alone():
    """The launcher dies, so that its dead servers are reaped, and another process is quick to get a number."""
    assert in_a_pid_namespace("""
server = subprocess.Popen(["sleep", "60"], start_new_session=True)
command = [sys.executable, "-S", program.__file__]
guard = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
guard.stdin.write(f"session {server.pid}\\n")
guard.stdin.flush()
time.sleep(1)
server.kill()
server.wait()
other = another_with(server.pid, "sleep", "60")
guard.stdin.close()
guard.wait()
print(other.poll())
""") == ["None"]


def test_what_is_left_of_a_session_ends_although_its_leader_is_gone(tmp_path):
    assert in_a_pid_namespace(f"""
with Guard() as guard:
    command = ["sh", "-c", "sleep 60 & echo $!"]
    log = pathlib.Path({str(tmp_path)!r}) / "log"
    server = guard.start("test", command, os.environ, log)
    while server.ended() is None:
        time.sleep(0.01)
    child = int(log.read_text())
    print(program.look(child).is_alive)
child = program.look(child)
print(child is not None and child.is_alive)
""") == ["True", "False"]
