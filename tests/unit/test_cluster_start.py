"""What a cluster says while it waits for its servers, and when it stops to wait."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO

import psutil
import pytest
import requests

from sgl_flowprefill.cluster import ClusterConfig, ClusterError, cli, free_ports, machine, phases, preflight, waiting
from sgl_flowprefill.cluster.cluster import Cluster, answers_first_request
from sgl_flowprefill.cluster.gateway import Gateway, Routing, Worker
from sgl_flowprefill.cluster.members import ENSURE_S, Members
from sgl_flowprefill.cluster.process import Guard, Server, listener
from sgl_flowprefill.cluster.saying import say
from sgl_flowprefill.cluster.waiting import Waiting
from tests.http_server import answering


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    monkeypatch.setattr(waiting, "PROGRESS_S", 0.1)


def first_request(url, said, **config):
    """The first request of a cluster whose gateway is at ``url``."""
    config = ClusterConfig(flowprefill=False, **config)
    waiting = Waiting(config, lambda: None, said.append)
    waiting.until("a first request", partial(answers_first_request, url, config.api_key))


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "same --api-key"), (403, "same --api-key"), (400, "the logs"), (404, "the logs"), (422, "the logs")],
)
def test_an_answer_that_waiting_does_not_change_ends_the_start_at_once(status, remedy, monkeypatch):
    monkeypatch.setattr(waiting, "PROGRESS_S", 10.0)
    said, begin_s = [], time.monotonic()
    with (
        answering(lambda path, headers: (status, '{"error":\n "no such thing"}')) as url,
        pytest.raises(ClusterError, match=f'a first request: HTTP {status} {{"error": "no such thing"}}; .*{remedy}'),
    ):
        first_request(url, said, startup_timeout_s=30)
    assert time.monotonic() - begin_s < 10
    assert said == []


def test_what_was_answered_is_shown_while_it_waits_and_at_the_end():
    said = []
    with (
        answering(lambda path, headers: (503, "busy " * 1000)) as url,
        pytest.raises(ClusterError, match=r"did not come up within 2 s \(--startup-timeout-s\): HTTP 503 busy busy"),
    ):
        first_request(url, said, startup_timeout_s=2)
    shown = next(line for line in said if "HTTP" in line)
    assert re.match(r"waiting for a first request \(\d s; HTTP 503 busy busy", shown)
    assert len(shown) < 400


def test_a_gateway_that_nobody_listens_at():
    with answering(lambda path, headers: (200, "")) as url:
        pass
    with pytest.raises(ClusterError, match="no connection"):
        first_request(url, [], startup_timeout_s=1.5)


def test_a_key_is_shown_with_every_request():
    seen = []

    def answer(path, headers):
        seen.append((path, headers["Authorization"]))
        return 200, '{"workers": [{"id": "7", "url": "http://there"}]}'

    with answering(answer) as url:
        first_request(url, [], api_key="secret")
        gateway = Gateway(url, "secret")
        gateway.ensure(Worker("decode", "http://here", None))
        gateway.remove("http://there")
    assert {key for path, key in seen} == {"Bearer secret"}
    assert {path for path, key in seen} == {"/generate", "/workers", "/workers/7"}


def test_a_worker_that_is_gone_already_can_be_removed():
    def answer(path, headers):
        return (200, '{"workers": [{"id": "7", "url": "http://there"}]}') if path == "/workers" else (404, "")

    with answering(answer) as url:
        Gateway(url).remove("http://there")


@pytest.mark.parametrize("role", ["unified", "decode"])
def test_requests_go_to_a_unified_server_only_through_a_gateway_that_is_ready(role):
    """A gateway of prefill and decode servers lists it as well."""
    ready = [503]

    def answer(path, headers):
        if path == "/readiness":
            return ready[0], "insufficient healthy workers"
        return 200, '{"workers": [{"id": "7", "url": "http://here", "is_healthy": true}]}'

    with answering(answer) as url:
        gateway, worker = Gateway(url), Worker(role, "http://here", None)
        if role == "unified":
            with pytest.raises(requests.HTTPError):
                gateway.ensure(worker)
            ready[0] = 200
        assert gateway.ensure(worker)


class FakeGuard:
    """Starts servers that sleep."""

    def __init__(self, directory):
        self.directory = directory
        self.started, self.killed = [], []
        self.how = None

    def start(self, name, command, env, log):
        sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.started.append(Server(name, sleeping, os.environ, self.directory / f"{len(self.started)}.log"))
        return self.started[-1]

    def ask_to_end(self, server):
        server.terminate()

    def end(self, server):
        self.killed.append(server)

    def ended(self):
        return self.how


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@dataclass
class Restarting:
    """Two prefill servers; the first one was started again, and does not answer."""

    config: ClusterConfig
    guard: FakeGuard
    gateway: Gateway
    members: Members
    said: list[str]
    clock: Clock

    def __post_init__(self):
        self.first, self.second, *others = self.members
        for member in (self.second, *others):
            self.members.is_up(member)

    def await_first(self, timeout_s):
        def check():
            for server in self.members.servers:
                server.check()

        waiting = Waiting(replace(self.config, startup_timeout_s=timeout_s), check, self.said.append)
        waiting.until("the prefill-0 server", self.first.is_healthy, partial(self.members.phases, self.first))


@pytest.fixture
def restarting(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    config = cli.parse(["--prefill", "2", "--ports", "0", "--startup-timeout-s", "5"])
    layout = preflight.prepare(config)
    guard, gateway, said, clock = FakeGuard(tmp_path / "logs"), Gateway(layout.url), [], Clock()
    members = Members(layout, gateway, guard, said.append, clock)
    members.launch()
    for member in members:
        member.start_at_s = clock.now_s
    yield Restarting(config, guard, gateway, members, said, clock)
    for server in guard.started:
        server.terminate()
        server.reap()


def test_a_server_whose_port_was_taken_while_it_started_is_not_waited_for(restarting):
    server = restarting.first.server
    with open(server.log, "a") as log:
        log.write("INFO:     Application startup complete.\n")
        log.write(
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1): address already in use\n"
        )
    with pytest.raises(
        ClusterError, match=r"cannot listen at http://127.0.0.1:.* its port was taken .*; try again"
    ) as error:
        restarting.await_first(timeout_s=60)
    assert "[Errno 98]" in str(error.value)


def test_a_server_that_cannot_listen_after_a_restart_is_started_again_without_waiting_for_its_time(restarting):
    member = restarting.first
    server = member.server
    with open(server.log, "a") as log:
        log.write("ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 1)\n")
    while member.server is server and member.seen is None:
        restarting.members.check()
        time.sleep(0.01)
    assert restarting.guard.killed == [server]
    assert "the prefill-0 server cannot listen at http://127.0.0.1:" in restarting.said[0]
    assert "started again in 1 s" in restarting.said[0]


@pytest.mark.parametrize("again", [False, True])
def test_a_server_is_not_up_because_another_process_answers_at_its_port(restarting, again):
    member = restarting.first
    server = member.server
    with answering(lambda path, headers: (200, "")) as member.url:
        port = member.url.rpartition(":")[2]
        how = f"port {port}, which the prefill-0 server is to have, was taken while it started: "
        how += rf"process {os.getpid()} \("
        if again:
            while member.server is server:
                assert member.up_since_s is None
                restarting.members.check()
                time.sleep(0.01)
            assert re.search(how, restarting.said[0])
            assert restarting.guard.killed == [server]
        else:
            with pytest.raises(ClusterError, match=f"{how}.* answers there; choose another port with --ports"):
                restarting.await_first(timeout_s=60)
    assert member.up_since_s is None


LISTENING = """
import socket, subprocess, sys, time
if len(sys.argv) > 1:
    subprocess.Popen([sys.executable, "-c", sys.argv[1]]).wait()
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("of_a_child", [False, True])
def test_a_server_listens_where_it_or_its_child_does(tmp_path, of_a_child):
    command = [sys.executable, "-c", LISTENING, *([LISTENING] if of_a_child else [])]
    with Guard() as guard, socket.create_server(("127.0.0.1", 0)) as others:
        server = guard.start("test", command, os.environ, tmp_path / "log")
        while not server.log.read_text().endswith("\n"):
            assert server.ended() is None
            time.sleep(0.01)
        assert server.listens_on(int(server.log.read_text()))
        assert not server.listens_on(others.getsockname()[1])


