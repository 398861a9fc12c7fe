"""One server that prefills and decodes: its streams beside a long prompt, its answers, the clients that it serves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import requests

from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi, Outcome
from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.frontend import Endpoint
from tests.prompts import prompt

pytestmark = pytest.mark.server

EXAMPLE = Path(__file__).parents[2] / "examples" / "frontend.py"
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


def test_streams_get_their_tokens_while_a_long_prompt_is_prefilled(unified_server: Cluster) -> None:
    beside = asyncio.run(beside_a_long_prompt(unified_server.url, seed=3000))
    assert beside.longest_gap_s < TBT_SLO_S + LATE_S


def test_sglangs_own_scheduler_lets_streams_wait_for_a_long_prompt(stock_unified_server: Cluster) -> None:
    beside = asyncio.run(beside_a_long_prompt(stock_unified_server.url, seed=4000))
    assert beside.longest_gap_s > TBT_SLO_S + LATE_S, "if they did not wait, the test before this one shows nothing"


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
        tokens = prompt(700 + number, (4000, 100, 2500, 60, 900, 300)[number % 6])
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        async with session.post(cluster.url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            logprobs = (await response.json())["meta_info"]["output_token_logprobs"]
        return [entry[1] for entry in logprobs], [entry[0] for entry in logprobs]

    async def all_of_them() -> list[Any]:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            return list(await asyncio.gather(*(one(session, number) for number in range(12))))

    return asyncio.run(all_of_them())


STOCK_ANSWERS: list[Any] = []


def test_sglangs_own_scheduler_answers(stock_unified_server: Cluster) -> None:
    STOCK_ANSWERS.extend(answers_under_load(stock_unified_server))
    assert all(len(tokens) == 24 for tokens, _ in STOCK_ANSWERS)


def test_answers_under_load_are_those_of_sglangs_own_scheduler(unified_server: Cluster) -> None:
    assert STOCK_ANSWERS, "the test before this one has them"
    for number, (answer, expected) in enumerate(zip(answers_under_load(unified_server), STOCK_ANSWERS, strict=True)):
        assert answer[0] == expected[0], number
        assert answer[1] == pytest.approx(expected[1], abs=1e-3), number


def test_a_wrong_objective_is_refused_with_a_sentence(unified_server: Cluster) -> None:
    for name in ("ttft_slo", "tbt_slo"):
        sampling = {"max_new_tokens": 2, "custom_params": {name: -1}}
        response = requests.post(
            unified_server.url + "/generate", json={"text": "a", "sampling_params": sampling}, timeout=60
        )
        assert response.status_code == 400
        assert name in response.text


@pytest.mark.parametrize("server", ["unified_server", pytest.param("stock_unified_server", marks=pytest.mark.stress)])
def test_a_frontend_program_with_gen_fork_and_select_runs_straight_at_the_server(
    server: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(server).url
    run = subprocess.run([sys.executable, str(EXAMPLE), url], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 3
    import sglang as sgl

    @sgl.function
    def program(s: Any) -> None:
        s += "bake lomi tupe"
        branches = s.fork(2)
        for number, branch in enumerate(branches):
            branch += f" {number}" + sgl.gen("branch", max_tokens=3, temperature=0)
        s += branches[0]["branch"] + branches[1]["branch"] + sgl.select("choice", choices=[" lomi", " tupe"])

    for backend in (sgl.RuntimeEndpoint(url), Endpoint(url, ttft_slo=3.25, tbt_slo=0.75)):
        state = program.run(backend=backend)
        assert state["choice"] in (" lomi", " tupe")


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
