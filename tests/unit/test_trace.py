"""Traces: the generator has QwenTrace's shape, scaling keeps what SLOs mean, prompts share what their ids share."""

import itertools

import numpy as np
import pytest

from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import CONTINUE_PROBABILITY, QWEN_RATE_RPS, mixed, qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest, share_prefixes

# Prompt tokens of the first two minutes of QwenTrace (to-C): class -> share of 327 requests, mean, std, p99.
REFERENCE = {
    "text": (226 / 327, 646, 630, 3256),
    "image": (24 / 327, 393, 113, 808),
    "search": (66 / 327, 5055, 3070, 15127),
    "file": (11 / 327, 4132, 3519, 10560),
}


@pytest.fixture(scope="module")
def long_trace() -> Trace:
    return qwen_like(20_000, seed=0)


@pytest.mark.parametrize("name", REFERENCE)
def test_generator_matches_the_moments_of_qwentrace(long_trace: Trace, name: str) -> None:
    share, mean, std, p99 = REFERENCE[name]
    lengths = np.array([r.new_tokens for r in long_trace.requests if r.request_class == name])
    assert len(lengths) / len(long_trace.requests) == pytest.approx(share, rel=0.1)
    assert lengths.mean() == pytest.approx(mean, rel=0.05)
    assert lengths.std() == pytest.approx(std, rel=0.1)
    assert np.percentile(lengths, 99) == pytest.approx(p99, rel=0.15)
    assert lengths.max() <= 16_744


def test_arrivals_are_poisson_at_the_trace_rate(long_trace: Trace) -> None:
    gaps_s = np.diff([r.arrival_s for r in long_trace.requests])
    assert long_trace.rate_rps == pytest.approx(QWEN_RATE_RPS, rel=0.03)
    assert gaps_s.min() >= 0
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(1.0, rel=0.05)


def test_chats_share_the_prefix_of_the_turn_before(long_trace: Trace) -> None:
    text = [r for r in long_trace.requests if r.request_class == "text"]
    assert sum(r.shared_tokens > 0 for r in text) / len(text) == pytest.approx(CONTINUE_PROBABILITY, abs=0.03)
    computed = share_prefixes(long_trace.requests)
    assert [r.shared_tokens for r in computed] == [r.shared_tokens for r in long_trace.requests]
    assert all(len(r.hash_ids) == -(-r.prompt_tokens // r.block_tokens) for r in text)


@pytest.mark.parametrize("generate", [qwen_like, mixed])
def test_generator_is_seeded_and_a_longer_trace_begins_with_the_shorter(generate: object) -> None:
    assert callable(generate)
    assert generate(50, 3) == generate(50, 3)
    assert generate(50, 3) != generate(50, 4)
    assert generate(80, 3).requests[:50] == generate(50, 3).requests


def test_mixed_workload_has_slos_that_do_not_follow_length() -> None:
    requests = mixed(10_000, seed=1).requests
    interactive = [r for r in requests if r.request_class == "interactive"]
    assert len(interactive) / len(requests) == pytest.approx(0.3, abs=0.02)
    lengths = np.array([r.prompt_tokens for r in requests])
    slos = np.array([r.ttft_slo_s for r in requests])
    assert abs(np.corrcoef(lengths, slos)[0, 1]) < 0.05


def test_rate_scale_moves_arrivals_and_time_scale_moves_slos_too() -> None:
    trace = qwen_like(100, seed=0)
    faster, slower = trace.scaled(rate_scale=2), trace.scaled(time_scale=4)
    assert faster.rate_rps == pytest.approx(2 * trace.rate_rps)
    assert slower.rate_rps == pytest.approx(trace.rate_rps / 4)
    for before, quick, slow in zip(trace.requests, faster.requests, slower.requests, strict=True):
        assert quick.ttft_slo_s == before.ttft_slo_s
        assert slow.ttft_slo_s == pytest.approx(4 * before.ttft_slo_s)
        assert slow.tbt_slo_s == pytest.approx(4 * before.tbt_slo_s)
    with pytest.raises(ValueError, match="positive"):
        trace.scaled(rate_scale=0)


def test_limits_keep_the_hash_ids_consistent() -> None:
    trace = qwen_like(200, seed=0).limited(requests=150, max_output_tokens=4, max_prompt_tokens=100)
    assert len(trace.requests) == 150
    for request in trace.requests:
        assert request.prompt_tokens <= 100
        assert request.output_tokens <= 4
        assert len(request.hash_ids) == -(-request.prompt_tokens // 16)
        assert 0 <= request.shared_tokens <= request.prompt_tokens


def test_classes_come_tightest_slo_first(long_trace: Trace) -> None:
    assert long_trace.classes == ["text", "image", "search", "file"]


def test_prompts_share_exactly_the_prefix_that_hash_ids_share() -> None:
    def request(tokens: int, ids: tuple[int, ...]) -> TraceRequest:
        return TraceRequest(0, tokens, 1, "text", 1, 1, hash_ids=ids)

    builder = PromptBuilder(seed=7, first_token_id=10, end_token_id=30_000)
    parent = builder.build(request(40, (0, 1, 2)), 0)
    child = builder.build(request(70, (0, 1, 3, 4, 5)), 1)
    assert (len(parent), len(child)) == (40, 70)
    assert parent[:32] == child[:32]
    assert parent[32:40] != child[32:40]
    assert all(10 <= token < 30_000 for token in parent + child)


def test_prompts_without_hash_ids_are_unique_and_depend_on_the_seed_only() -> None:
    builder = PromptBuilder(seed=7, first_token_id=0, end_token_id=1000)
    prompts = [builder.unique(500, index) for index in range(20)]
    assert prompts == [PromptBuilder(7, 0, 1000).unique(500, index) for index in range(20)]
    assert PromptBuilder(8, 0, 1000).unique(500, 0) != prompts[0]
    for one, other in itertools.combinations(prompts, 2):
        assert one[:4] != other[:4]
