"""What FlowPrefill promises its users, on a real pair of servers behind the gateway."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import psutil
import pytest
import requests
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import AnyEvent, Arrival, read_events
from tests.prompts import prompt
from tests.reference import LOGPROB_TOLERANCE, TOKENS, Comparison
from tests.wall_clock import LONG, OFFSETS_S, URGENT, URGENT_SLO_S, WallClock, serve_while_it_is_set

pytestmark = pytest.mark.server

MAX_IDLE_SHARE = 0.05
"""Share of a core, on a slow machine too; SGLang's own idle prefill server takes most of one."""


SHARED = prompt(1, 400)
MIX = [
    *((prompt(10 + i, 9000 - 700 * i), 60.0 - 4 * i) for i in range(6)),
    *((prompt(30 + i, 700 + 90 * i, SHARED), 8.0 - i) for i in range(4)),
    *((prompt(50 + i, 60 + 40 * i), 1.0) for i in range(6)),
]
"""Long prompts with loose objectives first, then ever tighter ones: each newcomer preempts what runs."""


def body(tokens: list[int], slo_s: float, output_tokens: int = TOKENS) -> dict[str, Any]:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}


async def replay_mix(cluster: Cluster) -> list[tuple[list[int], list[float]]]:
    """Output tokens and their log probabilities of every request of the mix, sent 60 ms apart."""

    async def one(session: aiohttp.ClientSession, delay_s: float, tokens: list[int], slo_s: float) -> Any:
        await asyncio.sleep(delay_s)
        async with session.post(cluster.url + "/generate", json=body(tokens, slo_s)) as response:
            assert response.status == 200, await response.text()
            answer = await response.json()
        logprobs = answer["meta_info"]["output_token_logprobs"]
        return [entry[1] for entry in logprobs], [entry[0] for entry in logprobs]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
        jobs = [one(session, 0.06 * i, tokens, slo_s) for i, (tokens, slo_s) in enumerate(MIX)]
        return list(await asyncio.gather(*jobs))


ANSWERS: dict[str, list[tuple[list[int], list[float]]]] = {}


def events_since(cluster: Cluster, start_s: float) -> list[AnyEvent]:
    log = cluster.config.options.event_log
    assert log is not None
    return [event for event in read_events(log) if event.t_s >= start_s]


def is_of_health_checks(event: AnyEvent) -> bool:
    """Whether it tells of the prefills that the gateway asks for now and then, to see that the server answers."""
    rids = [event.rid] if isinstance(event, Arrival) else event.rids
    return all(rid.startswith(HEALTH_CHECK_RID_PREFIX) for rid in rids)


