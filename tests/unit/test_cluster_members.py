"""Servers of a cluster that end, hang or cannot listen, while others and the gateway go on or not."""

import json
import os
import re
import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from sgl_flowprefill.cluster import ClusterConfig, ClusterError
from sgl_flowprefill.cluster.cluster import Cluster
from sgl_flowprefill.cluster.members import ENSURE_S
from sgl_flowprefill.cluster.process import Guard, Server, listener
from tests.http_server import answering
from tests.sleeping_servers import FakeGuard

pytestmark = pytest.mark.usefixtures("fast_waiting")


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
