"""Servers of another engine: what is asked of them, what they are told, and what is said of those that cannot do it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan, Prober
from sgl_flowprefill.bench.capacity.probes import ProbeLog
from sgl_flowprefill.bench.capacity.results import GoodputResult
from sgl_flowprefill.bench.cli.options import Demo, parse
from sgl_flowprefill.bench.cli.requested import requested_trace
from sgl_flowprefill.bench.loadgen import calibrate, decode_rate
from sgl_flowprefill.bench.loadgen import replay as replay_module
from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.systems import endpoint as endpoint_module
from sgl_flowprefill.bench.systems.catalog import endpoint, endpoints
from sgl_flowprefill.bench.systems.endpoint import EndpointError, ForeignEndpoint, check_room, connect
from sgl_flowprefill.bench.systems.serving import Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.provenance import read_result

pytestmark = pytest.mark.usefixtures("quick_replays")

S_PER_TOKEN = 2e-6
EXTENSIONS = {"ignore_eos", "custom_params"}
PROMPTS = PromptBuilder(0, 1000, 4000)


@dataclass
class OpenAiServer:
    """A server with OpenAI's completions API, as strict as a test wants it; it serves one request after the other."""

    url: str = ""
    refused_fields: frozenset[str] = frozenset()
    """Fields of a body that it refuses as TensorRT-LLM refuses unknown ones."""
    takes_token_ids: bool = True
    model: dict[str, Any] = field(default_factory=lambda: {"id": "tiny", "owned_by": "vllm", "max_model_len": 32768})
    fails: str | None = None
    delay_s: Callable[[int], float] = field(default=lambda tokens: S_PER_TOKEN * tokens)
    s_per_answer_token: float = 0.0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1000))

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if unknown := self.refused_fields & body.keys():
            return web.Response(status=400, text=f"Extra inputs are not permitted: {sorted(unknown)}")
        if not isinstance(body["prompt"], str) and not self.takes_token_ids:
            return web.Response(status=422, text="prompt: Input should be a valid string")
        if self.fails:
            return web.Response(status=500, text=self.fails)
        prompt = body["prompt"].split() if isinstance(body["prompt"], str) else body["prompt"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async with self.turns:
            if request.transport is None or request.transport.is_closing():
                return response  # whoever asked has gone
            await asyncio.sleep(self.delay_s(len(prompt)))
        for done in range(1, body["max_tokens"] + 1):
            usage = {"prompt_tokens": len(prompt), "completion_tokens": done}
            await response.write(
                b"data: " + json.dumps({"choices": [{"text": "x"}], "usage": usage}).encode() + b"\n\n"
            )
            await asyncio.sleep(self.s_per_answer_token)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [self.model] if self.model else []})


