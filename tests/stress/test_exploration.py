"""A real server explores while it is idle: nobody is told of a request, and it answers as it did before."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.model import embedded_model_path
from tests.prompts import prompt
from tests.reference import Comparison

pytestmark = [pytest.mark.stress, pytest.mark.alone]

WAIT_S = 300.0
SHARE = 0.2
NEW_TOKENS = 2
COUNTS = re.compile(r"sglang:(?!http_)\w+_(total|count|bucket)\b")
"""Names of SGLang's metrics that count what it was asked for. Its gauges tell of the last request for some time yet."""
OF_TIME = ("seconds", "idle", "time")
"""In names of such that tell how long its processes were busy."""


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    event_log: Path

    def metrics(self) -> dict[str, float]:
        lines = requests.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        pairs = (line.rpartition(" ") for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in pairs}

    def explored(self) -> dict[str, float]:
        [state] = requests.get(f"{self.url}/server_info", timeout=60).json()["internal_states"]
        found: dict[str, float] = state["flowprefill_exploration"]
        return found

    def logged(self, event: str) -> int:
        """How many of such events the log has."""
        lines = self.event_log.read_text().splitlines(True)
        return sum(json.loads(line)["event"] == event for line in lines if line.endswith("\n"))

    def generate(self, tokens: list[int]) -> tuple[list[int], list[float], float]:
        """Tokens and their log probabilities, and the seconds until they came."""
        body = {
            "input_ids": tokens,
            "sampling_params": {"max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True},
            "return_logprob": True,
        }
        begin_s = time.monotonic()
        answer = requests.post(f"{self.url}/generate", json=body, timeout=120).json()
        logprobs = answer["meta_info"]["output_token_logprobs"]
        return answer["output_ids"], [entry[0] for entry in logprobs], time.monotonic() - begin_s


def wait_for(is_so: Callable[[], bool], server: Server, pause_s: float = 0.5) -> None:
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert server.process.poll() is None, "the server has ended"
        assert time.monotonic() < end_s, "still not so"
        time.sleep(pause_s)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("exploring")
    port = free_port("127.0.0.1")
    env = os.environ | {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_LEARNING": "true",
        "FLOWPREFILL_EXPLORATION_SHARE": str(SHARE),
        "FLOWPREFILL_EVENT_LOG": str(directory / "events.jsonl"),
        "SGLANG_PLATFORM": "flowprefill_cpu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(embedded_model_path())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "embedded"]
    command += ["--max-total-tokens", "60000", "--enable-metrics"]
    with open(directory / "server.log", "wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    found = Server(f"http://127.0.0.1:{port}", process, directory / "events.jsonl")

    def is_up() -> bool:
        try:
            return requests.get(f"{found.url}/health_generate", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    try:
        wait_for(is_up, found)
        yield found
    finally:
        process.terminate()
        process.wait(60)
        print((directory / "server.log").read_text()[-2000:])


def test_an_idle_server_explores_and_nobody_is_told_of_a_request(server: Server, comparison: Comparison) -> None:
    text = prompt(4242, 900)
    before = server.generate(text)
    # The log is written behind the answers, that of the question whether the server is up among them.
    wait_for(lambda: server.logged("leave") == server.logged("arrival") > 1, server)
    lines, counted = server.logged("arrival"), server.metrics()
    # A question is an event, for which what is explored then is given up.
    wait_for(lambda: server.explored()["explored"] >= 5, server, pause_s=13.0)
    state, metrics = server.explored(), server.metrics()
    print(f"\n{state}")
    counts = [name for name in counted if COUNTS.match(name) and not any(word in name for word in OF_TIME)]
    assert len(counts) > 10
    assert [name for name in counts if counted[name] != metrics.get(name)] == []
    spent_s = next(value for name, value in metrics.items() if name.startswith("flowprefill:exploration_seconds_total"))
    assert 0 < spent_s <= server.explored()["seconds"] + 0.001
    assert server.logged("arrival") == lines
    again = server.generate(text)
    for name, (tokens, logprobs, _) in (("before", before), ("again", again)):
        comparison.answer(name, text, tokens, logprobs, new_tokens=NEW_TOKENS)
    comparison.assert_same_with_logprobs()


def test_requests_come_in_the_middle_of_it_and_it_gives_way(server: Server, comparison: Comparison) -> None:
    waits_s: dict[str, Any] = {"exploring": [], "quiet": []}
    for number in range(60):
        given_up = server.explored()["given_up"]
        time.sleep(3.0 + 0.37 * (number % 11))
        tokens = prompt(5000 + number, 64)
        ids, logprobs, took_s = server.generate(tokens)
        comparison.answer(f"{number}", tokens, ids, logprobs, new_tokens=NEW_TOKENS)
        waits_s["exploring" if server.explored()["given_up"] > given_up else "quiet"].append(took_s)
        if len(waits_s["exploring"]) >= 6:
            break
    comparison.assert_same_with_logprobs()
    print(f"\nseconds of answers: {waits_s}; {server.explored()}")
    assert waits_s["exploring"], "none came in the middle of it"
