"""What a cluster says while it waits for its servers, and when it stops to wait."""

import dataclasses
import json
import os
import re
import signal
import sys
import threading
import time
from contextlib import contextmanager

import psutil
import pytest

from sgl_flowprefill.cluster import ClusterConfig, ClusterError, cli, cluster, machine, phases, preflight
from sgl_flowprefill.cluster.cluster import Cluster, Member
from sgl_flowprefill.cluster.gateway import Gateway, Worker
from sgl_flowprefill.cluster.process import Server
from tests.http_server import answering


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(cluster, "POLL_S", 0.01)
    monkeypatch.setattr(cluster, "PROGRESS_S", 0.1)


def first_request(url, said, **config):
    """The first request of a cluster whose gateway is at ``url``."""
    waiting = Cluster(ClusterConfig(flowprefill=False, join=url, **config), said.append)
    waiting._await("a first request", waiting._first_request)


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "same --api-key"), (403, "same --api-key"), (400, "the logs"), (404, "the logs"), (422, "the logs")],
)
def test_an_answer_that_waiting_does_not_change_ends_the_start_at_once(status, remedy, monkeypatch):
    monkeypatch.setattr(cluster, "PROGRESS_S", 10.0)
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


class NoGuard:
    def __init__(self):
        self.killed = []

        self.how = None

    def end(self, server):
        self.killed.append(server)

    def ended(self):
        return self.how


@pytest.fixture
def restarting(monkeypatch, tmp_path):
    """Two prefill servers; the first one was started again, and does not answer."""
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    config = cli.parse(["--prefill", "2", "--ports", "0", "--startup-timeout-s", "5"])
    said = []
    restarting = Cluster(config, said.append)
    restarting._layout = preflight.prepare(config)
    restarting._gateway = Gateway(restarting.url)
    restarting._guard = NoGuard()
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    servers = [Server(f"prefill-{index}", command, os.environ, tmp_path / f"{index}.log") for index in range(2)]
    for index, server in enumerate(servers):
        restarting._members.append(Member(restarting._layout, "prefill", index))
        restarting._members[index].server = server
    restarting._members[0].start_at_s = time.monotonic()
    restarting._members[1].up_since_s = time.monotonic()
    yield restarting, said, servers[0]
    for server in servers:
        server.terminate()
        server.wait(10)


def test_a_server_that_does_not_come_back_in_time_is_started_again(restarting):
    restarting, said, server = restarting
    member = restarting._members[0]
    while member.seen is None:
        restarting.check()
        time.sleep(0.01)
    assert member.server is server
    member.start_at_s -= 6
    restarting.check()
    assert member.server is None
    assert restarting._guard.killed == [server]
    assert "the prefill-0 server did not come up within 5 s (--startup-timeout-s): no connection. The" in said[0]
    assert "started again in 1 s" in said[0]


def test_the_last_server_of_its_role_that_does_not_come_back_ends_the_cluster(restarting):
    restarting, _, _ = restarting
    restarting._members[0].start_at_s -= 6
    del restarting._members[1]
    with pytest.raises(ClusterError, match="prefill-0 server did not come up within 5 s"):
        restarting.check()


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


def check_until_it_raises(cluster, timeout_s):
    """What ``check`` raises, called as often as ``wait`` does, within ``timeout_s``."""
    begin_s = time.monotonic()
    while time.monotonic() - begin_s < timeout_s:
        try:
            cluster.check()
        except ClusterError as error:
            assert time.monotonic() - begin_s < timeout_s
            return str(error)
        time.sleep(0.01)
    pytest.fail(f"nothing was noticed within {timeout_s} s")


def test_the_end_of_a_server_is_noticed_while_another_one_does_not_answer(restarting):
    restarting, _, _ = restarting
    hanging, up = restarting._members
    with nobody_answers() as url:
        hanging.url = url
        restarting.check()
        assert hanging.health is not None
        psutil.Process(up.server.pid).kill()
        assert "prefill-1 server has ended (killed by signal 9)" in check_until_it_raises(restarting, 2)


