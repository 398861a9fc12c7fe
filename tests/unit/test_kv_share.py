"""How much of a GPU becomes KV cache where the user has not said it, for a model of Llama-3.1-8B's shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.runtime import kv_share
from sgl_flowprefill.runtime.kv_share import Needed, leave_room, share
from sgl_flowprefill.runtime.memory import MIB, budget

GIB = 1 << 30
WEIGHTS_BYTES = 15 * GIB
KV_TOKEN_BYTES = 32 * 2 * 8 * 128 * 2
BESIDE_TASKS_BYTES = 3 * GIB
"""What SGLang has of a card before weights, and what the share leaves to CUDA graphs and workspaces."""
CONTEXT_TOKENS = 131_072
SLOT_BYTES = 40 * MIB


def configurator(given: float | None = None, device: str = "cuda", **changed: Any) -> Any:
    """What SGLang's knows of a server, and what it has been asked for."""
    options: dict[str, Any] = {
        "attention_backend": "flashinfer",
        "prefill_attention_backend": None,
        "disaggregation_mode": "null",
        "cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(max_bs=48)),
        "attn_dp_size": 1,
        "tp_size": 1,
        "speculative_algorithm": None,
        "enable_lora": None,
        "lora_paths": None,
        "nnodes": 1,
        "_raw_input": {"mem_fraction_static": given},
    }
    model_config = SimpleNamespace(
        hidden_size=4096,
        num_attention_heads=32,
        head_dim=128,
        context_len=CONTEXT_TOKENS,
        vocab_size=128_256,
        get_total_num_kv_heads=lambda: 8,
        hf_text_config=SimpleNamespace(intermediate_size=14_336),
    )
    return SimpleNamespace(
        device=device,
        model_config=model_config,
        model_dtype=torch.bfloat16,
        sliding_window_size=None,
        spec_aux_config=SimpleNamespace(eagle_use_aux_hidden_state=True, eagle_aux_hidden_state_layer_ids=None),
        server_args=SimpleNamespace(**(options | changed)),
    )