@pytest.mark.parametrize("method", ["children", "net_connections"])
@pytest.mark.parametrize(
    "error", [psutil.AccessDenied(1), PermissionError("/proc/1/fd"), RuntimeError("a line of /proc/net/tcp")], ids=repr
)
def test_a_server_whose_sockets_cannot_be_looked_at_is_taken_to_listen(tmp_path, monkeypatch, method, error):
    def refuse(process, *args, **kwargs):
        raise error

    sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
    with Guard() as guard, socket.create_server(("127.0.0.1", 0)) as others:
        server, port = guard.start("test", sleeping, os.environ, tmp_path / "log"), others.getsockname()[1]
        assert not server.listens_on(port)
        with monkeypatch.context() as patch:
            patch.setattr(psutil.Process, method, refuse)
            assert server.listens_on(port)


def test_who_listens_is_told_without_a_name_where_it_cannot_be_looked_at(monkeypatch):
    def refuse(kind):
        raise RuntimeError("a line of /proc/net/tcp")

    monkeypatch.setattr(psutil, "net_connections", refuse)
    assert listener(1) == "a process that this user cannot see"


def test_a_server_that_ends_while_its_sockets_are_looked_at_has_not_lost_its_port(restarting, monkeypatch):
    member = restarting.first
    server = member.server

    def end_meanwhile(port):
        server.terminate()
        os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        return False

    monkeypatch.setattr(server, "listens_on", end_meanwhile)
    with answering(lambda path, headers: (200, "")) as member.url:
        assert member.is_healthy()
    assert "killed by signal 15" in server.ended()


