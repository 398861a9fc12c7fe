"""Several prefill servers behind one gateway: one of them dies under load, comes back, and another one joins."""

import itertools
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from sgl_flowprefill.cluster import Cluster, ClusterConfig, guard
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import read_events

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
CLIENTS = 4
PAUSE_S = 3.0
"""Between an answer and the next request, where a server that starts needs the cores as well."""
SHORTEST_TOKENS = 400
START_S = 300
"""Longest that the start of a server takes on a busy machine."""
ANSWER_S = 60
"""Longest that a client waits: far less than SGLang's own timeouts (300 s), which nobody should have to wait for."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("fleet")


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def fleet(one_cluster, directory, said):
    one_cluster.close()  # one cluster at a time: all want the same cores

    def say(line):
        print(line)
        said.append(line)

    options = FlowPrefillConfig(event_log=str(directory / "events.jsonl"))
    config = ClusterConfig(flowprefill=True, prefill=2, log_dir=directory / "logs", options=options)
    with Cluster(config, on_progress=say) as cluster:
        yield cluster


@dataclass
class Answer:
    tokens: int
    """Length of its prompt, which no other request has: event logs show it."""
    stream: bool
    sent_s: float
    took_s: float
    error: str | None


class Load:
    """Clients that send one request after the other, every second one streamed."""

    _lengths = itertools.count(SHORTEST_TOKENS)

    def __init__(self, cluster):
        self.answers = []
        self.pause_s = 0.0
        self._url = cluster.url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._client) for _ in range(CLIENTS)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _client(self):
        while not self._stop.wait(self.pause_s):
            tokens = next(self._lengths)
            self.answers.append(ask(self._url, tokens, stream=tokens % 2 == 0))


def ask(url, tokens, *, stream):
    params = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True, "custom_params": {"ttft_slo": 5.0}}
    prompt = [(tokens * 7919 + 31 * place) % 1000 + 10 for place in range(tokens)]
    begin_s, error = time.monotonic(), None
    try:
        body = {"input_ids": prompt, "sampling_params": params, "stream": stream}
        response = requests.post(f"{url}/generate", json=body, timeout=ANSWER_S)
        if not response.ok or '"error"' in response.text or '"abort"' in response.text:
            error = f"{response.status_code} {response.text}"
        elif stream and "[DONE]" not in response.text:
            error = f"cut off {response.text}"
    except requests.RequestException as failure:
        error = f"no answer: {failure!r}"
    return Answer(tokens, stream, begin_s, time.monotonic() - begin_s, error)


def arrivals(directory, name):
    """When each request reached a prefill server, by its tokens; a killed one does not log what it had just got."""
    path = directory / f"events-{name}.jsonl"
    if not path.exists():
        return {}
    return {event.prompt_tokens: event.t_s for event in read_events(path) if event.kind == "arrival"}


def wait_until(done, cluster, timeout_s):
    give_up_s = time.monotonic() + timeout_s
    while not done():
        cluster.check()
        assert time.monotonic() < give_up_s
        time.sleep(0.2)


def test_a_gateway_alone_is_ready_when_servers_have_joined_and_ends_cleanly(tmp_path):
    output = tmp_path / "output"
    command = [sys.executable, "launch.py", "--role", "gateway", "--ports", "0", "--log-dir", str(tmp_path)]
    with (
        open(output, "w") as file,
        subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        while "the gateway listens at" not in output.read_text():
            assert process.poll() is None, output.read_text()
            time.sleep(0.2)
        url = output.read_text().split("the gateway listens at ")[1].split(";")[0]
        assert requests.get(f"{url}/health", timeout=10).status_code == 200
        assert requests.get(f"{url}/readiness", timeout=10).status_code == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@pytest.mark.stress
def test_a_prefill_server_that_dies_under_load_costs_only_its_own_requests_and_comes_back(fleet, directory, said):
    pid = fleet.processes["prefill-0"]
    with Load(fleet) as load:
        wait_until(lambda: len(load.answers) >= 12, fleet, ANSWER_S)
        guard.kill([guard.Session.led_by(pid)])
        killed_s = time.monotonic()
        load.pause_s = PAUSE_S
        wait_until(lambda: "the prefill-0 server is back" in said, fleet, START_S)
        back_s = time.monotonic()
        wait_until(
            lambda: sum(at_s > back_s for at_s in arrivals(directory, "prefill-0").values()) >= 3, fleet, ANSWER_S
        )
    failed = [answer for answer in load.answers if answer.error]
    during = [answer for answer in load.answers if killed_s < answer.sent_s < back_s]
    print(f"{len(load.answers)} requests, {len(during)} of them in the {back_s - killed_s:.0f} s without prefill-0")
    print("failed:", *failed)
    assert failed or "PD request transport error" in (directory / "logs" / "gateway.log").read_text()  # it was busy
    assert len(during) > 10
    others = arrivals(directory, "prefill-1")
    assert [answer for answer in failed if answer.tokens in others] == []
    assert [answer for answer in failed if answer.sent_s > killed_s] == []
    assert [answer for answer in failed if not answer.stream] == []  # the gateway has tried again
    assert all("Lost connection with prefill instance" in answer.error for answer in failed)
    assert max(answer.took_s for answer in load.answers) < ANSWER_S / 2
    assert any("prefill-0 server has ended" in line for line in said)
    assert fleet.processes["prefill-0"] != pid


def test_a_server_joins_takes_requests_and_leaves_without_losing_one(fleet, directory, tmp_path):
    gateway = Gateway(fleet.url)
    output = tmp_path / "output"
    command = [sys.executable, "launch.py", "--flowprefill", "--role", "prefill", "--join", fleet.url]
    command += ["--log-dir", str(tmp_path), "--flowprefill-event-log", str(directory / "events-joined.jsonl")]
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: "routes to this machine" in output.read_text(), fleet, START_S)
        assert Counter(worker["worker_type"] for worker in gateway.workers()) == {"prefill": 3, "decode": 1}
        with Load(fleet) as load:
            load.pause_s = PAUSE_S
            wait_until(lambda: len(arrivals(directory, "joined")) >= 3, fleet, ANSWER_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        assert len(gateway.workers()) == 3
        assert [answer.error for answer in load.answers if answer.error] == []
    finally:
        print(output.read_text())
        process.kill()
        process.wait()
