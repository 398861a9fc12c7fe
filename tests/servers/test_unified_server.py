"""One server that prefills and decodes: its streams beside a long prompt, its answers, the clients that it serves."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import psutil
import pytest
import requests

from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi, Outcome
from sgl_flowprefill.bench.metrics.requests import retractions
from sgl_flowprefill.bench.systems.catalog import SYSTEMS
from sgl_flowprefill.bench.systems.serving import Served
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import Arrival, read_events
from sgl_flowprefill.frontend import SLORuntimeEndpoint
from sgl_flowprefill.metrics.table import TBT_MET, TBT_MISSED
from tests.prometheus import assert_everything_can_be_asked, needs_prometheus, scraping
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison
from tests.servers.conftest import OneCluster
from tests.waiting import until

STREAMS = 4
STREAM_TOKENS = 100
LONG_TOKENS = 12_000
TBT_SLO_S = 0.4
LATE_S = 0.4
"""How much later than its objective a gap may end on a machine that runs other tests as well."""
SEEN_FIRST = 5
"""Tokens of each stream before the long prompt is sent."""


class Beside(NamedTuple):
    """What became of streams beside a long prompt."""

    longest_gap_s: float
    prompt_ttft_s: float


async def beside_a_long_prompt(url: str, seed: int) -> Beside:
    """Four streams, and a long prompt that arrives while they get their tokens."""
    client = Client(url, GenerateApi())
    streams = [Outcome(sent_s=0.0) for _ in range(STREAMS)]
    async with client.session() as session:
        bodies = [
            client.api.body(prompt(seed + number, 200), STREAM_TOKENS, 5.0, TBT_SLO_S) for number in range(STREAMS)
        ]
        jobs = [
            asyncio.create_task(client.stream(session, body, stream))
            for body, stream in zip(bodies, streams, strict=True)
        ]
        while min(stream.tokens for stream in streams) < SEEN_FIRST:
            await asyncio.sleep(0.005)
            assert not any(job.done() for job in jobs)
        long = await client.stream(session, client.api.body(prompt(seed + 50, LONG_TOKENS), 2, 60.0, TBT_SLO_S))
        await asyncio.gather(*jobs)
    assert [one.error for one in (*streams, long) if one.error] == []
    assert long.first_token_s is not None
    found = Beside(max(gap_s for one in streams for gap_s in one.tbt_s), long.first_token_s - long.sent_s)
    print(f"longest gap {found.longest_gap_s:.3f} s beside a prompt that took {found.prompt_ttft_s:.2f} s")
    assert found.prompt_ttft_s > 2 * (TBT_SLO_S + LATE_S), "the prompt is too short to show anything"
    return found


@pytest.mark.stress  # tests/servers/test_unified_serving.py has another that compares their tokens as well
def test_streams_get_their_tokens_while_a_long_prompt_is_prefilled(unified_server: Cluster) -> None:
    beside = asyncio.run(beside_a_long_prompt(unified_server.url, seed=3000))
    assert beside.longest_gap_s < TBT_SLO_S + LATE_S


@needs_prometheus
def test_every_panel_and_alert_has_an_answer_of_a_prometheus_that_scrapes_it(
    unified_server: Cluster, tmp_path: Path
) -> None:
    answer = {"text": "a stream", "sampling_params": {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}}
    assert requests.post(unified_server.url + "/generate", json=answer, timeout=60).ok
    with scraping(unified_server.url, tmp_path) as prometheus:
        assert_everything_can_be_asked(prometheus, unified=True)
        assert prometheus.value(f"{TBT_MET.series} + {TBT_MISSED.series}") >= 7


@pytest.mark.stress
def test_sglangs_own_scheduler_lets_streams_wait_for_a_long_prompt(stock_unified_server: Cluster) -> None:
    beside = asyncio.run(beside_a_long_prompt(stock_unified_server.url, seed=4000))
    assert beside.longest_gap_s > TBT_SLO_S + LATE_S, "if they did not wait, the test before this one shows nothing"


UNDER_LOAD = [prompt(700 + number, (4000, 100, 2500, 60, 900, 300)[number % 6]) for number in range(12)]


def answers_under_load(cluster: Cluster) -> list[Any]:
    """Output ids and log probabilities of prompts that arrive while others stream."""

    async def one(session: aiohttp.ClientSession, number: int) -> Any:
        await asyncio.sleep(0.05 * number)
        sampling = {
            "max_new_tokens": 24,
            "temperature": 0,
            "ignore_eos": True,
            "custom_params": {"ttft_slo": 30.0 - number, "tbt_slo": TBT_SLO_S},
        }
        body = {"input_ids": UNDER_LOAD[number], "sampling_params": sampling, "return_logprob": True}
        async with session.post(cluster.url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            logprobs = (await response.json())["meta_info"]["output_token_logprobs"]
        return [entry[1] for entry in logprobs], [entry[0] for entry in logprobs]

    async def all_of_them() -> list[Any]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            return list(await asyncio.gather(*(one(session, number) for number in range(len(UNDER_LOAD)))))

    return asyncio.run(all_of_them())


@pytest.fixture(scope="session")
def stock_answers(one_cluster: OneCluster) -> list[Any]:
    """Answers of SGLang's own scheduler, computed once: for the first test that asks for them, whichever that is."""
    return answers_under_load(one_cluster.get(flowprefill=False, unified=True))


