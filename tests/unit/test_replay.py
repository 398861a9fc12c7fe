"""Replay over real HTTP: against a small server that streams as SGLang and as OpenAI-compatible servers do."""

import asyncio
import functools
import json
import math
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import StringIO
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from sgl_flowprefill.bench.__main__ import main
from sgl_flowprefill.bench.cli import replay as replay_command
from sgl_flowprefill.bench.cli.options import Replay, TraceOptions
from sgl_flowprefill.bench.loadgen import decode_rate
from sgl_flowprefill.bench.loadgen import replay as replay_module
from sgl_flowprefill.bench.loadgen.calibrate import (
    REFERENCE_TTFT_S,
    CalibrationError,
    measure_isolated_ttft,
    time_scale,
)
from sgl_flowprefill.bench.loadgen.client import APIS, Client, GenerateApi, Outcome, served_model
from sgl_flowprefill.bench.loadgen.replay import STOPPED, Enough, ReplayRun, replay
from sgl_flowprefill.bench.metrics.joint import meets
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.events import EventLogError
from sgl_flowprefill.provenance import read_result

pytestmark = pytest.mark.usefixtures("quick_replays")

TTFT_S = 0.05
TBT_S = 0.02
PROMPTS = PromptBuilder(seed=1, first_token_id=100, end_token_id=200)