def test_a_server_that_does_not_come_back_in_time_is_started_again(restarting):
    member = restarting.first
    server = member.server
    while member.seen is None:
        restarting.members.check()
        time.sleep(0.01)
    assert member.server is server
    restarting.clock.now_s += 6
    restarting.members.check()
    assert member.server is None
    assert restarting.guard.killed == [server]
    said = restarting.said[0]
    assert "the prefill-0 server did not come up within 5 s (--startup-timeout-s): no connection. The" in said
    assert "started again in 1 s" in said
    restarting.clock.now_s += 1
    restarting.members.check()
    assert member.server is restarting.guard.started[-1]


def test_a_server_is_started_again_although_its_logs_were_removed(restarting):
    member, clock = restarting.second, restarting.clock
    restarting.members.is_up(restarting.first)
    shutil.rmtree(member.server.log.parent)
    psutil.Process(member.server.pid).kill()
    while member.server is not None:
        restarting.members.check()
    assert "prefill-1 server has ended (killed by signal 9)" in restarting.said[0]
    clock.now_s += 1
    restarting.members.check()
    assert member.server is restarting.guard.started[-1]
    assert member.server.log.exists()


def test_a_server_whose_log_cannot_be_written_is_started_again_later(restarting):
    member, clock, folder = restarting.second, restarting.clock, restarting.guard.directory
    restarting.members.is_up(restarting.first)
    shutil.rmtree(folder)
    folder.touch()
    psutil.Process(member.server.pid).kill()
    while member.server is not None:
        restarting.members.check()
    clock.now_s += 1
    restarting.members.check()
    assert member.server is None
    assert "the prefill-1 server cannot be started: the log " in restarting.said[1]
    assert "It is started again in 2 s; the others go on" in restarting.said[1]
    folder.unlink()
    clock.now_s += 2
    restarting.members.check()
    assert member.server is restarting.guard.started[-1]


