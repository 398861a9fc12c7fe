"""Several prefill servers behind one gateway: two join it, one of them dies under load and comes back, both leave."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests

from sgl_flowprefill.cluster import guard
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.events import read_events

pytestmark = pytest.mark.server

ROOT = Path(__file__).parents[2]
CLIENTS = 4
PAUSE_S = 3.0
"""Between an answer and the next request, where a server that starts needs the cores as well."""
SHORTEST_TOKENS = 400
LONGER_TOKENS = 3000
"""How much longer prompts are until a server is killed, so that it is within one."""
START_S = 300
"""Longest that the start of a server takes on a busy machine."""
ANSWER_S = 60
"""Longest that a client waits: far less than SGLang's own timeouts (300 s), which nobody should have to wait for."""


class Fleet:
    """Two prefill servers that a launcher of their own has brought to the gateway of ``cluster``, which has another."""

    def __init__(self, cluster, directory):
        self.cluster = cluster
        self.directory = directory
        self.gateway = Gateway(cluster.gateway_url)
        self.output = directory / "output"
        command = [sys.executable, "launch.py", "--flowprefill", "--role", "prefill", "--prefill", "2"]
        command += ["--join", cluster.gateway_url, "--log-dir", str(directory / "logs")]
        command += ["--flowprefill-event-log", str(directory / "events.jsonl")]
        self.began_s = time.monotonic()
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)

    def said(self):
        return self.output.read_text()

    def wait_until(self, done, timeout_s):
        give_up_s = time.monotonic() + timeout_s
        while not done():
            self.cluster.check()
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < give_up_s, self.said()
            time.sleep(0.1)

    def server(self, name):
        """Its main process."""
        log = str(self.directory / f"events-{name}.jsonl")
        everyone = psutil.Process(self.process.pid).children(recursive=True)
        servers = [process for process in everyone if os.getsid(process.pid) == process.pid]
        return next(server for server in servers if server.environ().get("FLOWPREFILL_EVENT_LOG") == log)

    def is_asked(self, server):
        """Whether the gateway has sent it a request that is not answered yet."""
        command = server.cmdline()
        port = command[command.index("--port") + 1]
        return any(worker["url"].endswith(f":{port}") and worker["load"] > 0 for worker in self.gateway.workers())

    def arrivals(self, name):
        """When each request reached a server, by its tokens; a killed one does not log what it had just got. Name of
        the cluster's own: prefill."""
        own = self.cluster.config.options.event_log
        path = Path(own) if name == "prefill" else self.directory / f"events-{name}.jsonl"
        if not path.exists():
            return {}
        events = [event for event in read_events(path) if event["event"] == "arrival"]
        return {event["prompt_tokens"]: event["t_s"] for event in events if event["t_s"] >= self.began_s}

    def has_got(self, name, since_s):
        """Whether a server has got three requests since then."""
        return sum(at_s > since_s for at_s in self.arrivals(name).values()) >= 3


@pytest.fixture(scope="module")
def fleet(one_cluster, tmp_path_factory):
    fleet = Fleet(one_cluster.get(flowprefill=True), tmp_path_factory.mktemp("fleet"))
    try:
        fleet.wait_until(lambda: "routes to this machine" in fleet.said(), START_S)
        yield fleet
    finally:
        print(fleet.said())
        fleet.process.kill()
        fleet.process.wait()


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

    def __init__(self, url):
        self.answers = []
        self.longer_tokens = 0
        self.pause_s = 0.0
        self._url = url
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
            tokens = next(self._lengths) + self.longer_tokens
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


def test_a_prefill_server_that_dies_under_load_costs_only_its_own_requests_and_comes_back(fleet):
    assert Counter(worker["worker_type"] for worker in fleet.gateway.workers()) == {"prefill": 3, "decode": 1}
    victim = fleet.server("prefill-0")
    with Load(fleet.cluster.gateway_url) as load:
        fleet.wait_until(lambda: len(load.answers) >= 12, ANSWER_S)
        load.longer_tokens = LONGER_TOKENS
        fleet.wait_until(lambda: len(load.answers) >= 16 and fleet.is_asked(victim), ANSWER_S)
        guard.kill([guard.Session.led_by(victim.pid)])
        killed_s = time.monotonic()
        load.longer_tokens, load.pause_s = 0, PAUSE_S
        fleet.wait_until(lambda: "the prefill-0 server is back" in fleet.said(), START_S)
        back_s = time.monotonic()
        fleet.wait_until(lambda: fleet.has_got("prefill-0", back_s), ANSWER_S)
    failed = [answer for answer in load.answers if answer.error]
    during = [answer for answer in load.answers if killed_s < answer.sent_s < back_s]
    print(f"{len(load.answers)} requests, {len(during)} of them in the {back_s - killed_s:.0f} s without prefill-0")
    print("failed:", *failed)
    gateway_log = Path(fleet.cluster.config.log_dir) / "gateway.log"
    assert failed or "PD request transport error" in gateway_log.read_text()  # it was busy
    assert len(during) > 10
    others = fleet.arrivals("prefill-1") | fleet.arrivals("prefill")
    assert [answer for answer in failed if answer.tokens in others] == []
    assert [answer for answer in failed if answer.sent_s > killed_s] == []
    assert [answer for answer in failed if not answer.stream] == []  # the gateway has tried again
    assert all("Lost connection with prefill instance" in answer.error for answer in failed)
    assert max(answer.took_s for answer in load.answers) < ANSWER_S / 2
    assert "prefill-0 server has ended" in fleet.said()
    assert fleet.server("prefill-0").pid != victim.pid


def test_servers_that_joined_take_requests_and_leave_without_losing_one(fleet):
    begin_s = time.monotonic()
    with Load(fleet.cluster.gateway_url) as load:
        load.pause_s = PAUSE_S
        fleet.wait_until(lambda: fleet.has_got("prefill-0", begin_s) and fleet.has_got("prefill-1", begin_s), ANSWER_S)
        fleet.process.send_signal(signal.SIGTERM)
        assert fleet.process.wait(60) == 128 + signal.SIGTERM
    assert Counter(worker["worker_type"] for worker in fleet.gateway.workers()) == {"prefill": 1, "decode": 1}
    assert [answer.error for answer in load.answers if answer.error] == []
    fleet.cluster.check()