class TestFlowPrefill:
    def test_a_mix_is_preempted_many_times_and_three_deep_and_answered_as_by_transformers(
        self, flowprefill_cluster: Cluster, comparison: Comparison
    ) -> None:
        start_s = time.monotonic()
        ANSWERS["flowprefill"] = asyncio.run(replay_mix(flowprefill_cluster))
        time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
        events = events_since(flowprefill_cluster, start_s)
        live: set[int] = set()
        deepest = 0
        for event in events:
            if event.kind == "start":
                live.add(event.task)
            elif event.kind == "complete":
                live.discard(event.task)
            deepest = max(deepest, len(live))
        suspends = [event for event in events if event.kind == "suspend"]
        blocking_s = [event.blocking_s for event in suspends if event.blocking_s is not None]  # None: nobody has come
        assert len(blocking_s) >= 5
        assert deepest >= 4, "not nested three deep"
        assert min(blocking_s) >= 0
        for (prompt_tokens, _), (tokens, logprobs) in zip(MIX, ANSWERS["flowprefill"], strict=True):
            comparison.answer(f"{len(prompt_tokens)} tokens", prompt_tokens, tokens, logprobs)
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == TOKENS * len(MIX)

    @pytest.mark.parametrize("value", [-1, 0, "soon", True, math.inf])
    @pytest.mark.parametrize(
        ("path", "rest"),
        [
            ("/generate", {"text": " bake lomi"}),
            ("/generate", {"text": " bake lomi", "stream": True}),
            ("/v1/completions", {"prompt": " bake lomi", "stream": True}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "bake"}], "stream": True}),
        ],
    )
    def test_an_invalid_objective_is_a_400_and_never_scheduled(
        self, flowprefill_cluster: Cluster, path: str, rest: dict[str, Any], value: Any
    ) -> None:
        custom_params = {"custom_params": {"ttft_slo": value}}
        holder = {"sampling_params": custom_params} if path == "/generate" else custom_params
        start_s = time.monotonic()
        text = json.dumps({"model": "embedded", **rest, **holder})
        # JSON has no infinity, but a number past the largest double is one to every parser that accepts it.
        text = text.replace("Infinity", "1e999")
        response = requests.post(
            flowprefill_cluster.prefill_url + path, data=text, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert response.status_code == 400, response.text
        if value != math.inf:
            assert "positive, finite number of seconds" in response.text
            through = requests.post(
                flowprefill_cluster.url + path,
                data=text,
                headers={"Content-Type": "application/json"},
                timeout=60,
            )
            assert through.status_code == 400, through.text
        events = events_since(flowprefill_cluster, start_s)
        assert [event for event in events if not is_of_health_checks(event)] == []

    @pytest.mark.parametrize("number", ["-1", "9" * 30, "1" + "0" * 400])
    @pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/vertex_generate"])
    def test_no_number_is_an_error_of_the_server(self, flowprefill_cluster: Cluster, path: str, number: str) -> None:
        params = {"custom_params": {"ttft_slo": "NUMBER"}}
        body: dict[str, Any] = {
            "/generate": {"text": " bake lomi", "sampling_params": params},
            "/v1/completions": {"model": "embedded", "prompt": " bake lomi", **params},
            "/vertex_generate": {"instances": [{"text": " bake lomi"}], "parameters": {"sampling_params": params}},
        }[path]
        response = requests.post(
            flowprefill_cluster.prefill_url + path,
            data=json.dumps(body).replace('"NUMBER"', number),
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
        assert response.status_code == 400, response.text
        if len(number) < 309:  # SGLang's parser knows no larger ones
            assert "positive, finite number of seconds" in response.text
        assert len(response.text) < 1000

    def test_an_objective_at_the_top_of_a_generate_body_is_what_the_scheduler_sees(
        self, flowprefill_cluster: Cluster
    ) -> None:
        """As ``sglang.bench_serving --extra-request-body`` sends it."""
        start_s = time.monotonic()
        top, inside = {"custom_params": {"ttft_slo": 1.25}}, {"custom_params": {"ttft_slo": 2.5}}
        sampling = {"max_new_tokens": 2, "temperature": 0}
        bodies = [top | {"sampling_params": sampling}, {"sampling_params": sampling | inside}, {}]
        url = flowprefill_cluster.url + "/generate"
        for body_ in bodies:
            answer = requests.post(url, json={"text": " bake lomi", "sampling_params": sampling} | body_, timeout=60)
            assert answer.status_code == 200, answer.text
        both = top | {"text": " bake lomi", "sampling_params": sampling | inside}
        refusal = requests.post(flowprefill_cluster.prefill_url + "/generate", json=both, timeout=60)
        assert refusal.status_code == 400
        assert "name it once" in refusal.text
        time.sleep(0.5)
        arrivals = [event for event in events_since(flowprefill_cluster, start_s) if event.kind == "arrival"]
        assert [event.ttft_slo_s for event in arrivals] == [1.25, 2.5, 5.0]

    def test_health_is_answered_while_a_long_prompt_runs(self, flowprefill_cluster: Cluster) -> None:
        async def ask() -> tuple[float, list[float]]:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:

                async def long_prompt() -> float:
                    started_s = time.monotonic()
                    url = flowprefill_cluster.url + "/generate"
                    async with session.post(url, json=body(prompt(70, 16_000), 60.0, 1)) as response:
                        assert response.status == 200
                    return time.monotonic() - started_s

                long = asyncio.create_task(long_prompt())
                await asyncio.sleep(0.3)
                answered_s: list[float] = []
                while not long.done():
                    started_s = time.monotonic()
                    async with session.get(flowprefill_cluster.prefill_url + "/health") as response:
                        assert response.status == 200
                    answered_s.append(time.monotonic() - started_s)
                    await asyncio.sleep(0.1)
                return await long, answered_s

        took_s, answered_s = asyncio.run(ask())
        print(f"16k prompt {took_s:.2f} s; /health {len(answered_s)} times, slowest {max(answered_s):.3f} s")
        assert took_s > 1.5
        assert len(answered_s) >= 5
        assert max(answered_s) < 1.0

    def test_a_client_that_disconnects_frees_its_work(
        self, flowprefill_cluster: Cluster, comparison: Comparison
    ) -> None:
        async def leave() -> None:
            timeout = aiohttp.ClientTimeout(0.6)
            async with aiohttp.ClientSession(timeout=timeout) as session:
                request = body(prompt(80, 30_000), 100.0, 1) | {"stream": True}
                with pytest.raises((asyncio.TimeoutError, aiohttp.ClientError)):
                    async with session.post(flowprefill_cluster.url + "/generate", json=request) as response:
                        await response.read()

        start_s = time.monotonic()
        asyncio.run(leave())
        left_s = time.monotonic()
        answer = requests.post(flowprefill_cluster.url + "/generate", json=body(prompt(81, 50), 5.0), timeout=60)
        assert answer.status_code == 200
        logprobs = answer.json()["meta_info"]["output_token_logprobs"]
        comparison.answer("beside", prompt(81, 50), [entry[1] for entry in logprobs], [entry[0] for entry in logprobs])
        comparison.assert_same()
        time.sleep(1.5)
        aborts = [event for event in events_since(flowprefill_cluster, start_s) if event.kind == "abort"]
        assert len(aborts) == 1
        assert aborts[0].t_s - left_s < 2.0
        assert isinstance(aborts[0].task, int), "it was running"
        # SGLang refuses to flush, and its idle check fails the server, while anything is still held.
        flushed = requests.post(flowprefill_cluster.prefill_url + "/flush_cache", timeout=30)
        assert flushed.status_code == 200, flushed.text
        flowprefill_cluster.check()

    def test_frontend_programs_of_sglang_run_through_the_gateway(self, flowprefill_cluster: Cluster) -> None:
        import sglang as sgl

        @sgl.function
        def program(s: Any) -> None:
            s += " bake lomi tura"
            s += sgl.gen("first", max_tokens=5, temperature=0)
            s += " bake"
            s += sgl.gen("second", max_tokens=5, temperature=0)

        state = program.run(backend=sgl.RuntimeEndpoint(flowprefill_cluster.url))
        whole = requests.post(
            flowprefill_cluster.url + "/generate",
            json={"text": " bake lomi tura", "sampling_params": {"max_new_tokens": 5, "temperature": 0}},
            timeout=60,
        ).json()
        assert state["first"] == whole["text"]
        assert state["second"]

    def test_metrics_show_preemptions_and_what_the_ttft_model_learned(self, flowprefill_cluster: Cluster) -> None:
        text = requests.get(flowprefill_cluster.prefill_url + "/metrics", timeout=30).text
        samples = {line.split("{")[0]: line for line in text.splitlines() if line.startswith("flowprefill:")}
        assert float(samples["flowprefill:preemptions_total"].split()[-1]) >= 1
        assert float(samples["flowprefill:blocking_seconds_count"].split()[-1]) >= 1
        assert 'value="correction"' in text
        assert 'value="margin"' in text

    def test_idle_servers_sleep(self, flowprefill_cluster: Cluster) -> None:
        shares = idle_shares(flowprefill_cluster)
        print("idle share of a core:", shares)
        assert shares["prefill"] < MAX_IDLE_SHARE
        assert shares["decode"] < MAX_IDLE_SHARE


@pytest.fixture
def stepping(wall_clock: WallClock) -> Iterator[WallClock]:
    yield wall_clock
    wall_clock.set(0.0)


class TestFlowPrefillWhileTheWallClockIsSet:
    def test_no_deadline_changes_and_no_grammar_fails(self, flowprefill_cluster: Cluster, stepping: WallClock) -> None:
        start_s = time.monotonic()
        ttfts_s = asyncio.run(serve_while_it_is_set(flowprefill_cluster.url, stepping))
        in_time = [sum(ttft_s <= URGENT_SLO_S for ttft_s in segment) for segment in ttfts_s]
        for offset_s, count, segment in zip(OFFSETS_S, in_time, ttfts_s, strict=True):
            print(f"wall clock {offset_s:+g} s: {count} of {URGENT} in time, slowest {max(segment):.2f} s")
        time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
        arrivals = [event for event in events_since(flowprefill_cluster, start_s) if event.kind == "arrival"]
        assert len(arrivals) == len(OFFSETS_S) * (LONG + URGENT + 1)
        assert all(0.0 <= event.t_s - event.received_s < 5.0 for event in arrivals)
        assert all(count >= in_time[0] - 2 for count in in_time)
        assert in_time[0] >= URGENT * 0.8

    def test_a_scheduler_that_hangs_is_not_healthy(self, flowprefill_cluster: Cluster, stepping: WallClock) -> None:
        """SGLang's own handler finds an answer from before the step, which looks newer than the question."""
        scheduler = scheduler_of(flowprefill_cluster, "prefill")
        url = flowprefill_cluster.prefill_url + "/health"
        assert requests.get(url, timeout=30).status_code == 200
        scheduler.suspend()
        try:
            stepping.set(-30.0)
            with pytest.raises(requests.Timeout):
                requests.get(url, timeout=4)
        finally:
            scheduler.resume()
        assert requests.get(url, timeout=30).status_code == 200


class TestAgainstSGLangsOwnScheduler:
    def test_the_same_tokens_and_log_probabilities(self, stock_cluster: Cluster) -> None:
        assert "flowprefill" in ANSWERS, "runs after TestFlowPrefill's mix"
        stock = asyncio.run(replay_mix(stock_cluster))
        for (tokens, logprobs), (expected, expected_logprobs) in zip(ANSWERS["flowprefill"], stock, strict=True):
            assert tokens == expected
            assert logprobs == pytest.approx(expected_logprobs, abs=LOGPROB_TOLERANCE)

    def test_its_idle_prefill_server_spins(self, stock_cluster: Cluster) -> None:
        shares = idle_shares(stock_cluster)
        print("idle share of a core, stock:", shares)
        assert shares["prefill"] > 0.2, "if stock sleeps now, the comparison in the README is out of date"
        assert shares["decode"] < MAX_IDLE_SHARE


def scheduler_of(cluster: Cluster, server: str) -> psutil.Process:
    children = psutil.Process(cluster.processes[server]).children(recursive=True)
    return next(process for process in children if "scheduler" in process.name())


def idle_shares(cluster: Cluster, seconds: float = 5.0) -> dict[str, float]:
    """Share of a core that the scheduler process of each idle server takes."""
    time.sleep(2.0)
    schedulers = {name: scheduler_of(cluster, name) for name in ("prefill", "decode")}

    def cpu_s(process: psutil.Process) -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    before = {name: cpu_s(process) for name, process in schedulers.items()}
    time.sleep(seconds)
    return {name: (cpu_s(process) - before[name]) / seconds for name, process in schedulers.items()}