def test_the_last_server_of_its_role_that_does_not_come_back_ends_the_cluster(restarting):
    restarting.clock.now_s += 6
    restarting.second.up_since_s = None
    with pytest.raises(ClusterError, match="prefill-0 server did not come up within 5 s"):
        restarting.members.check()


@contextmanager
def nobody_answers():
    """URL of a server that takes requests and lets them wait."""
    end = threading.Event()

    def answer(path, headers):
        end.wait()
        return 503, ""

    with answering(answer) as url:
        try:
            yield url
        finally:
            end.set()


def check_until_it_raises(members, timeout_s):
    """What ``check`` raises, called as often as ``wait`` does, within ``timeout_s``."""
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < timeout_s:
        try:
            members.check()
        except ClusterError as error:
            assert time.monotonic() - begin_s < timeout_s
            return str(error)
        time.sleep(0.01)
    pytest.fail(f"nothing was noticed within {timeout_s} s")


def test_the_end_of_a_server_is_noticed_while_another_one_does_not_answer(restarting):
    with nobody_answers() as url:
        restarting.first.url = url
        restarting.members.check()
        assert restarting.first.health is not None
        psutil.Process(restarting.second.server.pid).kill()
        assert "prefill-1 server has ended (killed by signal 9)" in check_until_it_raises(restarting.members, 2)


def test_the_end_of_a_server_is_noticed_while_the_gateway_does_not_answer(restarting):
    restarting.members.is_up(restarting.first)
    with nobody_answers() as restarting.gateway.url:
        first, second = (psutil.Process(member.server.pid) for member in (restarting.first, restarting.second))
        first.kill()
        while not restarting.said:
            restarting.members.check()
        second.kill()
        assert "prefill-1 server has ended (killed by signal 9)" in check_until_it_raises(restarting.members, 2)
    assert "prefill-0 server has ended (killed by signal 9)" in restarting.said[0]


def test_a_gateway_that_answers_again_hears_of_all_that_has_happened_in_order(restarting):
    heard, on, members = [], threading.Event(), restarting.members
    members.is_up(restarting.first)
    restarting.clock.now_s = ENSURE_S - 0.5

    def answer(path, headers):
        on.wait()
        heard.append(path)
        return 200, json.dumps({"workers": [{"id": "7", "url": restarting.first.url}]})

    with answering(answer) as restarting.gateway.url:
        psutil.Process(restarting.first.server.pid).kill()
        while restarting.first.server:
            members.check()
        restarting.clock.now_s = ENSURE_S
        members.check()
        on.set()
        while len(heard) < 3:
            members.check()
            time.sleep(0.01)
    assert heard[:3] == ["/workers", "/workers/7", "/workers"]


def test_servers_end_although_their_gateway_does_not_answer(restarting):
    with nobody_answers() as restarting.gateway.url:
        begin_s = time.monotonic()
        restarting.members.leave_all()
    assert time.monotonic() - begin_s < 4.5


def test_the_end_of_the_guard_ends_the_cluster(tmp_path):
    guard = FakeGuard(tmp_path)
    guard.how = "the launcher's guard has ended (killed by signal 9)"
    with pytest.raises(ClusterError, match="without it, servers could outlive the launcher"):
        Cluster(ClusterConfig(flowprefill=False), guard=guard).check()


@pytest.mark.parametrize("waits_for", ["gateway", "requests"])
def test_the_end_of_the_guard_ends_the_wait_for_requests_to_end(waits_for, restarting, tmp_path):
    script = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    busy = Server("prefill-2", [sys.executable, "-c", script], os.environ, tmp_path / "busy")
    while not busy.log.read_text():
        time.sleep(0.01)
    restarting.guard.how = "the launcher's guard has ended (killed by signal 9)"
    cluster = Cluster(restarting.config, guard=restarting.guard)
    gateway = nobody_answers() if waits_for == "gateway" else answering(lambda path, headers: (200, '{"workers": []}'))
    begin_s = time.monotonic()
    try:
        with gateway as url:
            restarting.gateway.url = url
            with pytest.raises(ClusterError, match="without it, servers could outlive the launcher"):
                restarting.members.drain([busy], cluster.check_guard)
            assert time.monotonic() - begin_s < 5
    finally:
        psutil.Process(busy.pid).kill()
        busy.reap()


