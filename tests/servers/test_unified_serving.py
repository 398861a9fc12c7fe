"""A real server that prefills and decodes, over HTTP, with options of stock SGLang that FlowPrefill sets itself: its
launcher's API key, its answers, and that it ends with its launcher. Some start as in a user's own launcher.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import requests

from sgl_flowprefill.cluster.base import KEY_VARIABLE
from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.cluster.gateway import bearer
from sgl_flowprefill.compat import EXAMPLES
from sgl_flowprefill.events import Arrival, Step, read_events
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.processes import is_alive
from sgl_flowprefill.timeline import History
from tests.launched import (
    KEY,
    Launch,
    assert_a_stream_outlives_sigterm,
    assert_curl_line_works,
    assert_nobody_sees_the_key,
    private_memory,
)
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import QUICK_START, OneCluster

pytestmark = pytest.mark.usefixtures("no_cluster")

START_S = 180.0
AS_IT_COMES, PRIORITIES, AGENTS = EXAMPLES
CLASSES = "0:0.5,10:5,20:30"
LAUNCH = (sys.executable, "-m", "sglang.launch_server")
SERVE = (str(Path(sys.executable).with_name("sglang")), "serve")
"""SGLang's own commands."""
OURS = {
    "FLOWPREFILL_PRIORITY_TTFT_SLO": CLASSES,
    "FLOWPREFILL_OVERLOAD": "shed",
    "FLOWPREFILL_EXPLORATION_SHARE": "0",
}
"""FlowPrefill's options."""
MAX_IDLE_SHARE = 0.05
"""Share of a core that the scheduler takes, on a slow machine too."""
MAX_QUIET_IDLE_SHARE = 0.02
"""Share of a core that it takes on a machine that does nothing else."""


@dataclass
class Server:
    url: str
    process: psutil.Process
    """What SGLang's command runs as."""
    event_log: Path
    log: Path
    key: str | None = None
    """What it asks of its clients."""

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, headers=bearer(self.key), timeout=60)

    def post(self, path: str, body: dict[str, Any] | None = None, **how: Any) -> requests.Response:
        return requests.post(self.url + path, json=body, headers=bearer(self.key), **({"timeout": 120.0} | how))

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(headers=bearer(self.key), timeout=aiohttp.ClientTimeout(300))

    def state(self) -> dict[str, Any]:
        """What the server says of its decode steps."""
        [internal] = self.get("/server_info").json()["internal_states"]
        found: dict[str, Any] = internal["flowprefill_decode"]
        return found


@pytest.fixture(scope="module")
def launcher(one_cluster: OneCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Has a server of its own, whose key is KEY."""
    one_cluster.close()  # both want the same cores
    directory = tmp_path_factory.mktemp("unified")
    options = ("--flowprefill-event-log", str(directory / "events.jsonl"), "--flowprefill-priority-ttft-slo", CLASSES)
    options += ("--flowprefill-overload", "shed")
    options += ("--flowprefill-exploration-share", "0")  # its CPU time is measured while it is idle, for seconds only
    options += ("--max-total-tokens", "60000", "--enable-metrics", *PRIORITIES.options)
    env = {KEY_VARIABLE: KEY, **QUICK_START}
    with private_memory(directory) as memory:
        launcher = Launch(directory, "--flowprefill", "--unified", *options, memory=memory, env=env)
        try:
            launcher.curl_line()
            yield launcher
        finally:
            launcher.kill()


@pytest.fixture(scope="module")
def server(launcher: Launch) -> Server:
    [process] = launcher.remember().servers
    url = launcher.curl_url.removesuffix("/v1/completions")
    return Server(url, process, launcher.logs.parent / "events.jsonl", launcher.logs / "unified.log", KEY)


@contextmanager
def serving(
    directory: Path, *options: str, command: Sequence[str] = LAUNCH, ours: Mapping[str, str] = OURS
) -> Iterator[Server]:
    """A server that SGLang's own ``command`` starts, with ``options``, and with ``ours`` of FlowPrefill."""
    log = directory / "server.log"
    port = free_port("127.0.0.1")
    env = os.environ | {
        "FLOWPREFILL": "1",
        "FLOWPREFILL_EVENT_LOG": str(directory / "events.jsonl"),
        **ours,
        "SGLANG_PLATFORM": "flowprefill_cpu",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    address = ("--host", "127.0.0.1", "--port", str(port))
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--model-path", str(embedded_model_path()), *address, *options],
            env=env,
            stdout=output,
            stderr=output,
        )
    found = Server(f"http://127.0.0.1:{port}", psutil.Process(process.pid), directory / "events.jsonl", log)
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
        children = found.process.children(recursive=True)
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in children:
            if child.is_running():
                child.kill()


def test_its_launcher_prints_a_curl_line_that_works_and_nobody_sees_the_key(launcher: Launch, server: Server) -> None:
    assert "waiting for the unified server (" in launcher.text()
    assert "on one server at http://127.0.0.1:" in launcher.text()
    assert_curl_line_works(launcher)
    assert requests.post(f"{server.url}/generate", json={"text": "Hello"}, timeout=60).status_code == 401
    started = launcher.remember().processes
    assert [process for process in started if process.name().startswith("smg")] == []
    assert_nobody_sees_the_key(launcher, "unified")


def body(tokens: list[int], output_tokens: int, **objectives: float) -> dict[str, Any]:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "ignore_eos": True, "custom_params": objectives}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}