def sized(of: Any, budget_bytes: int, most_tokens: int = 1 << 40) -> int:
    """The tokens of the pool that a server gets of so many bytes, of which SGLang would have made all."""

    def config_from_budget(_configurator: Any, budget_bytes: int, *, cap_tokens: int | None = None) -> Any:
        assert cap_tokens is None
        return SimpleNamespace(max_total_num_tokens=min(most_tokens, budget_bytes // KV_TOKEN_BYTES))

    return int(leave_room(config_from_budget, of, budget_bytes, cap_tokens=None).max_total_num_tokens)


@pytest.fixture(params=[24, 40, 48, 80, 141])
def card_gib(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    gib: int = request.param
    monkeypatch.setattr(kv_share, "get_device_memory_capacity", lambda device: gib * 1024)
    return gib


def test_a_server_starts_on_each_card_and_keeps_no_more_free_than_its_prompts_need(card_gib: int) -> None:
    free_bytes = card_gib * GIB - WEIGHTS_BYTES - BESIDE_TASKS_BYTES
    server = configurator()
    needed = Needed.of(server, FlowPrefillConfig.from_env())
    tokens = sized(server, free_bytes)
    longest, activations = min(tokens, CONTEXT_TOKENS), needed.activations
    running_bytes = activations.running_bytes(longest)
    most_bytes = max(running_bytes, activations.checkpoint_bytes(longest) + activations.logits_bytes(longest))
    left_bytes = free_bytes - tokens * KV_TOKEN_BYTES
    # What ``TaskMemory.plan`` asks for, by which the server would end.
    assert budget(left_bytes, 18 * SLOT_BYTES, running_bytes, tasks=18) >= most_bytes
    assert left_bytes < 1.1 * most_bytes + 18 * SLOT_BYTES + 100 * MIB
    assert running_bytes >= longest * 52 * 1024, "four hidden states, and attention's tensors"
    assert most_bytes >= 2048 * 3 * 128_256 * 4, "log probabilities of a prompt can be asked for"


def test_a_small_pool_needs_little_beside_it_and_a_large_one_what_the_longest_prompt_needs(card_gib: int) -> None:
    tokens = sized(configurator(), card_gib * GIB - WEIGHTS_BYTES - BESIDE_TASKS_BYTES)
    least = {24: 13_000, 40: 110_000, 48: 160_000, 80: 430_000, 141: 900_000}
    assert tokens > least[card_gib]


def test_what_is_free_is_what_is_needed_and_one_token_more_would_be_too_much() -> None:
    def beside(tokens: int) -> int:
        return 1000 + 7 * min(tokens, 500)

    for budget_bytes in range(1100, 20_000, 97):
        pool_bytes = share(budget_bytes, lambda some: some // 10, beside)
        fitting = [tokens for tokens in range(budget_bytes // 10 + 1) if 10 * tokens + beside(tokens) <= budget_bytes]
        assert abs(pool_bytes // 10 - max(fitting)) <= 1


def test_a_budget_without_a_token_is_left_as_it_is() -> None:
    """SGLang says why it cannot start."""
    for budget_bytes in (-MIB, 0, MIB):
        assert share(budget_bytes, lambda _: 0, lambda _: MIB) == budget_bytes


def test_a_pool_that_the_user_has_bounded_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_share, "get_device_memory_capacity", lambda device: 24 * 1024)
    free_bytes = 24 * GIB - WEIGHTS_BYTES - BESIDE_TASKS_BYTES
    assert sized(configurator(), free_bytes, most_tokens=10_000) == 10_000


@pytest.mark.parametrize(
    "other", [configurator(given=0.8), configurator(device="cpu"), configurator(disaggregation_mode="decode")]
)
def test_the_pool_is_sglangs_where_the_user_has_said_its_share_and_where_nothing_is_prefilled_on_a_gpu(
    other: Any,
) -> None:
    assert sized(other, 6 * GIB) == 6 * GIB // KV_TOKEN_BYTES


def test_nodes_whose_environments_differ_have_pools_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_share, "get_device_memory_capacity", lambda device: 80 * 1024)
    sent: list[int] = []
    group = SimpleNamespace(broadcast_object=lambda mine: sent[0] if sent else mine)
    monkeypatch.setattr(kv_share, "get_world_group", lambda: group)
    first = sized(configurator(nnodes=2), 40 * GIB)
    sent.append(first * KV_TOKEN_BYTES)
    monkeypatch.setenv("FLOWPREFILL_MAX_SUSPENDED", "100")
    assert sized(configurator(nnodes=2), 40 * GIB) == first
    assert sized(configurator(), 40 * GIB) < first


def test_what_is_needed_follows_from_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_share, "get_device_memory_capacity", lambda device: 80 * 1024)
    config = FlowPrefillConfig.from_env()

    def needed(**options: Any) -> Needed:
        return Needed.of(configurator(**options), config)

    plain = needed()
    sampling_bytes = 48 * 128_256 * 12
    assert plain.fixed_bytes == 18 * SLOT_BYTES + sampling_bytes
    assert needed(attention_backend="fa3").fixed_bytes == sampling_bytes
    assert needed(disaggregation_mode="prefill").fixed_bytes == 18 * SLOT_BYTES
    tokens = 50_000
    whole = needed(enable_lora=True).activations.running_bytes(tokens)
    assert whole == tokens * (4 * 4096 + 3 * 14_336) * 2, "MLPs with adapters are not split"
    assert plain.activations.running_bytes(tokens) < whole
    drafts = needed(disaggregation_mode="prefill", speculative_algorithm="EAGLE3").activations
    assert drafts.suspended_bytes(1) - plain.activations.suspended_bytes(1) == 3 * 8192
    assert needed(tp_size=8).activations.attention == plain.activations.attention // 8
    joint = needed(attn_dp_size=4, tp_size=4).activations
    assert joint.attention == plain.activations.attention
    assert joint.checkpoint_bytes(1) == 4 * plain.activations.checkpoint_bytes(1)