@pytest.mark.stress
def test_sglangs_own_scheduler_answers(stock_unified_server: Cluster, stock_answers: list[Any]) -> None:
    assert all(len(tokens) == 24 for tokens, _ in stock_answers)


@pytest.fixture(scope="session")
def our_answers(one_cluster: OneCluster) -> list[Any]:
    """As ``stock_answers``, of the server with FlowPrefill."""
    return answers_under_load(one_cluster.get(flowprefill=True, unified=True))


@pytest.mark.usefixtures("unified_server")  # conftest orders tests by the names of their clusters
def test_answers_under_load_are_those_of_transformers(our_answers: list[Any], comparison: Comparison) -> None:
    for number, (tokens, logprobs) in enumerate(our_answers):
        assert len(tokens) == 24
        comparison.answer(f"request {number}", UNDER_LOAD[number], tokens, logprobs)
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == TOKENS * len(UNDER_LOAD)


@pytest.mark.stress
@pytest.mark.usefixtures("unified_server")
def test_answers_under_load_are_those_of_sglangs_own_scheduler(
    stock_answers: list[Any], our_answers: list[Any]
) -> None:
    for number, (answer, expected) in enumerate(zip(our_answers, stock_answers, strict=True)):
        assert answer[0] == expected[0], number
        assert answer[1] == pytest.approx(expected[1], abs=1e-3), number


CHOICES = 3
ASKED_FOR_CHOICES = [prompt(760 + number, tokens) for number, tokens in enumerate((900, 60))]
ASKED_TO_STOP = [prompt(770 + number, tokens) for number, tokens in enumerate((1200, 300, 80))]
BESIDE = prompt(780, 3000)


class Choice(NamedTuple):
    """One of the answers to a prompt."""

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: dict[str, Any]