async def stream(session: aiohttp.ClientSession, url: str, request: dict[str, Any]) -> tuple[list[Any], list[float]]:
    """Tokens of an answer (log probability, id, text), and when each came."""
    last: dict[str, Any] = {}
    times: list[float] = []
    async with session.post(url + "/generate", json=request | {"stream": True}) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if line.startswith(b"data: {"):
                last = json.loads(line[6:])
                times.append(time.monotonic())
    entries: list[Any] = last["meta_info"]["output_token_logprobs"]
    assert last["output_ids"] == [entry[1] for entry in entries]
    return entries, times


def assert_compared(comparison: Comparison, answers: int, tokens: int | None = None) -> None:
    """So many answers were compared, of TOKENS or of ``tokens`` in all, and none differs."""
    comparison.assert_same()
    assert comparison.counts["answers"] == answers
    assert comparison.counts["log probabilities"] == (answers * TOKENS if tokens is None else tokens)


def test_streams_get_their_tokens_while_a_long_prompt_is_prefilled(server: Server, comparison: Comparison) -> None:
    prompts = [prompt(800 + i, 50 + 70 * i) for i in range(4)]
    long = prompt(810, 9000)

    async def all_of_them() -> Any:
        async with server.session() as session:
            streams = [
                asyncio.create_task(stream(session, server.url, body(tokens, 150, tbt_slo=0.15))) for tokens in prompts
            ]
            await asyncio.sleep(0.7)
            sent_s = time.monotonic()
            answer = await stream(session, server.url, body(long, TOKENS, ttft_slo=30.0))
            return sent_s, answer, await asyncio.gather(*streams)

    before = server.state()
    sent_s, (answer, times), streams = asyncio.run(all_of_them())
    for tokens, (got, _) in zip([long, *prompts], [(answer, times), *streams], strict=True):
        comparison.generated(f"{len(tokens)} tokens", tokens, {"output_token_logprobs": got})
    assert_compared(comparison, answers=5)
    assert all(len(got) == 150 for got, _ in streams)
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
    doings = {part.what for request in History.of(read_events(server.event_log)).requests for part in request.parts}
    assert {"running", "decode step", "decoding"} <= doings


def test_what_the_command_line_asks_of_sglangs_scheduler_is_set_with_a_line_for_each(server: Server) -> None:
    lines = [line for line in server.log.read_text().splitlines() if "FlowPrefill: --" in line]
    for words in (
        "--disable-overlap-schedule is True (was False)",
        "--chunked-prefill-size is -1 (was 2048)",
        "--schedule-policy is fcfs (was lof)",
        "--enable-mixed-chunk is False (was True)",
        "--prefill-decode-interval is 0 (was 4)",
        "--disable-priority-preemption is True (was False)",
    ):
        assert len([line for line in lines if words in line]) == 1, words
    info = server.get("/server_info").json()
    assert info["chunked_prefill_size"] == -1
    assert info["enable_priority_scheduling"] is True


