"""What a cluster says while it waits for its servers, and when it stops to wait."""

import json
import re
import time
from functools import partial

import pytest
import requests

from sgl_flowprefill.cluster import ClusterConfig, ClusterError, phases, waiting
from sgl_flowprefill.cluster.cluster import answers_first_request
from sgl_flowprefill.cluster.gateway import Gateway, Routing, Worker
from sgl_flowprefill.cluster.waiting import Waiting
from tests.http_server import answering

pytestmark = pytest.mark.usefixtures("fast_waiting")


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
