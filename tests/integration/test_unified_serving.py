"""A real server that prefills and decodes, over HTTP, started as in a user's own launcher."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import requests

from sgl_flowprefill.cluster.preflight import free_port
from sgl_flowprefill.events import Step, read_events
from sgl_flowprefill.model import embedded_model_path
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("no_cluster")]

START_S = 180.0
MAX_IDLE_SHARE = 0.05
"""Share of a core, on a slow machine too."""


@dataclass
class Server:
    url: str
    process: subprocess.Popen[bytes]
    event_log: Path

    def post(self, path: str, body: dict[str, Any], timeout_s: float = 120.0) -> requests.Response:
        return requests.post(self.url + path, json=body, timeout=timeout_s)

    def state(self) -> dict[str, Any]:
        """What the server says of its decode steps."""
        info = requests.get(self.url + "/server_info", timeout=60).json()
        [internal] = info["internal_states"]
        found: dict[str, Any] = internal["flowprefill_decode"]
        return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("unified")
    log = directory / "server.log"
    port = free_port("127.0.0.1")
    env = os.environ | {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_EVENT_LOG": str(directory / "events.jsonl"),
        "SGLANG_PLATFORM": "flowprefill_cpu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(embedded_model_path())]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "embedded"]
    command += ["--max-total-tokens", "60000", "--enable-metrics"]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, env=env, stdout=output, stderr=output)
    found = Server(f"http://127.0.0.1:{port}", process, directory / "events.jsonl")
    try:
        deadline_s = time.monotonic() + START_S
        while True:
            try:
                if requests.get(found.url + "/health_generate", timeout=5).status_code == 200:
                    break
            except requests.ConnectionError:
                pass
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline_s, log.read_text()[-3000:]
            time.sleep(0.5)
        yield found
    finally:
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def body(tokens: list[int], output_tokens: int, **objectives: float) -> dict[str, Any]:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True, "custom_params": objectives}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}


async def stream(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Tokens of an answer, and when each came."""
    tokens: list[int] = []
    times: list[float] = []
    async with session.post(url + "/generate", json=request | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                tokens = json.loads(line[6:])["output_ids"]
                times.append(time.monotonic())
    return tokens, times


def test_streams_get_their_tokens_while_a_long_prompt_is_prefilled(server: Server, comparison: Comparison) -> None:
    prompts = [prompt(800 + i, 50 + 70 * i) for i in range(4)]
    long = prompt(810, 9000)

    async def all_of_them() -> Any:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            streams = [
                asyncio.create_task(stream(session, server.url, body(tokens, 60, tbt_slo=0.15))) for tokens in prompts
            ]
            await asyncio.sleep(0.7)
            sent_s = time.monotonic()
            answer = await stream(session, server.url, body(long, TOKENS, ttft_slo=30.0))
            return sent_s, answer, await asyncio.gather(*streams)

    before = server.state()
    sent_s, (answer, times), streams = asyncio.run(all_of_them())
    for tokens, (got, _) in zip([long, *prompts], [(answer, times), *streams], strict=True):
        comparison.answer(f"{len(tokens)} tokens", tokens, got[:TOKENS], None)
    comparison.assert_same()
    assert all(len(got) == 60 for got, _ in streams)
    ttft_s = times[0] - sent_s
    meanwhile = [[time_s for time_s in arrivals if sent_s < time_s < times[0]] for _, arrivals in streams]
    gaps = [later - earlier for arrivals in meanwhile for earlier, later in pairwise(arrivals)]
    print(f"prefill {ttft_s:.2f} s, {len(gaps)} gaps, longest {max(gaps):.3f} s; {server.state()}")
    assert len(gaps) >= 20
    assert max(gaps) < ttft_s / 3
    after = server.state()
    assert after["steps"] > before["steps"]
    assert after["streams"] == 0
    steps = [event for event in read_events(server.event_log) if isinstance(event, Step)]
    assert any(event.due_s is not None for event in steps)


def test_several_answers_to_one_prompt_are_the_same_where_decoding_is_greedy(server: Server) -> None:
    request = body(prompt(820, 300), 12)
    request["sampling_params"]["n"] = 3
    answers = server.post("/generate", request).json()
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1


def test_a_grammar_a_stop_string_and_a_chat_are_served(server: Server) -> None:
    constrained = body(prompt(830, 100), 12)
    constrained["sampling_params"]["regex"] = "(yes|no)+"
    text = server.post("/generate", constrained).json()["text"]
    assert set(text.replace("yes", "").replace("no", "").strip()) <= set("yesno")
    chat = {"model": "embedded", "messages": [{"role": "user", "content": "bake"}], "max_tokens": 8}
    assert server.post("/v1/chat/completions", chat).json()["choices"][0]["finish_reason"] in ("length", "stop")
    plain = server.post("/generate", body(prompt(831, 100), 12)).json()["text"]
    word = plain.split()[3]
    stopped = body(prompt(831, 100), 12)
    stopped["sampling_params"]["stop"] = [word]
    assert server.post("/generate", stopped).json()["meta_info"]["finish_reason"]["matched"] == word


@pytest.mark.parametrize("value", [-1, 0, "soon", True])
@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
def test_an_invalid_time_between_tokens_is_a_400(server: Server, path: str, value: Any) -> None:
    request = {"text": "a", "prompt": "a", "model": "embedded", "custom_params": {"tbt_slo": value}}
    refused = server.post(
        path,
        {
            name: request[name]
            for name in request
            if (name == "text") == (path == "/generate") or name == "custom_params"
        },
    )
    assert refused.status_code == 400
    assert "tbt_slo" in refused.text


def test_beam_search_is_refused_with_a_sentence(server: Server) -> None:
    request = {"input_ids": prompt(840, 50), "sampling_params": {"max_new_tokens": 8, "beam_width": 2}}
    refused = server.post("/generate", request)
    assert refused.status_code == 400
    assert "FlowPrefill cannot run beam search" in refused.text


def test_a_client_that_leaves_frees_its_stream(server: Server) -> None:
    request = body(prompt(850, 200), 2000) | {"stream": True}
    with requests.post(server.url + "/generate", json=request, stream=True, timeout=60) as response:
        next(response.iter_lines())
        assert server.state()["streams"] == 1
    deadline_s = time.monotonic() + 20
    while server.state()["streams"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_an_idle_server_sleeps_and_can_be_flushed(server: Server) -> None:
    time.sleep(1.0)
    [scheduler] = [
        child
        for child in psutil.Process(server.process.pid).children(recursive=True)
        if "scheduler" in child.name() or any("scheduler" in part for part in child.cmdline())
    ]
    scheduler.cpu_percent()
    time.sleep(4.0)
    share = scheduler.cpu_percent() / 100
    print(f"the idle scheduler takes {share:.3f} of a core")
    assert share < MAX_IDLE_SHARE
    assert requests.post(server.url + "/flush_cache", timeout=30).status_code == 200
    metrics = requests.get(server.url + "/metrics", timeout=30).text
    assert "flowprefill:decode_step_seconds_total" in metrics
    assert server.process.poll() is None