@contextmanager
def running(server: OpenAiServer) -> Iterator[OpenAiServer]:
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/completions", server.completions)
    app.router.add_get("/v1/models", server.models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


@pytest.fixture
def server() -> Iterator[OpenAiServer]:
    with running(OpenAiServer()) as one:
        yield one


def reached(server: OpenAiServer, said: list[str] | None = None) -> ForeignEndpoint:
    return connect(endpoint(f"vllm={server.url}/v1"), (said if said is not None else []).append)


@pytest.mark.parametrize(
    ("refused_fields", "takes_token_ids", "expected"),
    [
        (frozenset(), True, "token ids, ignore_eos"),
        (frozenset({"custom_params"}), True, "token ids, ignore_eos"),
        (frozenset(EXTENSIONS), True, "token ids, documented fields only"),
        (frozenset({"custom_params"}), False, "text, ignore_eos"),
        (frozenset(EXTENSIONS), False, "text, documented fields only"),
    ],
    ids=["vLLM", "TensorRT-LLM", "documented fields only", "text only", "OpenAI's own rules"],
)
def test_an_endpoint_gets_what_it_takes(
    server: OpenAiServer, refused_fields: frozenset[str], takes_token_ids: bool, expected: str
) -> None:
    server.refused_fields, server.takes_token_ids = refused_fields, takes_token_ids
    said: list[str] = []
    found = reached(server, said)
    assert any(expected in line for line in said)
    assert found.settings() == {
        "url": server.url, "model": "tiny", "requests": expected, "owned_by": "vllm", "max_model_len": 32768,
    }  # fmt: skip
    trace = Trace("one", [TraceRequest(0.0, 40, 3, "text", ttft_slo_s=2.0, tbt_slo_s=1.0)])
    (result,) = found.replay(trace, PROMPTS).results
    assert (result.error, result.prompt_tokens, result.output_tokens) == (None, 40, 3)
    assert "custom_params" not in server.bodies[-1]


def test_isolated_requests_and_decoding_are_measured_through_it(
    server: OpenAiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_rate, "STREAM_ANSWER_TOKENS", 40)
    server.delay_s = lambda tokens: 1e-5 * tokens
    server.s_per_answer_token = 0.01
    found = reached(server)
    times_s = found.solo_ttft_s(PROMPTS)
    assert set(times_s) == set(REFERENCE_TTFT_S)
    for tokens, ttft_s in times_s.items():
        assert 1e-5 * tokens <= ttft_s < 1e-5 * tokens + 0.5
    assert found.decode_tokens_per_s(PROMPTS) > 0
    steps = found.decode_steps(PROMPTS)
    assert {step.requests for step in steps} == {1, 4, 16}
    assert all(step.time_s >= 0.009 for step in steps), "the server waits 10 ms behind each token"
    assert found.engine(PROMPTS) is None


def test_a_run_meets_no_prefix_that_the_run_before_left_in_the_cache(server: OpenAiServer) -> None:
    request = TraceRequest(0.0, 40, 1, "text", ttft_slo_s=2.0, tbt_slo_s=1.0, hash_ids=(7, 8), block_tokens=16)
    trace = Trace("shared", [request, request])
    found = reached(server)
    for _ in range(2):
        found.replay(trace, PROMPTS)
    found.come_to_rest()
    found.replay(trace, PROMPTS)
    prompts = [body["prompt"] for body in server.bodies[-6:]]
    first, second, after = (sorted(prompts[place : place + 2]) for place in (0, 2, 4))
    assert first[0][:32] == first[1][:32], "prompts of a run share their prefixes"
    assert first == second, "so do the parts of a trace"
    assert after[0][:32] == after[1][:32]
    assert after[0][:16] != first[0][:16]


def test_it_is_at_rest_when_an_isolated_request_is_as_fast_as_at_first(
    server: OpenAiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint_module, "REST_POLL_S", 0.0)
    server.delay_s = lambda tokens: 0.05
    found = reached(server)
    found.solo_ttft_s(PROMPTS)
    slow = iter([0.5, 0.4])
    before = len(server.bodies)
    server.delay_s = lambda tokens: next(slow, 0.05)
    found.come_to_rest()
    assert len(server.bodies) - before == 3
    server.delay_s = lambda tokens: 0.5
    monkeypatch.setattr(endpoint_module, "REST_TIMEOUT_S", 0.0)
    with pytest.raises(EndpointError, match=rf"{server.url} does not come to rest.*let nobody else use the endpoint"):
        found.come_to_rest()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": None}, "/v1/models lists no model: start the server, or correct --endpoint vllm=URL"),
        ({"model": {"id": "tiny", "max_model_len": 4096}}, "serves at most 4,096 tokens of tiny.*--max-model-len"),
        ({"fails": "out of memory"}, "/v1/completions failed: http 500: out of memory; see the server's log"),
        (
            {"refused_fields": frozenset({"max_tokens"})},
            "takes none of the requests.*token ids.*text.*give --endpoint the URL of a server with OpenAI's",
        ),
    ],
    ids=["no model", "too short a context", "an error", "no completions"],
)
def test_an_endpoint_that_cannot_be_measured_is_named_with_the_remedy(
    server: OpenAiServer, change: dict[str, Any], said: str
) -> None:
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(EndpointError, match=said.replace("vllm=URL", f"vllm={server.url}")) as error:
        reached(server)
    assert server.url in str(error.value)