def test_servers_may_end_while_the_guard_lives(restarting):
    with answering(lambda path, headers: (200, '{"workers": []}')) as url:
        restarting.gateway.url = url
        restarting.members.drain(restarting.members.servers, lambda: None)
    assert all(server.ended() for server in restarting.members.servers)


def test_the_end_of_a_server_is_noticed_while_another_one_hangs_as_it_starts(restarting):
    with nobody_answers() as restarting.first.url:
        psutil.Process(restarting.second.server.pid).kill()
        begin_s = time.monotonic()
        with pytest.raises(ClusterError, match="prefill-1 server has ended"):
            restarting.await_first(timeout_s=5)
    assert time.monotonic() - begin_s < 2


LOG = """
launch.py: importing sglang.launch_server
launch_server.py:71: UserWarning: 'python -m sglang.launch_server' is still supported
[2026-11-28 16:10:13] server_args={'model_path': '/models/embedded'}
[2026-11-28 16:10:38] Init parallel begin.
[2026-11-28 16:10:40] Load weight begin. avail mem=18.50 GB
Multi-thread loading shards:   0% Completed | 0/1 [00:00<?, ?it/s]
[2026-11-28 16:10:40] Load weight end. elapsed=0.12 s, type=LlamaForCausalLM, avail mem=18.47 GB
[2026-11-28 16:10:42] Memory pool end. avail mem=17.82 GB
[2026-11-28 16:10:43] FlowPrefill measures prefill times of 16 to 8192 tokens
[2026-11-28 16:10:55] FlowPrefill measured 36 prefills in 12.0 s
[2026-11-28 16:10:56] INFO:     Uvicorn running on http://127.0.0.1:24792 (Press CTRL+C to quit)
[2026-11-28 16:10:57] The server is fired up and ready to roll!
"""
"""Log of a prefill server on the CPU, shortened."""


def test_the_log_says_what_a_server_does(tmp_path):
    log, seen = tmp_path / "log", []
    assert phases.phase(log, 0) is None
    log.write_text(LOG)  # of an earlier start
    start = len(LOG)
    for line in LOG.splitlines(keepends=True):
        with open(log, "a") as file:
            file.write(line)
        if phases.phase(log, start) not in seen:
            seen.append(phases.phase(log, start))
    assert seen == [
        None,
        "importing SGLang",
        "starting its processes",
        "initialising the device",
        "loading weights",
        "allocating the KV cache",
        "setting up the scheduler",
        "measuring prefill times",
        "warming up",
        "ready",
    ]


def test_it_is_said_what_servers_do_while_they_start(restarting):
    said = restarting.said
    restarting.second.up_since_s = None
    first, second = (member.server.log for member in (restarting.first, restarting.second))
    first.write_text(LOG[: LOG.index("Load weight end")])
    with pytest.raises(ClusterError, match=r"did not come up within 1\.5 s"):
        restarting.await_first(timeout_s=1.5)
    assert said[0] == f"waiting for the prefill-0 server (0 s; loading weights; prefill-1: its log is {second})"
    with (
        answering(lambda path, headers: (500, "broken")) as restarting.first.url,
        pytest.raises(ClusterError, match="broken"),
    ):
        restarting.await_first(timeout_s=1.5)
    assert said[-1].endswith(f" s; loading weights; prefill-1: its log is {second}; HTTP 500 broken)")


URLS = ["http://here", "http://there"]


