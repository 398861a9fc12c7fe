"""What FlowPrefill promises its users, on a real pair of servers behind the gateway."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import AnyEvent, Arrival, Leave, Ready, read_events
from sgl_flowprefill.metrics.table import CAUSES, EVENT_COST, SUSPENDED_BYTES, SUSPENDED_TASKS, TTFT_MET, TTFT_MISSED
from sgl_flowprefill.outcomes import Outcomes
from sgl_flowprefill.timeline import History
from tests.prometheus import assert_everything_can_be_asked, needs_prometheus, scraping
from tests.prompts import prompt
from tests.reference import LOGPROB_TOLERANCE, TOKENS, Comparison
from tests.servers.conftest import OneCluster
from tests.stopwatch import Stopwatch
from tests.wall_clock import LONG, OFFSETS_S, URGENT, URGENT_SLO_S, WallClock, serve_while_it_is_set

MAX_IDLE_SHARE = 0.05
"""Share of a core, on a slow machine too; SGLang's own idle prefill server takes most of one."""


OPERATOR = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)")

SHARED = prompt(1, 400)
MIX = [
    *((prompt(10 + i, 6000 - 400 * i), 60.0 - 4 * i) for i in range(6)),
    *((prompt(30 + i, 700 + 90 * i, SHARED), 8.0 - i) for i in range(4)),
    *((prompt(50 + i, 60 + 40 * i), 1.0) for i in range(6)),
]
"""Long prompts with loose objectives first, then ever tighter ones: each newcomer preempts what runs."""


