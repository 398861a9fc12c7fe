"""A tensor-parallel decode server with hardly any places: its ranks give them out in the same order.

Requests come as OpenAI lists of prompts, all of which the HTTP server receives at the same instant and for the same
objective, to both servers as a gateway would send them. Their tokens and log probabilities are those of transformers.
"""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import requests

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.prompts import prompt
from tests.reference import TOKENS, Comparison, Reference

pytestmark = [pytest.mark.stress, pytest.mark.timeout(1800)]

MODEL = EmbeddedModel(heads=2, kv_heads=2, layers=2, context_tokens=4608)
PROMPT_TOKENS = 12
LIST_LENGTH = 20
PLACES = 4
SLOS_S = (0.2, 1.0, 5.0, 30.0)

Answers = list[tuple[list[int], list[float]]]
"""Tokens of each request's answer, and the log probability of each."""


def prompts(count: int) -> list[list[int]]:
    return [prompt(1000 + i, PROMPT_TOKENS) for i in range(count)]


async def ask(cluster: Cluster, count: int) -> Answers:
    """The decode server's answers to all prompts, which are there at once."""
    rng = random.Random(count)
    info = requests.get(cluster.prefill_url + "/server_info", timeout=30).json()
    port = info["disaggregation_bootstrap_port"]

    async def post(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Any:
        async with session.post(url + "/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    async def one_list(session: aiohttp.ClientSession, some: list[list[int]]) -> Answers:
        body = {
            "model": "embedded",
            "prompt": some,
            "max_tokens": TOKENS,
            "temperature": 0,
            "logprobs": 1,
            "return_token_ids": True,
            "custom_params": {"ttft_slo": rng.choice(SLOS_S)},
            "bootstrap_host": ["127.0.0.1"] * len(some),
            "bootstrap_port": [port] * len(some),
            "bootstrap_room": [rng.randrange(1 << 62) for _ in some],
        }
        _, answer = await asyncio.gather(
            post(session, cluster.prefill_url, body), post(session, cluster.decode_url, body)
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]

    waiting = prompts(count)
    lists = [waiting[i : i + LIST_LENGTH] for i in range(0, count, LIST_LENGTH)]
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120 + count / 2)) as session:
        answers = await asyncio.gather(*(one_list(session, some) for some in lists))
    return [answer for some in answers for answer in some]


def answers_of(tp: int, count: int, log_dir: Path) -> Answers:
    config = ClusterConfig(
        flowprefill=True,
        model_path=str(embedded_model_path(MODEL)),
        decode_args=("--tp", str(tp), "--max-running-requests", str(PLACES)),
        log_dir=log_dir,
    )
    with Cluster(config, on_progress=print) as cluster:
        started_s = time.monotonic()
        answers = asyncio.run(ask(cluster, count))
        print(f"{count} requests on {tp} ranks in {time.monotonic() - started_s:.1f} s")
        cluster.check()
    return answers


@pytest.fixture(scope="module")
def two_layers() -> Reference:
    """MODEL in transformers; what it has computed for one test, the other has."""
    return Reference(embedded_model_path(MODEL))


@pytest.fixture
def comparison(two_layers: Reference) -> Comparison:
    return Comparison(two_layers)


def assert_same(comparison: Comparison, answers: Answers, count: int) -> None:
    before = comparison.counts["log probabilities"]
    for i, (tokens, (ids, logprobs)) in enumerate(zip(prompts(count), answers, strict=True)):
        assert len(ids) == TOKENS
        comparison.answer(f"request {i}", tokens, ids, logprobs)
    print(comparison)
    comparison.assert_same()
    assert comparison.counts["log probabilities"] - before == TOKENS * count, "not even the token of a runner-up"


def test_two_ranks_answer_as_one_model_when_places_are_scarce(
    no_cluster: None, comparison: Comparison, tmp_path: Path
) -> None:
    assert_same(comparison, answers_of(2, 100, tmp_path), 100)


def test_a_thousand_requests_get_the_tokens_of_one_rank(
    no_cluster: None, comparison: Comparison, tmp_path: Path
) -> None:
    two, one = (answers_of(tp, 1000, tmp_path / str(tp)) for tp in (2, 1))
    assert_same(comparison, two, 1000)
    assert_same(comparison, one, 1000)