def test_the_end_of_a_server_is_noticed_while_the_gateway_does_not_answer(restarting):
    restarting, said, _ = restarting
    restarting._members[0].up_since_s = time.monotonic()
    with nobody_answers() as url:
        restarting._gateway = Gateway(url)
        first, second = (psutil.Process(member.server.pid) for member in restarting._members)
        first.kill()
        while not said:
            restarting.check()
        second.kill()
        assert "prefill-1 server has ended (killed by signal 9)" in check_until_it_raises(restarting, 2)
    assert "prefill-0 server has ended (killed by signal 9)" in said[0]


def test_a_gateway_that_answers_again_hears_of_all_that_has_happened_in_order(restarting):
    restarting, _, _ = restarting
    heard, on = [], threading.Event()
    restarting._members[0].up_since_s = restarting._ensured_s = time.monotonic()

    def answer(path, headers):
        on.wait()
        heard.append(path)
        return 200, json.dumps({"workers": [{"id": "7", "url": restarting._members[0].url}]})

    with answering(answer) as url:
        restarting._gateway = Gateway(url)
        psutil.Process(restarting._members[0].server.pid).kill()
        while restarting._members[0].server:
            restarting.check()
        restarting._ensured_s = 0.0
        restarting.check()
        on.set()
        while len(heard) < 3:
            restarting.check()
            time.sleep(0.01)
    assert heard[:3] == ["/workers", "/workers/7", "/workers"]


def test_servers_end_although_their_gateway_does_not_answer(restarting):
    restarting, _, _ = restarting
    with nobody_answers() as url:
        restarting._gateway = Gateway(url)
        begin_s = time.monotonic()
        restarting._leave_all()
    assert time.monotonic() - begin_s < 4.5


def test_the_end_of_the_guard_ends_the_cluster(restarting):
    restarting, _, _ = restarting
    restarting._guard.how = "the launcher's guard has ended (killed by signal 9)"
    with pytest.raises(ClusterError, match="without it, servers could outlive the launcher"):
        restarting.check()


def test_the_end_of_a_server_is_noticed_while_another_one_hangs_as_it_starts(restarting):
    restarting, _, _ = restarting
    with nobody_answers() as url:
        restarting._members[0].url = url
        psutil.Process(restarting._members[1].server.pid).kill()
        begin_s = time.monotonic()
        with pytest.raises(ClusterError, match="prefill-1 server has ended"):
            restarting._await("the server", lambda: restarting._is_healthy(restarting._members[0]))
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
    restarting, said, _ = restarting
    restarting._members[1].up_since_s = None
    first, second = (member.server.log for member in restarting._members)
    first.write_text(LOG[: LOG.index("Load weight end")])
    with pytest.raises(ClusterError, match=r"did not come up within 1\.5 s"):
        await_server(restarting, timeout_s=1.5)
    assert said[0] == f"waiting for the prefill-0 server (0 s; loading weights; prefill-1: its log is {second})"
    with (
        answering(lambda path, headers: (500, "broken")) as restarting._members[0].url,
        pytest.raises(ClusterError, match="broken"),
    ):
        await_server(restarting, timeout_s=1.5)
    assert said[-1].endswith(f" s; loading weights; prefill-1: its log is {second}; HTTP 500 broken)")


def await_server(cluster, timeout_s):
    cluster.config = dataclasses.replace(cluster.config, startup_timeout_s=timeout_s)
    member = cluster._members[0]
    cluster._await("the prefill-0 server", lambda: cluster._is_healthy(member), lambda: cluster._phases(member))


@pytest.mark.parametrize(("before", "ends"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_hanging_up_ends_a_launcher_unless_it_was_started_under_nohup(before, ends, monkeypatch):
    seen = []

    def serve(config):
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0.1)
        seen.append("goes on")

    monkeypatch.setattr(cli, "_serve", serve)
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