def test_an_endpoint_whose_context_is_too_short_for_a_request_of_the_trace_is_refused_before_it_is_sent(
    server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.model = {"id": "tiny", "max_model_len": 9000}
    longest = TraceRequest(0.0, 8991, 10, "text", ttft_slo_s=2.0, tbt_slo_s=1.0)
    found = reached(server)
    with pytest.raises(EndpointError, match="at most 9,000 tokens of tiny, and requests of own have up to 9,001"):
        check_room(found.about, Trace("own", [longest]))
    check_room(found.about, Trace("own", [dataclasses.replace(longest, output_tokens=9)]))

    server.bodies.clear()
    asked = ["--trace", "long", "--duration", "20", "--time-scale", "1", "--max-output-tokens", "2"]
    command = ["demo", "--systems", "", "--endpoint", f"vllm={server.url}", "--out", str(tmp_path), *asked]
    options = parse(command)
    assert isinstance(options, Demo)
    needed = max(request.prompt_tokens for request in requested_trace(options.trace, 1.0).requests) + 2
    assert needed > 9000
    assert main(command) == 2
    assert f"requests of long have up to {needed:,}: start it with a longer context" in capsys.readouterr().err
    assert {len(body["prompt"]) for body in server.bodies} == {16, *REFERENCE_TTFT_S}, "none is of the trace"


def test_an_endpoint_that_is_not_there_is_named_with_the_remedy() -> None:
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9/v1/models gives no list.*start the server, or correct"):
        connect(endpoint("vllm=http://127.0.0.1:9/v1"), print)


def test_an_endpoint_that_fails_while_it_is_measured_is_named_with_the_remedy(server: OpenAiServer) -> None:
    found = reached(server)
    server.fails = "no KV cache"
    with pytest.raises(EndpointError, match=rf"{server.url} failed: http 500: no KV cache; see the log of the server"):
        found.solo_ttft_s(PROMPTS)


@pytest.mark.parametrize("text", ["vllm", "vllm=", "=http://h:1", "a b=http://h:1", "x=ftp://h", "../x=http://h:1"])
def test_what_names_no_endpoint_is_refused_with_the_form_that_is_wanted(text: str) -> None:
    with pytest.raises(ValueError, match="not of the form NAME=URL, for example"):
        endpoint(text)


def test_the_name_of_a_system_is_refused() -> None:
    for name in ("sglang", "s-edf"):
        with pytest.raises(ValueError, match=f"a system is called '{name}' already; give another name"):
            endpoint(f"{name}=http://127.0.0.1:1")


@pytest.mark.parametrize("command", ["demo", "goodput"])
def test_two_endpoints_of_one_name_are_refused_before_anything_is_asked_of_them(
    command: str, server: OpenAiServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--endpoint", f"vllm={server.url}", "--endpoint", "vllm=http://127.0.0.1:9"]
    assert main([command, "--systems", "", *given, "--out", str(tmp_path)]) == 2
    assert f"{server.url} is called 'vllm' already; give another name" in capsys.readouterr().err
    assert server.bodies == []
    named = endpoints([f"vllm={server.url}", f"other={server.url}"])
    assert [one.name for one in named] == ["vllm", "other"], "one server may take part twice"


def test_a_capacity_search_finds_the_rate_of_an_endpoint_and_does_not_simulate_it(
    server: OpenAiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "MAX_LATENESS_OF_SLO", 100.0)  # a busy machine is not what is tested
    monkeypatch.setattr(calibrate, "REPEATS", 1)
    monkeypatch.setattr(endpoint_module, "REST_POLL_S", 0.05)
    server.delay_s = lambda tokens: 1e-5 * tokens
    server.turns = asyncio.Semaphore(1)
    system = endpoint(f"vllm={server.url}")
    plan = Plan(workload("mixed"), seeds=1, duration_s=0.5, max_output_tokens=2)

    def search(system: System) -> Campaign:
        log = ProbeLog(tmp_path / "probes.jsonl", {})
        with serving(Servers(), tmp_path, lambda line: None, side_by_side=True) as serve:
            prober = Prober(plan, log, serve, Console(file=StringIO()), FlowPrefillConfig())
            campaign = Campaign(prober, [system], Goal((0.8,), precision=4.0))
            campaign.run()
        return campaign

    campaign = search(system)
    document = GoodputResult.of(campaign, "tiny").to_dict()
    assert document["finished"]
    found = document["systems"]["vllm"]
    assert found["simulated_max_rate_rps"] == {"80": None}
    assert found["max_rate_rps"]["80"] > 0
    prober = campaign.prober
    del prober.log.solo_ttft_s["vllm"][1:]  # what was known when the search began
    one_by_one_rps = prober.one_by_one_rps(prober.trace(0, plan.workload.rate_rps), system)
    assert prober.log.probes[0].rate_rps == pytest.approx(max(40.0, one_by_one_rps), rel=0.001)
    with pytest.raises(ValueError, match=r"probes of vllm so far are of .*give another --out, or another name"):
        search(endpoint("vllm=http://127.0.0.1:9"))


def test_the_demo_replays_its_trace_on_an_endpoint_and_says_what_it_is(server: OpenAiServer, tmp_path: Path) -> None:
    server.delay_s = lambda tokens: 1e-5 * tokens
    options = ["--trace", "mixed", "--duration", "2", "--time-scale", "1", "--max-output-tokens", "2"]
    code = main(["demo", "--systems", "", "--endpoint", f"vllm={server.url}/v1", "--out", str(tmp_path), *options])
    document = read_result(tmp_path / "report.json").figures
    assert code == 0
    found = document["systems"]["vllm"]
    assert found["completed"] == found["requests"] > 0
    assert set(found["solo_ttft_s"]) == {str(tokens) for tokens in REFERENCE_TTFT_S}
    assert found["settings"]["url"] == server.url
    assert found["label"] == f"vllm ({server.url.removeprefix('http://')})"
    assert [turn["system"] for turn in document["turns"]] == ["vllm", "vllm"]
