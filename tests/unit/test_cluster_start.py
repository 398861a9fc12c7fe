"""What a cluster says while it waits for its servers, and when it stops to wait."""

import os
import sys
import time

import pytest

from sgl_flowprefill.cluster import ClusterConfig, ClusterError, cli, cluster, machine, preflight
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
def test_an_answer_that_waiting_does_not_change_ends_the_start_at_once(status, remedy):
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
        pytest.raises(ClusterError, match=r"did not come up within 0\.5 s \(--startup-timeout-s\): HTTP 503 busy busy"),
    ):
        first_request(url, said, startup_timeout_s=0.5)
    assert said[0].startswith("waiting for a first request (0 s; HTTP 503 busy busy")
    assert len(said[0]) < 400


def test_a_gateway_that_nobody_listens_at():
    with answering(lambda path, headers: (200, "")) as url:
        pass
    with pytest.raises(ClusterError, match="no connection"):
        first_request(url, [], startup_timeout_s=0.3)


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
        self.ended = []

    def end(self, server):
        self.ended.append(server)


@pytest.fixture
def restarting(monkeypatch, tmp_path):
    """Two prefill servers; the first one was started again, and does not answer."""
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    config = cli.parse(["--prefill", "2", "--ports", "0", "--startup-timeout-s", "5"])
    said = []
    restarting = Cluster(config, said.append)
    restarting._layout = preflight.prepare(config)
    restarting._gateway = Gateway(restarting.gateway_url)
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
    restarting.check()
    assert member.server is server
    member.start_at_s -= 6
    restarting.check()
    assert member.server is None
    assert restarting._guard.ended == [server]
    assert "the prefill-0 server did not come up within 5 s (--startup-timeout-s): no connection. The" in said[0]
    assert "started again in 1 s" in said[0]


def test_the_last_server_of_its_role_that_does_not_come_back_ends_the_cluster(restarting):
    restarting, _, _ = restarting
    restarting._members[0].start_at_s -= 6
    del restarting._members[1]
    with pytest.raises(ClusterError, match="prefill-0 server did not come up within 5 s"):
        restarting.check()