def test_a_priority_stands_for_an_objective_and_a_batch_of_several_is_served(server: Server) -> None:
    """The smaller number is the more urgent one here; a request without one has the default priority, 10."""
    asked = {"urgent": -3, "usual": 10, "no priority": None, "later": 15, "idle": 99, "own": 99}

    async def all_of_them() -> list[list[int]]:
        async with server.session() as session:
            answers = []
            for number, (name, priority) in enumerate(asked.items()):
                objective = {"ttft_slo": 7.0} if name == "own" else {}
                request = body(prompt(860 + number, 60), 4, **objective) | {"rid": name, "priority": priority}
                answers.append(asyncio.create_task(stream(session, server.url, request)))
            return [tokens for tokens, _ in await asyncio.gather(*answers)]

    assert [len(tokens) for tokens in asyncio.run(all_of_them())] == [4] * len(asked)
    arrivals = {event.rid: event.ttft_slo_s for event in read_events(server.event_log) if isinstance(event, Arrival)}
    assert {name: arrivals[name] for name in asked} == {
        "urgent": 0.5,
        "usual": 5.0,
        "no priority": 5.0,
        "later": 30.0,
        "idle": 30.0,
        "own": 7.0,
    }


def test_several_answers_to_one_prompt_are_the_same_where_decoding_is_greedy(
    server: Server, comparison: Comparison
) -> None:
    request = body(prompt(820, 300), 12)
    request["sampling_params"]["n"] = 3
    answers = server.post("/generate", request).json()
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) == 1
    for answer in answers:
        comparison.generated("one of three", prompt(820, 300), answer["meta_info"])
    assert_compared(comparison, answers=3)


def test_an_answer_under_a_grammar_has_the_likeliest_tokens_that_match_it(
    server: Server, comparison: Comparison
) -> None:
    constrained = body(prompt(830, 100), 12)
    constrained["sampling_params"]["regex"] = "(yes|no)+"
    answer = server.post("/generate", constrained).json()
    assert set(answer["text"].replace("yes", "").replace("no", "").strip()) <= set("yesno")
    comparison.generated("constrained", prompt(830, 100), answer["meta_info"], pattern="(yes|no)+")
    assert_compared(comparison, answers=1)


def test_an_answer_ends_at_a_stop_string(server: Server, comparison: Comparison) -> None:
    tokens = prompt(831, 100)
    plain = server.post("/generate", body(tokens, 12)).json()
    word = plain["text"].split()[3]
    request = body(tokens, 12)
    request["sampling_params"]["stop"] = [word]
    stopped = server.post("/generate", request).json()
    assert stopped["meta_info"]["finish_reason"]["matched"] == word
    assert stopped["text"] == plain["text"][: plain["text"].index(word)]
    before = len(comparison.reference.ids(stopped["text"] + word))
    comparison.generated("plain", tokens, plain["meta_info"])
    comparison.generated("stopped", tokens, stopped["meta_info"])
    assert_compared(comparison, answers=2, tokens=TOKENS + before)


def test_a_chat_is_answered(server: Server, comparison: Comparison) -> None:
    messages = [{"role": "user", "content": "bake"}]
    request = {"model": "embedded", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "logprobs": True}
    choice = server.post("/v1/chat/completions", request).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    comparison.chat("chat", messages, choice)
    assert_compared(comparison, answers=1)


def report_in(endpoint: str, answer: dict[str, Any]) -> Any:
    """What an answer, or an event of one, says of its request; None where it says nothing."""
    where = "meta_info" if endpoint == "/generate" else "metadata"
    told = (answer.get("response", answer).get(where) or {}).get("flowprefill")
    return json.loads(told) if isinstance(told, str) else told


