"""Several prefill or unified servers behind one gateway: one of them dies under load, comes back, and another joins.

Each answer is compared with transformers', whichever server has computed it.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

from sgl_flowprefill.cluster import Cluster, ClusterConfig, guard
from sgl_flowprefill.cluster.base import KEY_VARIABLE
from sgl_flowprefill.cluster.gateway import Gateway, Worker, bearer
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import read_events
from tests.http_server import answering
from tests.launched import KEY
from tests.reference import TOKENS

ROOT = Path(__file__).parents[2]
CLIENTS = 4
PAUSE_S = 3.0
"""Between an answer and the next request, where a server that starts needs the cores as well."""
SHORTEST_TOKENS = 400
START_S = 300
"""Longest that the start of a server takes on a busy machine."""
ANSWER_S = 60
"""Longest that a client waits: far less than SGLang's own timeouts (300 s), which nobody should have to wait for."""


SERVERS = {"prefill": {"prefill": 2, "decode": 1}, "unified": {"prefill": 0, "decode": 0, "unified": 2}}
"""Servers of a fleet, by the role of those of which there are two."""
BROKEN_STREAM = {
    "prefill": ("Lost connection with prefill instance",),  # by the decode server
    "unified": ("ChunkedEncodingError", "cut off", "Stream error"),  # the last by the gateway, which may notice first
}
"""What the client of a stream gets whose server has died, by the server's role."""
RETRIED = {"prefill": "PD request transport error", "unified": "Failed to send typed request"}
"""What the gateway logs of a request that it tries again."""


@dataclass
class Fleet:
    role: str
    cluster: Cluster
    directory: Path
    said: list[str]

    def arrivals(self, name):
        """When each request reached a server, by its tokens; a killed one does not log what it had just got."""
        path = self.directory / f"events-{name}.jsonl"
        if not path.exists():
            return {}
        return {event.prompt_tokens: event.t_s for event in read_events(path) if event.kind == "arrival"}

    def wait_until(self, done, timeout_s):
        give_up_s = time.monotonic() + timeout_s
        while not done():
            self.cluster.check()
            assert time.monotonic() < give_up_s
            time.sleep(0.2)


@pytest.fixture(scope="module", params=SERVERS)
def fleet(request, one_cluster, tmp_path_factory):
    one_cluster.close()  # one cluster at a time: all want the same cores
    directory, said = tmp_path_factory.mktemp("fleet"), []

    def say(line):
        print(line)
        said.append(line)

    options = FlowPrefillConfig(event_log=str(directory / "events.jsonl"))
    config = ClusterConfig(flowprefill=True, log_dir=directory / "logs", options=options, **SERVERS[request.param])
    with Cluster(config, on_progress=say) as cluster:
        yield Fleet(request.param, cluster, directory, said)


@dataclass
class Answer:
    tokens: int
    """Length of its prompt, which no other request has: event logs show it."""
    stream: bool
    sent_s: float
    took_s: float
    error: str | None
    ids: list[int]
    """Tokens of the answer; none where there was an error."""
    logprobs: list[float]


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


def prompt_of(tokens):
    return [(tokens * 7919 + 31 * place) % 1000 + 10 for place in range(tokens)]