def body(tokens: list[int], slo_s: float, output_tokens: int = TOKENS) -> dict[str, Any]:
    sampling = {"max_new_tokens": output_tokens, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
    return {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}


Answers = list[tuple[list[int], list[float]]]


async def replay_mix(cluster: Cluster) -> Answers:
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


class Replayed(NamedTuple):
    """The mix on FlowPrefill."""

    answers: Answers
    events: list[AnyEvent]


@pytest.fixture(scope="session")
def replayed(one_cluster: OneCluster) -> Replayed:
    """The mix on FlowPrefill, replayed once: for the first test that asks for it, whichever that is."""
    cluster = one_cluster.get(flowprefill=True)
    start_s = time.monotonic()
    answers = asyncio.run(replay_mix(cluster))
    time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
    return Replayed(answers, events_since(cluster, start_s))


def events_since(cluster: Cluster, start_s: float) -> list[AnyEvent]:
    log = cluster.config.options.event_log
    assert log is not None
    return [event for event in read_events(log) if event.t_s >= start_s]


def is_of_health_checks(event: AnyEvent) -> bool:
    """Whether it tells of the prefills that the gateway asks for now and then, to see that the server answers."""
    rids = [event.rid] if isinstance(event, Arrival | Ready | Leave) else event.rids
    return all(rid.startswith(HEALTH_CHECK_RID_PREFIX) for rid in rids)


def outcome_counters(cluster: Cluster) -> Counter[tuple[str, ...]]:
    """Requests that the prefill server's metrics have as met, by class, and missed, by class and cause."""
    text = requests.get(cluster.prefill_url + "/metrics", timeout=30).text
    found: Counter[tuple[str, ...]] = Counter()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (TTFT_MET.series, TTFT_MISSED.series):
                cause = (sample.labels["cause"],) if "cause" in sample.labels else ()
                found[sample.labels["slo_class"], *cause] += int(sample.value)
    return found


class TestFlowPrefill:
    def test_a_mix_is_preempted_many_times_and_three_deep_and_answered_as_by_transformers(
        self, flowprefill_cluster: Cluster, replayed: Replayed, comparison: Comparison
    ) -> None:
        events = replayed.events
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
        for suspend in suspends:
            assert OPERATOR.fullmatch(suspend.after) if suspend.checkpoint else suspend.after == ""
        for (prompt_tokens, _), (tokens, logprobs) in zip(MIX, replayed.answers, strict=True):
            comparison.answer(f"{len(prompt_tokens)} tokens", prompt_tokens, tokens, logprobs)
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == TOKENS * len(MIX)

    @pytest.mark.usefixtures("flowprefill_cluster")  # conftest orders tests by the names of their clusters
    def test_a_timeline_tells_of_each_request_until_its_kv_cache_is_at_the_decode_server(
        self, replayed: Replayed
    ) -> None:
        history = History.of(replayed.events)
        assert len(history.requests) == len(MIX)
        for request in history.requests:
            assert request.ready is not None
            assert request.verdict.met is not None
            assert request.arrival.received_s <= request.ready.readable_s <= request.tasks[0].start.t_s
            assert request.parts[-1].what == "KV cache is sent"
        assert any(part.what == "suspended" for request in history.requests for part in request.parts)
        assert all(one.winner_task is not None for one in history.preemptions)

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
        self, flowprefill_cluster: Cluster, comparison: Comparison
    ) -> None:
        """As ``sglang.bench_serving --extra-request-body`` sends it."""
        start_s = time.monotonic()
        top, inside = {"custom_params": {"ttft_slo": 1.25}}, {"custom_params": {"ttft_slo": 2.5}}
        sampling = {"max_new_tokens": TOKENS, "temperature": 0}
        bodies = [top | {"sampling_params": sampling}, {"sampling_params": sampling | inside}, {}]
        url = flowprefill_cluster.url + "/generate"
        plain = {"text": " bake lomi", "sampling_params": sampling, "return_logprob": True}
        for body_ in bodies:
            answer = requests.post(url, json=plain | body_, timeout=60)
            assert answer.status_code == 200, answer.text
            comparison.generated(str(body_), " bake lomi", answer.json()["meta_info"])
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == TOKENS * len(bodies)
        both = top | {"text": " bake lomi", "sampling_params": sampling | inside}
        refusal = requests.post(flowprefill_cluster.prefill_url + "/generate", json=both, timeout=60)
        assert refusal.status_code == 400
        assert "name it once" in refusal.text
        time.sleep(0.5)
        arrivals = [event for event in events_since(flowprefill_cluster, start_s) if event.kind == "arrival"]
        assert [event.ttft_slo_s for event in arrivals] == [1.25, 2.5, 5.0]

    def test_health_is_answered_while_a_long_prompt_runs(
        self, flowprefill_cluster: Cluster, comparison: Comparison
    ) -> None:
        tokens = prompt(70, 16_000)

        async def ask() -> tuple[float, list[float]]:
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:

                async def long_prompt() -> float:
                    started_s = time.monotonic()
                    url = flowprefill_cluster.url + "/generate"
                    async with session.post(url, json=body(tokens, 60.0, 1)) as response:
                        assert response.status == 200
                        comparing.append((await response.json())["meta_info"])
                    return time.monotonic() - started_s

                long = asyncio.create_task(long_prompt())
                await asyncio.sleep(0.3)
                answered_s: list[float] = []
                while not long.done():
                    watch = Stopwatch()
                    async with session.get(flowprefill_cluster.prefill_url + "/health") as response:
                        assert response.status == 200
                    answered_s.append(watch.own_s)
                    await asyncio.sleep(0.1)
                return await long, answered_s

        comparing: list[dict[str, Any]] = []
        took_s, answered_s = asyncio.run(ask())
        print(f"16k prompt {took_s:.2f} s; /health {len(answered_s)} times, slowest {max(answered_s):.3f} s")
        assert took_s > 1.5
        assert len(answered_s) >= 5
        assert max(answered_s) < 1.0
        comparison.generated("16k prompt", tokens, comparing[0])
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == 1

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
        left_s, watch = time.monotonic(), Stopwatch()
        answer = requests.post(flowprefill_cluster.url + "/generate", json=body(prompt(81, 50), 5.0), timeout=60)
        assert answer.status_code == 200
        comparison.generated("beside", prompt(81, 50), answer.json()["meta_info"])
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == TOKENS
        time.sleep(1.5)
        while not (aborts := [e for e in events_since(flowprefill_cluster, start_s) if e.kind == "abort"]):
            assert watch.own_s < 2.0
            time.sleep(0.1)
        assert len(aborts) == 1
        assert aborts[0].t_s - left_s - watch.waited_s < 2.0
        assert isinstance(aborts[0].task, int), "it was running"
        # SGLang refuses to flush, and its idle check fails the server, while anything is still held.
        flushed = requests.post(flowprefill_cluster.prefill_url + "/flush_cache", timeout=30)
        assert flushed.status_code == 200, flushed.text
        flowprefill_cluster.check()

    @pytest.mark.usefixtures("programs")
    def test_frontend_programs_of_sglang_run_through_the_gateway(
        self, flowprefill_cluster: Cluster, comparison: Comparison
    ) -> None:
        import sglang as sgl

        @sgl.function
        def program(s: Any) -> None:
            s += " bake lomi tura"
            s += sgl.gen("first", max_tokens=TOKENS, temperature=0, return_logprob=True)
            s += " bake"
            s += sgl.gen("second", max_tokens=TOKENS, temperature=0, return_logprob=True)

        state = program.run(backend=sgl.RuntimeEndpoint(flowprefill_cluster.url))
        text = " bake lomi tura"
        for name, added in (("first", ""), ("second", " bake")):
            text += added
            comparison.text(f"text of {name}", text, state[name], None)
            comparison.generated(name, text, state.get_meta_info(name))
            text += state[name]
        comparison.assert_same()
        assert comparison.counts["tokens"] == 2 * comparison.counts["log probabilities"] == 4 * TOKENS

    def test_metrics_show_preemptions_and_what_the_ttft_model_learned(self, flowprefill_cluster: Cluster) -> None:
        text = requests.get(flowprefill_cluster.prefill_url + "/metrics", timeout=30).text
        samples = {line.split("{")[0]: line for line in text.splitlines() if line.startswith("flowprefill:")}
        assert float(samples["flowprefill:preemptions_total"].split()[-1]) >= 1
        assert float(samples["flowprefill:blocking_seconds_count"].split()[-1]) >= 1
        assert 'value="correction"' in text
        assert 'value="margin"' in text

    def test_metrics_count_the_outcomes_that_the_event_log_tells(self, flowprefill_cluster: Cluster) -> None:
        """One that cannot be met, one that is due in an hour, and both again with a prompt that is cached."""
        event_log = flowprefill_cluster.config.options.event_log
        told = len(list(read_events(event_log)))
        before = outcome_counters(flowprefill_cluster)
        for number, slo_s in enumerate((0.0001, 3600.0, 0.0001, 3600.0)):
            answer = requests.post(
                flowprefill_cluster.url + "/generate", json=body(prompt(70 + number % 2, 200), slo_s, 1), timeout=60
            )
            assert answer.ok
        watch = Stopwatch()
        counted: Counter[tuple[str, ...]] = Counter()
        while sum(counted.values()) < 4:
            assert watch.own_s < 20, counted
            time.sleep(0.2)
            counted = outcome_counters(flowprefill_cluster) - before
        time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
        outcomes, logged = Outcomes(decodes=False), Counter[tuple[str, ...]]()
        for event in list(read_events(event_log))[told:]:
            for outcome in outcomes.read(event):
                cause = () if outcome.cause is None else (CAUSES[outcome.cause],)
                logged[outcome.arrival.slo_class, *cause] += 1
        assert counted == logged == {("default",): 2, ("default", "objective"): 2}

    @needs_prometheus
    def test_every_panel_and_alert_has_an_answer_of_a_prometheus_that_scrapes_it(
        self, flowprefill_cluster: Cluster, tmp_path: Path
    ) -> None:
        with scraping(flowprefill_cluster.prefill_url, tmp_path) as prometheus:
            assert_everything_can_be_asked(prometheus, unified=False)
            assert prometheus.value(EVENT_COST.full_name + "_count") > 0
            assert prometheus.value(SUSPENDED_TASKS.series) == prometheus.value(SUSPENDED_BYTES.series) == 0

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
    def test_no_deadline_changes_no_grammar_fails_and_answers_are_those_of_transformers(
        self, flowprefill_cluster: Cluster, stepping: WallClock, comparison: Comparison
    ) -> None:
        """One long answer of each segment is compared, since transformers takes seconds for it, and all urgent ones."""
        for server in ("prefill", "decode"):
            files = {part.path for part in scheduler_of(flowprefill_cluster, server).memory_maps()}
            assert str(stepping.path) in files, f"the clock of the {server} scheduler is the machine's"
        start_s = time.monotonic()
        segments = asyncio.run(serve_while_it_is_set(flowprefill_cluster, stepping))
        ttfts_s = [[served.took_s for served in segment.urgent] for segment in segments]
        in_time = [sum(ttft_s <= URGENT_SLO_S for ttft_s in segment) for segment in ttfts_s]
        for offset_s, count, ttft_s in zip(OFFSETS_S, in_time, ttfts_s, strict=True):
            print(f"wall clock {offset_s:+g} s: {count} of {URGENT} in time, slowest {max(ttft_s):.2f} s")
        time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
        arrivals = [event for event in events_since(flowprefill_cluster, start_s) if event.kind == "arrival"]
        assert len(arrivals) == len(OFFSETS_S) * (LONG + URGENT + 1)
        assert all(0.0 <= event.t_s - event.received_s < 5.0 for event in arrivals)
        assert all(count >= in_time[0] - 2 for count in in_time)
        assert in_time[0] >= URGENT * 0.8
        for offset_s, segment in zip(OFFSETS_S, segments, strict=True):
            for served in [*segment.urgent, segment.long[0]]:
                comparison.answer(f"wall clock {offset_s:+g} s", served.prompt, served.tokens, served.logprobs)
        comparison.assert_same()
        assert comparison.counts["log probabilities"] == len(OFFSETS_S) * (URGENT + TOKENS)

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


@pytest.mark.stress
class TestAgainstSGLangsOwnScheduler:
    def test_the_same_tokens_and_log_probabilities(self, replayed: Replayed, stock_cluster: Cluster) -> None:
        stock = asyncio.run(replay_mix(stock_cluster))
        for (tokens, logprobs), (expected, expected_logprobs) in zip(replayed.answers, stock, strict=True):
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