def test_it_is_said_what_a_gateway_does_while_it_starts():
    said, workers = [], [{"url": "http://here", "is_healthy": True}]
    waiting = Waiting(ClusterConfig(flowprefill=False, startup_timeout_s=1.5), lambda: None, said.append)
    with answering(lambda path, headers: (200, "")) as url:
        pass
    routing = Routing(Gateway(url), URLS)
    with pytest.raises(ClusterError, match="no connection"):
        waiting.until("the gateway", routing.is_complete, routing.phase)
    assert {line.split("; ")[1] for line in said} == {"starting)"}
    said.clear()
    with answering(lambda path, headers: (200, json.dumps({"workers": workers}))) as url:
        routing = Routing(Gateway(url), URLS)
        workers.append({"url": "http://there", "is_healthy": False})
        with pytest.raises(ClusterError):
            waiting.until("the gateway", routing.is_complete, routing.phase)
        assert said[-1].endswith("s; it has found 1 of 2 servers healthy)")
        workers[1]["is_healthy"] = True
        waiting.until("the gateway", routing.is_complete, routing.phase)


@pytest.mark.parametrize(
    ("urls", "healthy", "is_complete"),
    [
        (URLS, ["http://here", "http://there"], True),
        (URLS, ["http://there", "http://foreign", "http://here"], True),
        (URLS, ["http://here", "http://foreign"], False),
        ([], [], True),
        ([], ["http://foreign"], True),
    ],
)
def test_a_gateway_has_started_when_it_routes_to_the_servers_here_whoever_else_has_joined(urls, healthy, is_complete):
    sick = [{"url": "http://late", "is_healthy": False}]
    workers = [{"url": url, "is_healthy": True} for url in healthy] + sick
    with answering(lambda path, headers: (200, json.dumps({"workers": workers}))) as url:
        routing = Routing(Gateway(url), urls)
        assert routing.is_complete() == is_complete
        assert routing.phase() == f"it has found {len(set(urls) & set(healthy))} of {len(urls)} servers healthy"