@dataclass
class FakeServer:
    """Answers with a fixed delay; prompts whose length is in ``failures`` fail in the way named there."""

    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    tells_retractions: bool = True
    s_per_prompt_token: float = 0.0
    cache: list[list[int]] | None = None
    """Prompts so far, where it is to say how much of a prompt it knew."""
    openai_events: Sequence[dict[str, Any]] = ()
    """What an OpenAI stream has instead of an event for each token."""

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        prompt_tokens = len(body["input_ids"])
        cached_tokens = self._cached_tokens(body["input_ids"])
        failure = self.failures.get(prompt_tokens)
        if failure == "503":
            return web.Response(status=503, text="no available workers")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(TTFT_S + self.s_per_prompt_token * prompt_tokens)
        if failure == "abort":
            await _send(response, {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "no KV"}}})
            return response
        count = body["sampling_params"]["max_new_tokens"]
        for done in range(1, count + 1):
            meta = {"prompt_tokens": prompt_tokens, "completion_tokens": done, "cached_tokens": cached_tokens}
            if self.tells_retractions:
                meta["num_retractions"] = int(done > 1)
            await _send(response, {"text": "x" * done, "meta_info": meta})
            if failure == "break":
                return response
            await asyncio.sleep(TBT_S)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _cached_tokens(self, prompt: list[int]) -> int:
        if self.cache is None:
            return 3
        self.cache.append(prompt)
        return max((_common_prefix(prompt, one) for one in self.cache[:-1]), default=0)

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await asyncio.sleep(TTFT_S)
        chat = "messages" in body
        if chat:
            await _send(response, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        token = {"choices": [{"delta": {"content": "x"}} if chat else {"text": "x"}]}
        for event in self.openai_events or [token] * body["max_tokens"]:
            await _send(response, event)
            await asyncio.sleep(TBT_S)
        await _send(response, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": body["max_tokens"]}})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/generate", fake.generate)
    app.router.add_post("/v1/completions", fake.completions)
    app.router.add_post("/v1/chat/completions", fake.completions)
    app.router.add_get("/v1/models", fake.models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> None:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        ready.set()

    def serve() -> None:
        loop.run_until_complete(start())
        loop.run_forever()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(10)
    yield fake
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def trace_of(*prompt_tokens: int, gap_s: float = 0.01, output_tokens: int = 3) -> Trace:
    requests = [
        TraceRequest(index * gap_s, tokens, output_tokens, "text", ttft_slo_s=2.0, tbt_slo_s=1.0)
        for index, tokens in enumerate(prompt_tokens)
    ]
    return Trace("test", requests)


def test_times_and_tokens_of_a_generate_stream(server: FakeServer) -> None:
    began_s = time.monotonic()
    run = replay(trace_of(10, 20, 30), Client(server.url, GenerateApi()), PROMPTS)
    took_s = time.monotonic() - began_s
    assert [result.prompt_tokens for result in run.results] == [10, 20, 30]
    for result in run.results:
        assert result.completed
        assert result.ttft_s is not None
        assert len(result.tbt_s) == 2
        assert TTFT_S <= result.ttft_s <= result.e2e_s - sum(result.tbt_s) < took_s - sum(result.tbt_s)
        assert all(gap_s >= TBT_S * 0.5 for gap_s in result.tbt_s)
        assert result.output_tokens == 3
        assert result.cached_tokens == 3
        assert result.retractions == 1, "the last event's"
        assert result.e2e_s > result.ttft_s
        assert result.meets_ttft()
        assert not result.meets_ttft(slo_scale=0.01)
    assert run.client.valid
    assert 0 < run.client.cpu_share < 1


def test_a_replay_ends_when_enough_is_known_and_counts_what_is_late_by_then(server: FakeServer) -> None:
    server.s_per_prompt_token = 0.3  # 100 tokens take 30 s, and the SLO is 2 s
    trace = trace_of(1, 1, *[100] * 8, gap_s=0.01)
    asked: list[tuple[int, int]] = []

    def enough(met: int, missed: int) -> bool:
        asked.append((met, missed))
        return missed >= 5

    started_s = time.monotonic()
    run = replay(trace, Client(server.url, GenerateApi()), PROMPTS, enough=Enough(enough))
    assert time.monotonic() - started_s < 20
    assert run.stopped_early
    assert asked[-1][0] == 2
    assert sum(result.meets_ttft() for result in run.results) == 2
    assert sum(result.error == STOPPED for result in run.results) >= 5
    whole = replay(trace_of(1, 1), Client(server.url, GenerateApi()), PROMPTS, enough=Enough(enough))
    assert not whole.stopped_early
    assert len(whole.results) == 2


def test_a_tighter_slo_is_a_higher_priority_where_the_system_wants_one(server: FakeServer) -> None:
    slos_s = (0.5, 8.0)
    trace = Trace("test", [TraceRequest(0.01 * n, 10 + n, 1, "text", slo, 1.0) for n, slo in enumerate(slos_s)])
    replay(trace, Client(server.url, GenerateApi(with_priority=True)), PROMPTS)
    tight, loose = sorted(server.bodies, key=lambda body: len(body["input_ids"]))
    assert tight["priority"] > loose["priority"]
    replay(trace_of(10), Client(server.url, GenerateApi()), PROMPTS)
    assert "priority" not in server.bodies[-1]


def test_slos_travel_in_the_sampling_parameters_of_generate(server: FakeServer) -> None:
    replay(trace_of(10), Client(server.url, GenerateApi()), PROMPTS)
    (body,) = server.bodies
    assert body["sampling_params"]["custom_params"] == {"ttft_slo": 2.0, "tbt_slo": 1.0}
    assert body["sampling_params"]["max_new_tokens"] == 3
    assert body["stream"] is True
    assert body["input_ids"] == PROMPTS.unique(10, 0)


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_openai_streams_are_counted_and_carry_the_slo(server: FakeServer, api: str) -> None:
    run = replay(trace_of(10, 10), Client(server.url, APIS[api]("tiny")), PROMPTS)
    for result in run.results:
        assert result.completed
        assert result.ttft_s is not None
        assert result.ttft_s >= TTFT_S
        assert result.output_tokens == 3
        assert result.prompt_tokens == 9
    slos = {"ttft_slo": 2.0, "tbt_slo": 1.0}
    assert all(body["custom_params"] == slos and body["model"] == "tiny" for body in server.bodies)


def text(new: str, tokens: int | None = None) -> dict[str, Any]:
    return {"choices": [{"text": new}], "usage": usage(tokens)}


def delta(tokens: int | None = None, **fields: str) -> dict[str, Any]:
    return {"choices": [{"delta": fields}], "usage": usage(tokens)}


def usage(tokens: int | None) -> dict[str, int] | None:
    return None if tokens is None else {"prompt_tokens": 9, "completion_tokens": tokens}


ROLE = delta(role="assistant", content="")
AT_LAST = {"choices": [], "usage": usage(3)}


@pytest.mark.parametrize(
    ("api", "events", "first_token_s", "tbt_s"),
    [
        ("completions", [text("", 1)], 1.0, []),
        ("completions", [text("", 1), text("x", 2), text("yz", 3), AT_LAST], 1.0, [1.0, 1.0]),
        ("completions", [text(""), text("x"), text("y"), AT_LAST], 2.0, [1.0, 1.0]),
        ("chat", [ROLE, *[delta(reasoning_content="x")] * 2, delta(content="y")], 2.0, [1.0, 1.0]),
        ("chat", [ROLE, delta(0), delta(1, reasoning="x"), delta(3, content="yz"), AT_LAST], 3.0, [0.5, 0.5]),
        ("chat", [ROLE, delta(), {"choices": [], "usage": usage(1)}], 3.0, []),
        ("chat", [ROLE, delta(), AT_LAST], None, []),
    ],
    ids=[
        "one token",
        "the first without text",
        "no usage",
        "reasoning",
        "reasoning with usage",
        "one token of which a chat shows nothing",
        "several",
    ],
)
def test_a_token_of_an_openai_stream_is_seen_when_it_is_counted_or_its_text_or_reasoning_comes(
    api: str, events: list[dict[str, Any]], first_token_s: float | None, tbt_s: list[float]
) -> None:
    outcome = Outcome(sent_s=0.0)
    for second, event in enumerate(events, start=1):
        APIS[api]("tiny").read(event, float(second), outcome)
    assert (outcome.first_token_s, outcome.tbt_s) == (first_token_s, tbt_s)
    assert outcome.tokens == (len(tbt_s) + 1 if first_token_s else 0)


def test_an_answer_of_one_token_whose_text_is_still_to_come_is_complete(server: FakeServer) -> None:
    server.openai_events = [text("", 1)]
    (result,) = replay(trace_of(10, output_tokens=1), Client(server.url, APIS["completions"]("tiny")), PROMPTS).results
    assert (result.error, result.output_tokens, result.prompt_tokens) == (None, 1, 9)
    assert result.ttft_s is not None
    assert result.ttft_s >= TTFT_S
    server.openai_events = [delta()]
    (result,) = replay(trace_of(10, output_tokens=3), Client(server.url, APIS["chat"]("tiny")), PROMPTS).results
    assert result.error == "the stream ended without a token"


def test_a_class_without_an_objective_between_tokens_names_none(server: FakeServer) -> None:
    request = TraceRequest(0.0, 10, 1, "text", 2.0, math.inf)
    replay(Trace("test", [request]), Client(server.url, GenerateApi()), PROMPTS)
    assert server.bodies[-1]["sampling_params"]["custom_params"] == {"ttft_slo": 2.0}
    replay(Trace("test", [request]), Client(server.url, APIS["chat"]("tiny")), PROMPTS)
    assert server.bodies[-1]["custom_params"] == {"ttft_slo": 2.0}


def test_a_replay_may_end_by_what_is_known_of_gaps(server: FakeServer) -> None:
    late = Trace("test", [TraceRequest(0.02 * n, 10, 20, "text", 2.0, TBT_S / 20) for n in range(60)])
    enough = Enough(lambda met, missed: missed >= 5, functools.partial(meets, judge="gaps"))
    run = replay(late, Client(server.url, GenerateApi()), PROMPTS, enough=enough)
    assert run.stopped_early
    assert all(result.meets_ttft() for result in run.results)
    assert not replay(late, Client(server.url, GenerateApi()), PROMPTS, enough=Enough(enough.known)).stopped_early


def test_two_replays_send_the_same_prompts(server: FakeServer) -> None:
    client = Client(server.url, GenerateApi())
    for _ in range(2):
        replay(trace_of(10, 20), client, PROMPTS)
    assert server.bodies[:2] == server.bodies[2:]


def test_requests_are_sent_at_their_times_without_waiting_for_answers(server: FakeServer) -> None:
    server.s_per_prompt_token = 0.03
    started_s = time.monotonic()
    run = replay(trace_of(*[10] * 20, gap_s=0.02), Client(server.url, GenerateApi()), PROMPTS)
    assert time.monotonic() - started_s < 6, "20 answers one after the other take 8 s"
    assert run.client.lateness_p50_s < TTFT_S + 0.3, "less than an answer takes"
    assert run.start_monotonic_s > started_s


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        ("503", "http 503: no available workers"),
        ("abort", "aborted: no KV"),
        ("break", "the stream broke off after 1 tokens"),
    ],
)
def test_failed_requests_are_misses_and_say_why(server: FakeServer, failure: str, message: str) -> None:
    server.failures = {20: failure}
    run = replay(trace_of(10, 20), Client(server.url, GenerateApi()), PROMPTS)
    good, bad = run.results
    assert good.completed
    assert not bad.completed
    assert bad.error == message
    assert not bad.meets_ttft()


