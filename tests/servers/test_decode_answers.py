"""KV that arrives at a real decode server: what it decodes from it is compared with transformers.

Requests are sent in bursts to a real pair of servers, which suspends prefills, batches them and finds prefixes in its
cache. A single wrong row of KV in one layer changes the log probabilities of the eight tokens by more than is accepted
(``tests/unit/test_reference.py``).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import aiohttp
import pytest

from sgl_flowprefill.cluster import Cluster
from sgl_flowprefill.events import read_events
from tests.prompts import population
from tests.reference import TOKENS, Comparison

Answers = list[dict[str, Any]]


async def ask(url: str, prompts: list[list[int]], seed: int) -> Answers:
    """Send all ``prompts`` in bursts of up to 16, an urgent one now and then; their answers."""
    rng = random.Random(seed)

    async def one(session: aiohttp.ClientSession, at_s: float, tokens: list[int]) -> Any:
        await asyncio.sleep(at_s)
        slo_s = rng.choice([0.2, 1.0, 4.0, 30.0])
        sampling = {"max_new_tokens": TOKENS, "temperature": 0, "custom_params": {"ttft_slo": slo_s}}
        body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True}
        async with session.post(url + "/generate", json=body) as response:
            assert response.status == 200, await response.text()
            return await response.json()

    at_s, left_of_burst, jobs = 0.0, 0, []
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        for tokens in prompts:
            if not left_of_burst:
                left_of_burst = rng.randrange(1, 17)
                at_s += 0.08 * left_of_burst
            left_of_burst -= 1
            jobs.append(one(session, at_s + rng.random() * 0.1, tokens))
        return list(await asyncio.gather(*jobs))


def compare(cluster: Cluster, comparison: Comparison, count: int, seed: int) -> Counter[str]:
    """Ask for ``count`` prompts and compare the answers; figures of what happened meanwhile."""
    prompts = population(count, seed)
    start_s = time.monotonic()
    answers = asyncio.run(ask(cluster.url, prompts, seed))
    time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
    log = cluster.config.options.event_log
    assert log is not None
    events = [event for event in read_events(log) if event.t_s >= start_s]
    seen = Counter({"requests": len(answers)})
    seen["suspensions"] = sum(event.kind == "suspend" for event in events)
    seen["batches of several"] = sum(event.kind == "start" and len(event.rids) > 1 for event in events)
    seen["requests with a cached prefix"] = sum(answer["meta_info"]["cached_tokens"] > 0 for answer in answers)
    for i, (tokens, answer) in enumerate(zip(prompts, answers, strict=True)):
        logprobs, ids = zip(*(entry[:2] for entry in answer["meta_info"]["output_token_logprobs"]), strict=True)
        assert len(ids) == TOKENS
        comparison.answer(f"request {i}", tokens, ids, logprobs)
    print(f"\n{', '.join(f'{value:,} {what}' for what, value in seen.items())} in {time.monotonic() - start_s:.0f} s")
    comparison.assert_same()
    return seen


def test_a_decode_server_answers_from_what_arrives_as_transformers_does(
    flowprefill_cluster: Cluster, comparison: Comparison
) -> None:
    seen: Counter[str] = Counter()
    for seed in range(1, 6):
        seen += compare(flowprefill_cluster, comparison, count=36, seed=seed)
        if seen["suspensions"]:  # a fast machine is seldom interrupted
            break
    assert comparison.counts["answers"] == seen["requests"]
    assert seen["suspensions"] >= 1
    assert seen["batches of several"] >= 2
    assert seen["requests with a cached prefix"] >= 6


@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_a_decode_server_answers_six_hundred_requests_as_transformers_does(
    flowprefill_cluster: Cluster, comparison: Comparison
) -> None:
    seen = compare(flowprefill_cluster, comparison, count=600, seed=2)
    assert comparison.counts["answers"] == seen["requests"]
    assert seen["suspensions"] >= 50
    assert seen["batches of several"] >= 50
    assert seen["requests with a cached prefix"] >= 200