@pytest.mark.parametrize(("before", "ends"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_hanging_up_ends_a_launcher_unless_it_was_started_under_nohup(before, ends, monkeypatch):
    seen = []

    def serve(config):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        seen.append("goes on")

    monkeypatch.setattr(cli, "serve", serve)
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    signal.signal(signal.SIGHUP, before)
    try:
        if ends:
            with pytest.raises(SystemExit) as end:
                cli.main(["--role", "gateway", "--ports", "0"])
            assert end.value.code == 128 + signal.SIGHUP
        else:
            assert cli.main(["--role", "gateway", "--ports", "0"]) == 0
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    assert seen == ([] if ends else ["goes on"])


class NobodyReads(StringIO):
    """A standard output whose reader is gone."""

    tried = 0

    def write(self, text):
        self.tried += 1
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_a_launcher_whose_output_nobody_reads_goes_on_and_says_no_more(monkeypatch):
    output = NobodyReads()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, output)
        say("first", name)
        assert output.tried == 1
        say("second", name)
        assert output.tried == 1, "the second goes nowhere"
        output.tried = 0


STAND_IN = """
import json, signal, sys, threading, time, urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

takes_s, *command = sys.argv[1:]
urls = [word for word in command if word.startswith("http://")]  # of a gateway, its servers

def value(option):
    return command[command.index(option) + 1]

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"workers": [{"id": url, "url": url, "is_healthy": True} for url in urls]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *args):
        pass

def end():
    time.sleep(float(takes_s))
    for url in urls:
        urllib.request.urlopen(url, timeout=10).read()
    print("ended", len(urls), flush=True)
    server.shutdown()

def asked(number, frame):
    print("asked to end", flush=True)
    threading.Thread(target=end).start()

signal.signal(signal.SIGTERM, asked)
server = ThreadingHTTPServer((value("--host"), int(value("--port"))), Handler)
server.serve_forever()
"""
"""A server or gateway that answers everything, and ends a while after it is asked to, when its servers still answer."""


class StandIns(Guard):
    """Starts stand-ins for servers, which take ``takes_s`` to end."""

    def __init__(self, takes_s):
        self.takes_s = takes_s

    def start(self, name, command, env, log):
        return super().start(name, [sys.executable, "-c", STAND_IN, str(self.takes_s), *command], env, log)


@pytest.fixture
def ending(monkeypatch, tmp_path):
    """Serves with stand-ins until it is ended by what ``wait`` raises; gives the logs by name, and how long it took to
    end. ``again`` comes while requests are waited for."""

    def run(options, end, takes_s=0.5, again=None):
        since_s = []

        class Ending(Cluster):
            def wait(self):
                since_s.append(time.monotonic())
                raise end

            def check_guard(self):
                super().check_guard()
                if since_s and again is not None:
                    raise again

        monkeypatch.setattr(cli, "Cluster", partial(Ending, guard=StandIns(takes_s)))
        config = cli.parse(["--log-dir", str(tmp_path / "logs"), *options])
        with pytest.raises(type(end if again is None else again)):
            cli.serve(config)
        took_s = time.monotonic() - since_s[0]
        return {log.stem: log.read_text().splitlines() for log in (tmp_path / "logs").iterdir()}, took_s

    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    return run


SIGTERM = SystemExit(128 + signal.SIGTERM)
PAIR = ["--ports", "0"]
KINDS = [(PAIR, "gateway", 2), (["--unified", "--port", "0"], "unified", 0), (["--unified", "2", *PAIR], "gateway", 2)]


@pytest.mark.parametrize(("options", "first", "servers"), KINDS)
def test_at_sigterm_what_answers_clients_ends_first_and_its_servers_serve_on(ending, capsys, options, first, servers):
    logs, took_s = ending(options, SIGTERM)
    assert {name: lines for name, lines in logs.items() if lines} == {first: ["asked to end", f"ended {servers}"]}
    assert len(logs) == 1 + servers
    assert 0.5 < took_s < 10
    waiting = [line for line in capsys.readouterr().out.splitlines() if "waiting up to 120 s for the requests" in line]
    assert len(waiting) == 1


@pytest.mark.parametrize("end", [SystemExit(128 + signal.SIGHUP), KeyboardInterrupt()])
def test_ctrl_c_and_hanging_up_wait_for_no_request(ending, end):
    logs, _ = ending(PAIR, end, takes_s=60)
    assert sorted(logs) == ["decode", "gateway", "prefill"]
    assert list(logs.values()) == [[], [], []]


@pytest.mark.parametrize("again", [SIGTERM, KeyboardInterrupt()])
def test_a_second_signal_does_not_wait(ending, again):
    logs, took_s = ending(PAIR, SIGTERM, takes_s=60, again=again)
    assert "ended 2" not in logs["gateway"]
    assert took_s < 10


@pytest.mark.parametrize(("timeout_s", "least_s"), [("1.5", 1.5), ("0", 0.0)])
def test_requests_get_as_long_as_the_launcher_was_told(ending, timeout_s, least_s):
    logs, took_s = ending([*PAIR, "--drain-timeout-s", timeout_s], SIGTERM, takes_s=60)
    assert "ended 2" not in logs["gateway"]
    assert least_s <= took_s < least_s + 10


def test_the_port_of_the_gateways_metrics_is_free_where_they_listen(ending, monkeypatch):
    asked, free_port = [], free_ports.free_port

    def recorded(host, *arguments):
        asked.append(host)
        return free_port(host, *arguments)

    monkeypatch.setattr(free_ports, "free_port", recorded)
    ending(["--host", "127.0.0.2", *PAIR], KeyboardInterrupt())
    assert asked[0] == "127.0.0.2"  # the gateway's own
    assert asked[-1] == "127.0.0.1"


def test_requests_end_although_nobody_reads_what_the_launcher_says(ending, monkeypatch):
    monkeypatch.setattr(sys, "stdout", NobodyReads())
    logs, _ = ending(["--unified", "--port", "0"], SIGTERM)
    assert logs["unified"] == ["asked to end", "ended 0"]