def choices_under_load(cluster: Cluster) -> list[Choice]:
    """Several answers to a prompt, and answers that stop at characters which the server says itself; all of them at
    once, beside a long prompt.
    """

    def choice(answer: dict[str, Any]) -> Choice:
        about = answer["meta_info"]
        logprobs = about["output_token_logprobs"]
        return Choice(
            answer["text"], [entry[1] for entry in logprobs], [entry[0] for entry in logprobs], about["finish_reason"]
        )

    async def ask(session: aiohttp.ClientSession, tokens: list[int], **sampling: Any) -> list[Choice]:
        sampling |= {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        async with session.post(cluster.url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            answers = await response.json()
        return [choice(answer) for answer in (answers if isinstance(answers, list) else [answers])]

    async def all_of_them() -> list[Choice]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            plain = await asyncio.gather(*(ask(session, tokens) for tokens in ASKED_TO_STOP))
            stops = [one.text[len(one.text) // 2 :][:5] for [one] in plain]
            asked = await asyncio.gather(
                ask(session, BESIDE),
                *(ask(session, tokens, n=CHOICES) for tokens in ASKED_FOR_CHOICES),
                *(ask(session, tokens, stop=[stop]) for tokens, stop in zip(ASKED_TO_STOP, stops, strict=True)),
            )
        return [one for choices in (*plain, *asked) for one in choices]

    return asyncio.run(all_of_them())


@pytest.fixture(scope="session")
def stock_choices(one_cluster: OneCluster) -> list[Choice]:
    """As ``stock_answers``."""
    return choices_under_load(one_cluster.get(flowprefill=False, unified=True))


@pytest.fixture(scope="session")
def our_choices(one_cluster: OneCluster) -> list[Choice]:
    """As ``stock_choices``, of the server with FlowPrefill."""
    return choices_under_load(one_cluster.get(flowprefill=True, unified=True))


def assert_ends(choices: list[Choice]) -> None:
    """Those that are to stop at a string do, and the others have their length."""
    stopped = len(ASKED_TO_STOP)
    reasons = [one.finish_reason["type"] for one in choices]
    assert reasons == ["length"] * (stopped + 1 + CHOICES * len(ASKED_FOR_CHOICES)) + ["stop"] * stopped


@pytest.mark.usefixtures("unified_server")
def test_several_answers_and_stop_strings_are_those_of_transformers(
    our_choices: list[Choice], comparison: Comparison
) -> None:
    """Of an answer that stops, also all of its tokens and its text are those of the answer that does not."""
    assert_ends(our_choices)
    asked = [*ASKED_TO_STOP, BESIDE, *(tokens for tokens in ASKED_FOR_CHOICES for _ in range(CHOICES))]
    for tokens, one in zip(asked, our_choices, strict=False):
        assert len(one.tokens) == 24
        comparison.answer(f"{len(tokens)} tokens", tokens, one.tokens, one.logprobs)
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == TOKENS * len(asked)
    stopped = our_choices[len(asked) :]
    for plain, one in zip(our_choices[: len(stopped)], stopped, strict=True):
        stop = one.finish_reason["matched"]
        assert stop == plain.text[len(plain.text) // 2 :][:5]
        assert one.text == plain.text[: plain.text.index(stop)]
        assert one.tokens == plain.tokens[: len(one.tokens)]
        assert one.logprobs == pytest.approx(plain.logprobs[: len(one.tokens)], abs=1e-3)


@pytest.mark.stress
def test_sglangs_own_scheduler_has_several_answers_and_stops_at_strings(
    stock_unified_server: Cluster, stock_choices: list[Choice]
) -> None:
    assert_ends(stock_choices)


@pytest.mark.stress
@pytest.mark.usefixtures("unified_server")
def test_several_answers_and_stop_strings_are_those_of_sglangs_own_scheduler(
    stock_choices: list[Choice], our_choices: list[Choice]
) -> None:
    for number, (one, expected) in enumerate(zip(our_choices, stock_choices, strict=True)):
        assert one.tokens == expected.tokens, number
        assert one._replace(logprobs=[]) == expected._replace(logprobs=[]), number
        assert one.logprobs == pytest.approx(expected.logprobs, abs=1e-3), number


@pytest.mark.usefixtures("quick_replays")
@pytest.mark.parametrize("server", ["unified_server", pytest.param("stock_unified_server", marks=pytest.mark.stress)])
def test_a_benchmark_times_its_steps_hears_of_retractions_and_can_slow_it_down(
    server: str, request: pytest.FixtureRequest
) -> None:
    cluster: Cluster = request.getfixturevalue(server)
    system = SYSTEMS["unified" if cluster.config.flowprefill else "unified-sglang"]
    served = Served(system, cluster, Client(cluster.url, GenerateApi()), None)
    steps = served.decode_steps(PromptBuilder(41))
    print([f"{step.requests} x {step.context_tokens // step.requests}: {1e3 * step.time_s:.1f} ms" for step in steps])
    assert {step.requests for step in steps} == {1, 4, 16}
    trace = Trace("t", [TraceRequest(0.3 * number, 200, 20, "all", 60.0, 5.0) for number in range(8)])
    for slower in (0.0, 1.0):
        run = served.replay(trace, PromptBuilder(42), slower=slower)
        assert [result.error for result in run.results if result.error] == []
        assert {result.output_tokens for result in run.results} == {20}
        assert retractions(run.results) == 0, "each answer says so"
        served.come_to_rest()
    assert not any(psutil.Process(pid).status() == psutil.STATUS_STOPPED for pid in cluster.processes.values())


def test_a_wrong_objective_is_refused_with_a_sentence(unified_server: Cluster) -> None:
    for name in ("ttft_slo", "tbt_slo"):
        sampling = {"max_new_tokens": 2, "custom_params": {name: -1}}
        response = requests.post(
            unified_server.url + "/generate", json={"text": "a", "sampling_params": sampling}, timeout=60
        )
        assert response.status_code == 400
        assert name in response.text


MESSAGES = [{"role": "user", "content": "bake lomi"}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/generate": {"text": " bake lomi", "sampling_params": {"max_new_tokens": 1}},
    "/v1/completions": {"prompt": " bake lomi", "max_tokens": 1},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1},
    "/v1/responses": {"input": "bake lomi", "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 1},
    "/api/chat": {"messages": MESSAGES, "options": {"num_predict": 1}, "stream": False},
    "/api/generate": {"prompt": " bake lomi", "options": {"num_predict": 1}, "stream": False},
}
ASKS: list[tuple[dict[str, Any], dict[str, str], tuple[float, str, str]]] = [
    ({}, {}, (5.0, "default", "default")),
    ({"custom_params": {"ttft_slo": 1.5}}, {"x-slo-ttft-ms": "900"}, (1.5, "default", "body")),
    ({"custom_params": {"slo_class": "interactive"}}, {}, (0.75, "interactive", "body")),
    (
        {"custom_params": {"slo_class": "interactive", "ttft_slo": 0.1}},
        {},
        (0.2, "interactive", "body, raised to min_ttft_s"),
    ),
    ({}, {"x-llm-d-slo-ttft-ms": "1250"}, (1.25, "default", "header x-llm-d-slo-ttft-ms")),
    ({}, {"x-slo-ttft-ms": "900"}, (0.9, "default", "header x-slo-ttft-ms")),
    ({}, {"x-flowprefill-slo-class": "interactive"}, (0.75, "interactive", "header x-flowprefill-slo-class")),
    ({"priority": 5}, {"X-SMG-Priority": "interactive"}, (0.75, "interactive", "header X-SMG-Priority")),
    ({"priority": 11}, {}, (0.75, "interactive", "priority")),
    ({"service_tier": "priority"}, {}, (0.75, "interactive", "service_tier")),
]


def seen_by_the_scheduler(cluster: Cluster, since_s: float, count: int) -> list[Arrival]:
    """The ``count`` requests that have arrived since then."""
    log = cluster.config.options.event_log
    assert log is not None
    for _ in range(600):
        arrivals = [one for one in read_events(log) if isinstance(one, Arrival) and one.t_s >= since_s]
        if len(arrivals) >= count:
            return arrivals
        time.sleep(0.05)
    raise AssertionError(f"{len(arrivals)} requests of {count} have arrived")


def model_of(cluster: Cluster) -> str:
    return str(requests.get(cluster.url + "/v1/models", timeout=60).json()["data"][0]["id"])


@pytest.mark.parametrize("path", ENDPOINTS)
def test_each_way_of_asking_gives_the_objective_that_the_scheduler_sees(unified_server: Cluster, path: str) -> None:
    start_s, body = time.monotonic(), {"model": model_of(unified_server)} | ENDPOINTS[path]
    for asked, headers, _ in ASKS:
        answer = requests.post(unified_server.url + path, json=body | asked, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
    arrivals = seen_by_the_scheduler(unified_server, start_s, len(ASKS))
    assert [(one.ttft_slo_s, one.slo_class, one.slo_source) for one in arrivals] == [seen for _, _, seen in ASKS]


@pytest.mark.parametrize("claimed_s", [1_790_000_000.0, -1.0])
@pytest.mark.parametrize("path", ["/generate", "/vertex_generate"])
def test_deadlines_of_all_samples_count_from_when_the_server_received_their_request(
    unified_server: Cluster, path: str, claimed_s: float
) -> None:
    sampling = {"n": 2, "max_new_tokens": 1, "custom_params": {"ttft_slo": 2.0}}
    parameters = {"sampling_params": sampling, "received_time": claimed_s}
    body: dict[str, Any] = {
        "/generate": {"text": " bake lomi", **parameters},
        "/vertex_generate": {"instances": [{"text": " bake lomi"}], "parameters": parameters},
    }[path]
    start_s = time.monotonic()
    requests.post(unified_server.url + path, json=body, timeout=60).raise_for_status()
    end_s = time.monotonic()
    arrivals = seen_by_the_scheduler(unified_server, start_s, 3)  # the prompt, and after that two samples
    assert len({one.received_s for one in arrivals}) == 1
    assert start_s <= arrivals[0].received_s <= end_s
    assert {round(one.deadline_s - one.received_s, 6) for one in arrivals} == {2.0}


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_wrong_objective_is_a_400_of_each_api_and_never_scheduled(
    unified_server: Cluster, path: str, is_stream: bool
) -> None:
    start_s, body = time.monotonic(), {"model": model_of(unified_server)} | ENDPOINTS[path] | {"stream": is_stream}
    wrong: list[tuple[dict[str, Any], dict[str, str], str]] = [
        ({"custom_params": {"ttft_slo": -1}}, {}, "positive, finite number of seconds"),
        ({"custom_params": {"slo_class": "urgent"}}, {}, "there are interactive, batch, default"),
        ({"custom_params": {"sheddable": "yes"}}, {}, "true or false"),
        ({}, {"x-slo-ttft-ms": "soon"}, "positive, finite number of milliseconds"),
        ({}, {"x-flowprefill-slo-class": "urgent"}, "there are interactive, batch, default"),
    ]
    for asked, headers, sentence in wrong:
        answer = requests.post(unified_server.url + path, json=body | asked, headers=headers, timeout=60)
        assert answer.status_code == 400, (asked, headers, answer.text)
        assert sentence in answer.text
        if path == "/v1/messages":
            assert answer.json()["error"]["type"] == "invalid_request_error"
    requests.post(unified_server.url + path, json=body, timeout=60).raise_for_status()
    assert len(seen_by_the_scheduler(unified_server, start_s, 1)) == 1


def test_a_policy_file_counts_when_it_changes_and_not_while_it_has_a_mistake(unified_server: Cluster) -> None:
    path = unified_server.config.options.slo_policy
    assert path is not None
    policy, before = Path(path), Path(path).read_text()
    body = ENDPOINTS["/generate"] | {"custom_params": {"slo_class": "interactive"}}

    def promised_s() -> float:
        start_s = time.monotonic()
        requests.post(unified_server.url + "/generate", json=body, timeout=60).raise_for_status()
        return seen_by_the_scheduler(unified_server, start_s, 1)[0].ttft_slo_s

    def comes_to(ttft_s: float) -> bool:
        for _ in range(300):
            if promised_s() == ttft_s:
                return True
            time.sleep(0.2)
        return False

    try:
        policy.write_text(before.replace("ttft_s: 0.75", "ttft_s: 0.875"))
        assert comes_to(0.875)
        policy.write_text(before.replace("ttft_s: 0.75", "ttft_s: none"))
        mistake, logs = f"{policy}:3: classes.interactive.ttft_s", list(unified_server.config.log_dir.glob("*.log"))
        for _ in range(300):
            if any(mistake in log.read_text() for log in logs):
                break
            time.sleep(0.2)
        else:
            raise AssertionError(f"no log says {mistake}")
        assert promised_s() == 0.875
    finally:
        so_far = readings(unified_server)
        policy.write_text(before)
    assert comes_to(0.75)
    until(lambda: readings(unified_server) > so_far, 60, say=lambda: "the log does not say that the file was read")


def readings(server: Cluster) -> int:
    """How often the log says that the policy file was read again, which it does when requests go by it already."""
    return (server.config.log_dir / "unified.log").read_text().count("The SLO policy is that of ")


def test_a_server_reads_its_policy_file_at_sighup_and_serves_on(unified_server: Cluster) -> None:
    """The file has not changed, so nothing else has it read."""
    before = readings(unified_server)
    os.kill(unified_server.processes["unified"], signal.SIGHUP)
    until(lambda: readings(unified_server) > before, 60, say=lambda: "the file was not read again")
    requests.post(unified_server.url + "/generate", json=ENDPOINTS["/generate"], timeout=60).raise_for_status()


@pytest.mark.parametrize("server", ["unified_server", pytest.param("stock_unified_server", marks=pytest.mark.stress)])
@pytest.mark.usefixtures("programs")
def test_a_frontend_program_with_gen_fork_and_select_runs_straight_at_the_server(
    server: str, request: pytest.FixtureRequest, comparison: Comparison
) -> None:
    url = request.getfixturevalue(server).url
    import sglang as sgl

    @sgl.function
    def program(s: Any) -> list[dict[str, Any]]:
        """What the server says of the answers of the branches."""
        s += "bake lomi tupe"
        branches = s.fork(2)
        for number, branch in enumerate(branches):
            branch += f" {number}" + sgl.gen("branch", max_tokens=TOKENS, temperature=0, return_logprob=True)
        s += branches[0]["branch"] + branches[1]["branch"] + sgl.select("choice", choices=[" lomi", " tupe"])
        return [branch.get_meta_info("branch") for branch in branches]

    for backend in (sgl.RuntimeEndpoint(url), SLORuntimeEndpoint(url, ttft_slo=3.25, tbt_slo=0.75)):
        state = program.run(backend=backend)
        assert state["choice"] in (" lomi", " tupe")
        for number, meta_info in enumerate(state.ret_value):
            comparison.generated(f"branch {number}", f"bake lomi tupe {number}", meta_info)
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == 4 * TOKENS


@pytest.mark.stress
@pytest.mark.parametrize(
    "dataset",
    [
        ["--dataset-name", "random-ids", "--random-input-len", "600", "--random-output-len", "20",
         "--random-range-ratio", "0.2"],
        ["--dataset-name", "generated-shared-prefix", "--gsp-num-groups", "3", "--gsp-prompts-per-group", "4",
         "--gsp-system-prompt-len", "300", "--gsp-question-len", "40", "--gsp-output-len", "16"],
    ],
    ids=["random-ids", "generated-shared-prefix"],
)  # fmt: skip
def test_sglangs_own_benchmark_runs_against_it(unified_server: Cluster, dataset: list[str], tmp_path: Path) -> None:
    out = tmp_path / "bench.jsonl"
    command = [
        *(sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai-chat"),
        *("--base-url", unified_server.url, "--model", "embedded", "--tokenizer", unified_server.model_path),
        *("--num-prompts", "12", "--request-rate", "4", "--output-file", str(out), *dataset),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=540, check=False)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    figures = json.loads(out.read_text().splitlines()[-1])
    assert figures["completed"] == 12
