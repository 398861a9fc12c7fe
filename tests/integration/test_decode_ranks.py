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

pytestmark = pytest.mark.server

MODEL = EmbeddedModel(heads=2, kv_heads=2, layers=2, context_tokens=4608)
PROMPT_TOKENS, OUTPUT_TOKENS = 12, 6
LIST_LENGTH = 20
PLACES = 4
SLOS_S = (0.2, 1.0, 5.0, 30.0)

Answers = list[tuple[str, list[float]]]
"""Text of each request's answer, and the log probability of each of its tokens."""


def prompts(count: int) -> list[list[int]]:
    return [prompt(1000 + i, PROMPT_TOKENS) for i in range(count)]


def alone(count: int) -> Answers:
    """What transformers answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = embedded_model_path(MODEL)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    answers: Answers = []
    for batch in torch.tensor(prompts(count)).split(100):
        output = model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=OUTPUT_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[:, PROMPT_TOKENS:]
        logprobs = torch.stack([torch.log_softmax(step.double(), -1) for step in output.logits], dim=1)
        chosen = logprobs.gather(2, new[:, :, None])[:, :, 0]
        answers += zip(tokenizer.batch_decode(new), chosen.tolist(), strict=True)
    return answers


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
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "logprobs": 1,
            "custom_params": {"ttft_slo": rng.choice(SLOS_S)},
            "bootstrap_host": ["127.0.0.1"] * len(some),
            "bootstrap_port": [port] * len(some),
            "bootstrap_room": [rng.randrange(1 << 62) for _ in some],
        }
        _, answer = await asyncio.gather(
            post(session, cluster.prefill_url, body), post(session, cluster.decode_url, body)
        )
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [(choice["text"], choice["logprobs"]["token_logprobs"]) for choice in choices]

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


def assert_same(answers: Answers, expected: Answers) -> None:
    assert len(answers) == len(expected)
    wrong = [i for i, (answer, wanted) in enumerate(zip(answers, expected, strict=True)) if answer[0] != wanted[0]]
    assert not wrong, f"{len(wrong)} of {len(answers)} answers are others', the first {answers[wrong[0]]}"
    for answer, wanted in zip(answers, expected, strict=True):
        assert answer[1] == pytest.approx(wanted[1], abs=5e-3)
    print(
        f"{len(answers)} answers of {OUTPUT_TOKENS} tokens compared with {len({text for text, _ in expected})} others"
    )


def test_two_ranks_answer_as_one_model_when_places_are_scarce(no_cluster: None, tmp_path: Path) -> None:
    assert_same(answers_of(2, 100, tmp_path), alone(100))


@pytest.mark.stress
def test_a_thousand_requests_get_the_tokens_of_one_rank(no_cluster: None, tmp_path: Path) -> None:
    two, one = (answers_of(tp, 1000, tmp_path / str(tp)) for tp in (2, 1))
    expected = alone(1000)
    assert_same(two, expected)
    assert_same(one, expected)