def reports(server: Server, endpoint: str, request: dict[str, Any], streamed: bool) -> list[Any]:
    """What the answer to ``request`` says of it, for each event that says anything."""
    response = server.post(endpoint, request | {"stream": streamed})
    assert response.status_code == 200, response.text
    if not streamed:
        return [report_in(endpoint, response.json())]
    events = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: {")]
    assert len(events) > 1
    told = [report_in(endpoint, json.loads(event)) for event in events]
    assert not any(told[: -3 if endpoint.endswith("completions") else -1])
    return [report for report in told if report is not None]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("endpoint", ["/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_an_answer_says_what_the_event_log_says_of_its_request(server: Server, endpoint: str, streamed: bool) -> None:
    slo_s = 40.0 + len(endpoint) + streamed  # who is who in the event log
    objective = {"custom_params": {"ttft_slo": slo_s}}
    asked: dict[str, dict[str, Any]] = {
        "/generate": {"text": "bake", "sampling_params": {"max_new_tokens": 6, "ignore_eos": True, **objective}},
        "/v1/completions": {"model": "embedded", "prompt": "bake", "max_tokens": 6, "ignore_eos": True, **objective},
        "/v1/chat/completions": {
            "model": "embedded",
            "messages": [{"role": "user", "content": "bake"}],
            "max_tokens": 6,
            "ignore_eos": True,
            **objective,
        },
        "/v1/responses": {"model": "embedded", "input": "bake", "max_output_tokens": 6, **objective},
    }
    [told] = reports(server, endpoint, asked[endpoint], streamed)
    deadline_s = time.monotonic() + 30
    while True:
        requests_told = [one for one in History.of(read_events(server.event_log)).requests if one.leave is not None]
        found = [one for one in requests_told if one.arrival.ttft_slo_s == slo_s]
        if found or time.monotonic() > deadline_s:
            break
        time.sleep(0.2)
    [logged] = found
    assert (told["ttft_slo_s"], told["met"], told["cause"]) == (slo_s, True, None)
    assert told["slo_source"].startswith("body")
    assert told["ttft_s"] == pytest.approx(logged.course.first_token_s - logged.arrival.received_s, abs=2e-6)
    assert told["predicted_s"] == logged.course.alone_s


def test_an_overloaded_server_says_429_and_when_to_come_back(server: Server) -> None:
    """Each API, behind requests that may not be refused and of which not all can be met. Those that may be are the
    longest."""
    from transformers import AutoTokenizer

    probe = server.post("/generate", body(prompt(5000, 2000), 1, ttft_slo=60.0)).json()
    one_s = probe["meta_info"]["flowprefill"]["predicted_s"]
    sheddable = {"custom_params": {"ttft_slo": 4.6 * one_s, "sheddable": True}}
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path(), local_files_only=True)
    ids = [prompt(5100 + number, 2500) for number in range(8)]
    texts = [tokenizer.decode(tokens) for tokens in ids[3:7]]
    model = {"model": "embedded"}

    def user(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    asked: list[tuple[str, dict[str, Any]]] = [
        ("/generate", {"input_ids": ids[0], "sampling_params": {"max_new_tokens": 2, **sheddable}}),
        ("/v1/completions", model | {"prompt": ids[1], "max_tokens": 2, **sheddable}),
        ("/v1/completions", model | {"prompt": [ids[2], ids[2][:20]], "max_tokens": 2, **sheddable}),
        ("/v1/responses", model | {"input": texts[0], "max_output_tokens": 2, **sheddable}),
        ("/v1/messages", model | {"messages": user(texts[1]), "max_tokens": 2, **sheddable}),
        ("/generate", {"input_ids": ids[7], "sampling_params": {"max_new_tokens": 2, **sheddable}, "stream": True}),
        ("/v1/responses", model | {"input": texts[2], "max_output_tokens": 2, "stream": True, **sheddable}),
        ("/v1/messages", model | {"messages": user(texts[3]), "max_tokens": 2, "stream": True, **sheddable}),
    ]

    async def refusal(session: aiohttp.ClientSession, path: str, request: dict[str, Any]) -> tuple[int, str, str]:
        async with session.post(server.url + path, json=request) as response:
            return response.status, response.headers.get("Retry-After", ""), await response.text()

    async def all_of_them() -> list[tuple[int, str, str]]:
        async with server.session() as session:
            others = [
                asyncio.create_task(
                    stream(session, server.url, body(prompt(5001 + number, 2000), 2, ttft_slo=4.5 * one_s))
                )
                for number in range(10)
            ]
            await asyncio.sleep(0.02)
            refusals = await asyncio.gather(*(refusal(session, path, request) for path, request in asked))
            await asyncio.gather(*others)
            return refusals

    for (path, _), (status, retry_after, told) in zip(asked, asyncio.run(all_of_them()), strict=True):
        assert status == 429, (path, told)
        assert int(retry_after) >= 1
        assert f"Try again after {retry_after} s" in told, path


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
    request = body(prompt(850, 200), 20_000) | {"stream": True}  # minutes
    with server.post("/generate", request, stream=True) as response:
        lines = response.iter_lines()  # kept: an iterator that is thrown away closes the connection
        first = next(lines)
        state = server.state()
        assert state["streams"] == 1, (first, state, list(read_events(server.event_log))[-3:])
    deadline_s = time.monotonic() + 40
    while server.state()["streams"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def idle_shares(server: Server, seconds: float) -> dict[str, float]:
    """Share of a core that each process of an idle server takes, by the process's name."""
    time.sleep(1.0)
    processes = [server.process, *server.process.children(recursive=True)]
    for process in processes:
        process.cpu_percent()
    time.sleep(seconds)
    return {process.name(): process.cpu_percent() / 100 for process in processes}


def scheduler_share(shares: dict[str, float]) -> float:
    print("the idle server takes of a core:", {name: round(share, 4) for name, share in shares.items()})
    [share] = [share for name, share in shares.items() if "scheduler" in name]
    return share


@pytest.mark.stress
@pytest.mark.alone
def test_an_idle_scheduler_takes_less_than_2_percent_of_a_core(server: Server) -> None:
    assert scheduler_share(idle_shares(server, seconds=20.0)) < MAX_QUIET_IDLE_SHARE


def test_an_idle_server_sleeps_and_can_be_flushed(server: Server) -> None:
    assert scheduler_share(idle_shares(server, seconds=4.0)) < MAX_IDLE_SHARE
    assert server.post("/flush_cache").status_code == 200
    metrics = server.get("/metrics").text
    assert "flowprefill:decode_step_seconds_total" in metrics
    assert is_alive(server.process)


def is_closed_by_an_answer(server: Server) -> bool:
    """Whether an answer closes a connection over which a client goes on asking, before the server is gone."""
    give_up_s = time.monotonic() + 120
    with requests.Session() as session:
        while time.monotonic() < give_up_s:
            try:
                answer = session.get(f"{server.url}/v1/models", headers=bearer(server.key), timeout=60)
            except requests.ConnectionError:
                return False
            if answer.headers.get("Connection") == "close":
                return answer.ok
            time.sleep(0.05)
    return False


def test_at_sigterm_a_stream_runs_to_its_end_and_nothing_is_left(launcher: Launch, server: Server) -> None:
    """The last test that uses it."""
    assert launcher.memory is None or launcher.memory.files()
    assert "Connection" not in server.get("/v1/models").headers
    with ThreadPoolExecutor(1) as pool:
        is_closed = pool.submit(is_closed_by_an_answer, server)
        assert_a_stream_outlives_sigterm(launcher, server.url, server.key)
        assert is_closed.result(10)


@pytest.mark.stress
def test_a_command_line_that_cannot_work_ends_with_one_line_before_the_model_is_loaded() -> None:
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(embedded_model_path())]
    command += [*AGENTS.options, "--hicache-host-memory-mode", "buffer_only"]
    env = os.environ | {"FLOWPREFILL": "1", "SGLANG_PLATFORM": "flowprefill_cpu"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("sgl-flowprefill: ")]
    assert line.startswith("sgl-flowprefill: --hicache-host-memory-mode buffer_only cannot work with FlowPrefill: ")


@pytest.mark.stress
def test_the_command_line_as_it_comes_serves_with_flowprefill(comparison: Comparison, tmp_path: Path) -> None:
    """Of options, it has an address alone, and of FlowPrefill's the file in which this test sees what happened."""
    streams = {f"stream {i}": prompt(920 + i, 60 + 40 * i) for i in range(3)}
    long = prompt(930, 6000)

    async def all_of_them(server: Server) -> dict[str, Any]:
        async with server.session() as session:
            asked = [stream(session, server.url, body(tokens, 40)) for tokens in streams.values()]
            asked.append(stream(session, server.url, body(long, TOKENS, ttft_slo=60.0)))
            answers = await asyncio.gather(*asked)
        return {name: answer for name, (answer, _) in zip([*streams, "long"], answers, strict=True)}

    with serving(tmp_path, *AS_IT_COMES.options, command=SERVE, ours={}) as server:
        for name, answer in asyncio.run(all_of_them(server)).items():
            comparison.generated(name, streams.get(name, long), {"output_token_logprobs": answer})
        told = server.post("/generate", body(streams["stream 0"], TOKENS)).json()["meta_info"]
        info, log = server.get("/server_info").json(), server.log.read_text()
    comparison.generated("with a report", streams["stream 0"], told)
    assert_compared(comparison, answers=5)
    assert told["flowprefill"]["slo_source"] == "default"
    assert told["flowprefill"]["met"] is not None
    assert info["chunked_prefill_size"] == -1
    [internal] = info["internal_states"]
    assert internal["flowprefill_decode"]["steps"] >= 39
    assert "FlowPrefill: --chunked-prefill-size is -1" in log
    doings = {part.what for request in History.of(read_events(server.event_log)).requests for part in request.parts}
    assert {"running", "decoding"} <= doings


@pytest.mark.stress
def test_the_command_line_of_agents_serves_turns_whose_prefixes_come_back_from_host_memory(
    comparison: Comparison, tmp_path: Path
) -> None:
    """Conversations of several turns, more of them than the device has room for."""
    turns = {i: prompt(870 + i, 700) for i in range(12)}

    async def next_turns(server: Server) -> dict[int, Any]:
        async with server.session() as session:
            asked = [stream(session, server.url, body(tokens, TOKENS, ttft_slo=60.0)) for tokens in turns.values()]
            return {i: answer for i, (answer, _) in zip(turns, await asyncio.gather(*asked), strict=True)}

    with serving(tmp_path, "--max-total-tokens", "6000", *AGENTS.options) as server:
        for _ in range(4):
            for i, answer in asyncio.run(next_turns(server)).items():
                comparison.generated(f"conversation {i}", turns[i], {"output_token_logprobs": answer})
                turns[i] = [*turns[i], *(token for _, token, _ in answer), *prompt(900 + len(turns[i]) + i, 60)]
        metrics = server.get("/metrics").text
    assert_compared(comparison, answers=48)
    loaded = re.findall(r"^sglang:load_back_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    print("tokens loaded from host memory:", loaded)
    assert sum(map(float, loaded)) >= 700


@pytest.mark.stress
def test_the_command_line_of_agents_serves_turns_whose_prefixes_come_back_from_storage(
    comparison: Comparison, tmp_path: Path
) -> None:
    """Conversations of several turns on a server that is flushed after each."""
    turns = {i: prompt(970 + i, 700) for i in range(6)}
    options = ("--hicache-storage-backend", "file", "--file-storage-path", str(tmp_path / "storage"))
    options += ("--hicache-storage-prefetch-policy", "wait_complete")

    async def next_turns(server: Server) -> dict[int, Any]:
        async with server.session() as session:
            asked = [stream(session, server.url, body(tokens, TOKENS, ttft_slo=60.0)) for tokens in turns.values()]
            return {i: answer for i, (answer, _) in zip(turns, await asyncio.gather(*asked), strict=True)}

    with serving(tmp_path, "--max-total-tokens", "9000", *AGENTS.options, *options) as server:
        for _ in range(4):
            for i, answer in asyncio.run(next_turns(server)).items():
                comparison.generated(f"conversation {i}", turns[i], {"output_token_logprobs": answer})
                turns[i] = [*turns[i], *(token for _, token, _ in answer), *prompt(1000 + len(turns[i]) + i, 60)]
            deadline_s = time.monotonic() + 60
            while server.post("/flush_cache").status_code != 200:  # all is written first
                assert time.monotonic() < deadline_s
                time.sleep(0.1)
        metrics = server.get("/metrics").text
    assert_compared(comparison, answers=24)
    read = re.findall(r"^sglang:prefetched_tokens_total\{.*\} (\S+)$", metrics, re.MULTILINE)
    print("tokens read from storage:", read)
    assert sum(map(float, read)) >= 3 * 6 * 700