def test_a_dead_endpoint_fails_every_request_with_a_message() -> None:
    run = replay(trace_of(10, 20), Client("http://127.0.0.1:9", GenerateApi()), PROMPTS)
    assert all(result.error and "connect" in result.error for result in run.results)


def test_a_silent_server_times_out(server: FakeServer) -> None:
    server.s_per_prompt_token = 0.2
    run = replay(trace_of(10), Client(server.url, GenerateApi(), timeout_s=0.2), PROMPTS)
    assert run.results[0].error == "timeout: nothing came for 0.2 s"


def test_a_client_that_falls_behind_makes_the_run_invalid(server: FakeServer) -> None:
    trace = trace_of(*[10] * 30, gap_s=0.02)
    run = replay(trace, Client(server.url, GenerateApi()), PROMPTS, lambda *_: time.sleep(0.5))
    assert not run.client.valid
    assert "fell behind" in (run.client.invalid_reason or "")


@contextmanager
def open_files(soft: int) -> Iterator[None]:
    """This process may have only so many, as a shell gives it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_requests_are_under_way_than_the_soft_limit_has_files(server: FakeServer) -> None:
    server.s_per_prompt_token = 0.1
    trace = trace_of(*[10] * 200, gap_s=0.002, output_tokens=1)
    with open_files(64):
        run = replay(trace, Client(server.url, GenerateApi()), PROMPTS)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 64
    assert [result.error for result in run.results] == [None] * 200


WITH_64_FILES = """
import resource, sys
from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi
from sgl_flowprefill.bench.loadgen.replay import joined, replay
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
trace = Trace("test", [TraceRequest(0.002 * n, 10, 1, "text", 9.0, 1.0) for n in range(100)])
run = replay(trace, Client(sys.argv[1], GenerateApi()), PromptBuilder(1))
print(sum(result.completed for result in run.results))
print(run.client.invalid_reason)
print(joined([run], [0], [0.0]).client.valid)
"""


def test_requests_that_the_client_has_no_files_for_make_the_run_invalid(server: FakeServer) -> None:
    server.s_per_prompt_token = 0.2
    command = [sys.executable, "-c", WITH_64_FILES, server.url]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    completed, reason, joined_is_valid = said.splitlines()
    assert 0 < int(completed) < 100
    assert reason.startswith(f"the client could not send {100 - int(completed)} requests: it may have 64 files open")
    assert joined_is_valid == "False"


def test_an_error_in_the_progress_callback_ends_the_run_at_once(server: FakeServer) -> None:
    def dead(*_: int) -> None:
        raise RuntimeError("prefill server died")

    started_s = time.monotonic()
    with pytest.raises(RuntimeError, match="prefill server died"):
        replay(trace_of(10, 10, gap_s=30), Client(server.url, GenerateApi()), PROMPTS, dead)
    assert time.monotonic() - started_s < 10


def test_results_survive_the_file(server: FakeServer, tmp_path: Path) -> None:
    run = replay(trace_of(10, 20), Client(server.url, GenerateApi()), PROMPTS)
    run.write_jsonl(tmp_path / "requests.jsonl")
    assert ReplayRun.read_results(tmp_path / "requests.jsonl") == list(run.results)


def test_time_scale_is_the_factor_to_the_reference(server: FakeServer) -> None:
    assert time_scale({tokens: 3 * ttft_s for tokens, ttft_s in REFERENCE_TTFT_S.items()}) == pytest.approx(3)
    solo_ttft_s = measure_isolated_ttft(Client(server.url, GenerateApi()), PROMPTS)
    assert list(solo_ttft_s) == list(REFERENCE_TTFT_S)
    assert all(TTFT_S <= ttft_s < 5 for ttft_s in solo_ttft_s.values())
    prompts = [tuple(body["input_ids"]) for body in server.bodies]
    assert len(set(prompts)) == len(prompts)


def test_no_objective_keeps_answers_from_streaming_at_a_time_where_steps_are_measured(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_rate, "STEP_SHAPES", ((2, 8),))
    monkeypatch.setattr(decode_rate, "STEP_ANSWER_TOKENS", (8,))
    [step] = decode_rate.measure_steps(Client(server.url, GenerateApi()), PROMPTS)
    assert (step.requests, step.context_tokens) == (2, 2 * (8 + 4))
    lax = {"ttft_slo": decode_rate.LAX_S, "tbt_slo": decode_rate.LAX_S}
    assert [body["sampling_params"]["custom_params"] for body in server.bodies] == [lax] * 3


def test_calibration_says_what_the_server_answered(server: FakeServer) -> None:
    server.failures = {512: "503"}
    with pytest.raises(CalibrationError, match="no available workers"):
        measure_isolated_ttft(Client(server.url, GenerateApi()), PROMPTS)


def test_served_model_is_the_first_of_the_list(server: FakeServer) -> None:
    assert served_model(server.url) == "tiny"
    assert served_model("http://127.0.0.1:9") == "default"


def replayed(server: FakeServer, folder: Path, *options: str) -> tuple[list[list[int]], dict[str, Any]]:
    """The prompts that `bench replay` sends of a trace of two requests that share a block, and its report."""
    rows = [
        {"timestamp": at_ms, "input_length": 600, "output_length": 1, "hash_ids": [0, 1 + at_ms]} for at_ms in (0, 100)
    ]
    trace, before = folder / "trace.jsonl", len(server.bodies)
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--url", server.url, "--trace", str(trace), "--time-scale", "1", "--out", str(folder), *options]
    assert main(["replay", *given]) == 0
    return [body["input_ids"] for body in server.bodies[before:]], dict(read_result(folder / "report.json").figures)


def test_a_run_meets_no_prompt_that_a_run_before_it_left_in_the_servers_cache(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay_module, "MAX_LATENESS_OF_SLO", 100.0)  # a busy machine is not what is tested
    server.cache = []
    runs = [replayed(server, tmp_path) for _ in range(2)]
    for prompts, report in runs:
        assert [len(prompt) for prompt in prompts] == [600, 600]
        assert prompts[0][:512] == prompts[1][:512], "prompts of a run share their prefixes"
        assert report["doubts"] == []
    (first, report), (second, _) = runs
    assert first[0][:16] != second[0][:16]
    again, of_known = replayed(server, tmp_path, "--prompt-seed", str(report["settings"]["prompt_seed"]))
    assert sorted(again) == sorted(first), "whoever needs the same prompts can have them"
    (doubt,) = of_known["doubts"]
    assert doubt.startswith("endpoint had 1,200 of 1,200 prompt tokens in its cache, and requests of the trace share")


def test_the_command_looks_at_its_files_before_it_sends_anything(server: FakeServer, tmp_path: Path) -> None:
    def run(out: str, event_log: str | None = None) -> int:
        trace = TraceOptions(trace="mixed", rate_scale=20.0, time_scale=1.0, duration=0.5, max_prompt_tokens=10)
        log = None if event_log is None else tmp_path / event_log
        options = Replay(url=server.url, event_log=log, out=tmp_path / out, max_output_tokens=1, trace=trace)
        return replay_command.run(options, Console(file=StringIO()))

    (tmp_path / "file").write_text("")
    (tmp_path / "notes").write_text("none of the server's\n")
    with pytest.raises(FileNotFoundError, match="mistyped"):
        run("new", "mistyped")
    with pytest.raises(EventLogError, match="is no event log"):
        run("new", "notes")
    with pytest.raises(FileExistsError):
        run("file")
    assert not server.bodies
    run("new", "file")
    assert server.bodies
    assert {path.name for path in (tmp_path / "new").iterdir()} >= {"endpoint.jsonl", "report.json"}