def ask(url, tokens, *, stream):
    params = {"max_new_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "custom_params": {"ttft_slo": 5.0}}
    begin_s, error, entries = time.monotonic(), None, []
    try:
        body = {"input_ids": prompt_of(tokens), "sampling_params": params, "return_logprob": True, "stream": stream}
        response = requests.post(f"{url}/generate", json=body, timeout=ANSWER_S)
        if not response.ok or '"error"' in response.text or '"abort"' in response.text:
            error = f"{response.status_code} {response.text}"
        elif stream and "[DONE]" not in response.text:
            error = f"cut off {response.text}"
        else:
            entries = output_of(response.text, stream)
    except requests.RequestException as failure:
        error = f"no answer: {failure!r}"
    took_s = time.monotonic() - begin_s
    return Answer(tokens, stream, begin_s, took_s, error, [entry[1] for entry in entries], [e[0] for e in entries])


def output_of(text, stream):
    """Log probability and token of each step of an answer: in a stream, of the last event, which has all."""
    if stream:
        text = [line for line in text.splitlines() if line.startswith("data: {")][-1].removeprefix("data: ")
    return json.loads(text)["meta_info"]["output_token_logprobs"]


def compare(comparison, answers):
    """Compare all ``answers`` but for those that are errors."""
    whole = [answer for answer in answers if not answer.error]
    for answer in whole:
        assert len(answer.ids) == TOKENS, answer
        kind = "stream" if answer.stream else "answer"
        comparison.answer(f"{kind} of {answer.sent_s:.1f} s", prompt_of(answer.tokens), answer.ids, answer.logprobs)
    comparison.assert_same()
    assert comparison.counts["answers"] == len(whole)


@contextmanager
def gateway_alone(directory, *options, key=None):
    """URL of a gateway without servers, which asks its clients for ``key``, if there is one, and ends cleanly."""
    output = directory / "output"
    command = [sys.executable, "launch.py", "--role", "gateway", *options, "--ports", "0", "--log-dir", str(directory)]
    env = os.environ | ({} if key is None else {KEY_VARIABLE: key})
    with (
        open(output, "w") as file,
        subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while "the gateway listens at" not in output.read_text():
                assert process.poll() is None, output.read_text()
                time.sleep(0.2)
            url = output.read_text().split("the gateway listens at ")[1].split(";")[0]
            assert requests.get(f"{url}/health", timeout=10).status_code == 200
            assert requests.get(f"{url}/readiness", timeout=10).status_code == 503
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM


@contextmanager
def unified_worker(key=None):
    """A server that says what smg asks of one, and answers every prompt alike, if it is shown its ``key``."""

    def answer(path, headers):
        if key is not None and not path.startswith("/health") and headers.get("Authorization") != f"Bearer {key}":
            return 401, "{}"
        about = {"model_path": "embedded", "served_model_name": "embedded", "is_generation": True}
        return 200, json.dumps(about | {"text": "from the unified server"})

    with answering(answer) as url:
        yield Worker("unified", url, None)


def test_a_gateway_alone_is_ready_when_servers_have_joined_and_ends_cleanly(tmp_path):
    """With a key, which its clients have to show, and which it shows to the servers."""
    with gateway_alone(tmp_path, "--unified", key=KEY) as url, unified_worker(KEY) as worker:
        gateway = Gateway(url, KEY)
        ensure(gateway, worker, START_S)
        assert [listed["worker_type"] for listed in gateway.workers()] == ["regular"]
        assert requests.post(f"{url}/generate", json={"text": "Hello"}, timeout=30).status_code == 401
        answer = requests.post(f"{url}/generate", json={"text": "Hello"}, headers=bearer(KEY), timeout=30)
        assert answer.json()["text"] == "from the unified server"
    outputs = [(tmp_path / name).read_text() for name in ("output", "gateway.log")]
    assert [output for output in outputs if KEY in output] == []


def test_a_gateway_of_prefill_and_decode_servers_is_not_taken_for_one_that_routes_to_a_unified_server(tmp_path):
    with gateway_alone(tmp_path) as url, unified_worker() as worker:
        gateway = Gateway(url)
        with pytest.raises(requests.HTTPError, match="503"):
            ensure(gateway, worker, START_S)
        assert gateway.workers()[0]["is_healthy"]


def ensure(gateway, worker, timeout_s):
    """Return when ``gateway`` routes to ``worker``. Raises what it says when it never will."""
    give_up_s, refusals = time.monotonic() + timeout_s, 0
    while True:
        assert time.monotonic() < give_up_s
        try:
            if gateway.ensure(worker):
                return
        except requests.HTTPError:
            refusals += 1
            if refusals == 20:  # smg looks whether it is ready now and then
                raise
        time.sleep(0.2)


@pytest.mark.stress
def test_a_server_that_dies_under_load_costs_only_its_own_requests_and_comes_back(fleet, comparison):
    cluster, first, second = fleet.cluster, f"{fleet.role}-0", f"{fleet.role}-1"
    pid = cluster.processes[first]
    with Load(cluster) as load:
        fleet.wait_until(lambda: all(len(fleet.arrivals(name)) >= 3 for name in (first, second)), ANSWER_S)
        guard.kill([guard.Session.led_by(pid)])
        killed_s = time.monotonic()
        load.pause_s = PAUSE_S
        fleet.wait_until(lambda: f"the {first} server is back" in fleet.said, START_S)
        back_s = time.monotonic()
        fleet.wait_until(lambda: sum(at_s > back_s for at_s in fleet.arrivals(first).values()) >= 3, ANSWER_S)
    failed = [answer for answer in load.answers if answer.error]
    during = [answer for answer in load.answers if killed_s < answer.sent_s < back_s]
    print(f"{len(load.answers)} requests, {len(during)} of them in the {back_s - killed_s:.0f} s without {first}")
    print("failed:", *failed)
    assert failed or RETRIED[fleet.role] in (fleet.directory / "logs" / "gateway.log").read_text()  # it was busy
    assert len(during) > 10
    others = fleet.arrivals(second)
    assert [answer for answer in failed if answer.tokens in others] == []
    assert [answer for answer in failed if answer.sent_s > killed_s] == []
    assert [answer for answer in failed if not answer.stream] == []  # the gateway has tried again
    assert all(any(words in answer.error for words in BROKEN_STREAM[fleet.role]) for answer in failed)
    assert max(answer.took_s for answer in load.answers) < ANSWER_S / 2
    assert any(f"{first} server has ended" in line for line in fleet.said)
    assert cluster.processes[first] != pid
    compare(comparison, load.answers)


@pytest.mark.stress
def test_a_server_joins_takes_requests_and_leaves_without_losing_one(fleet, tmp_path, comparison):
    url, role = fleet.cluster.url, fleet.role
    gateway = Gateway(url)
    output = tmp_path / "output"
    command = [sys.executable, "launch.py", "--flowprefill", "--role", role, "--join", url]
    command += ["--log-dir", str(tmp_path), "--flowprefill-event-log", str(fleet.directory / "events-joined.jsonl")]
    with open(output, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
    try:
        fleet.wait_until(lambda: "routes to this machine" in output.read_text(), START_S)
        kinds = {"prefill": {"prefill": 3, "decode": 1}, "unified": {"regular": 3}}[role]
        assert Counter(worker["worker_type"] for worker in gateway.workers()) == kinds
        with Load(fleet.cluster) as load:
            load.pause_s = PAUSE_S
            fleet.wait_until(lambda: len(fleet.arrivals("joined")) >= 3, ANSWER_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 128 + signal.SIGTERM
        assert len(gateway.workers()) == sum(kinds.values()) - 1
        assert [answer.error for answer in load.answers if answer.error] == []
        compare(comparison, load.answers)
    finally:
        print(output.read_text())
        process.kill()
        process.wait()
