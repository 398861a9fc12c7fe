"""Device memory of tasks: what a start refuses, and which tasks may live beside each other."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sglang.srt.environ import envs

from sgl_flowprefill.runtime import memory
from sgl_flowprefill.runtime.memory import (
    MIB,
    Activations,
    EmptyPool,
    TaskMemory,
    budget,
    sliding_window_limit,
    writes_kv_alone,
)
from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.runtime.tiles import in_tiles, row_tiles

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 8, 128, 14336


def config(**text: Any) -> Any:
    return SimpleNamespace(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        context_len=131_072,
        vocab_size=128_256,
        get_total_num_kv_heads=lambda: KV_HEADS,
        hf_text_config=SimpleNamespace(intermediate_size=INTERMEDIATE, **text),
    )


def test_activations_of_an_8b_model() -> None:
    tiled, whole = (Activations.of(config(), 2, rows) for rows in (lambda: 4096, None))
    assert tiled.checkpoint_bytes(1000) == 1000 * 32 << 10
    # Between the linear layers of an MLP, gate and up projection; of a long prompt, in attention, what that holds.
    assert tiled.suspended_bytes(2000) == 2000 * (4 * HIDDEN + 2 * INTERMEDIATE) * 2
    assert tiled.suspended_bytes(100_000) == 100_000 * (3 * HIDDEN + 2 * (HEADS + KV_HEADS) * HEAD_DIM) * 2
    behind = Activations.of(config(), 2, lambda: 4096, is_interrupted_inside=False)
    assert behind.suspended_bytes(1000) == behind.checkpoint_bytes(1000)
    assert behind.running_bytes(1000) == tiled.running_bytes(1000)
    # Untiled, gate, up and their product are the widest; in tiles, attention is, from some length on.
    assert whole.running_bytes(10_000) == 10_000 * (4 * HIDDEN + 3 * INTERMEDIATE) * 2
    assert tiled.running_bytes(100_000) == 100_000 * (4 * HIDDEN + 2 * (HEADS + KV_HEADS) * HEAD_DIM) * 2
    assert tiled.running_bytes(2000) == whole.running_bytes(2000)


@pytest.mark.parametrize("page_tokens", [1, 16, 64])
def test_a_prompt_that_the_pool_of_sliding_windows_never_takes_whole_is_refused_and_the_longest_it_takes_is_not(
    page_tokens: int,
) -> None:
    from sglang.srt.mem_cache.prefill_budget import SWAPrefillBudget

    allocator = SimpleNamespace(size_swa=4096, page_size=page_tokens, swa_req_ring=False)
    budget: Any = SWAPrefillBudget.__new__(SWAPrefillBudget)
    budget.allocator, budget.page_size, budget.req_ring = allocator, page_tokens, False
    budget.tree_cache = SimpleNamespace(sliding_window_size=512)

    def fits(tokens: int) -> bool:
        return not budget.swa_never_fits(budget.ceil_paged_tokens(tokens), 100)

    limit = int(sliding_window_limit(allocator))
    assert fits(limit - 1)
    assert not fits(limit + page_tokens)
    assert limit == min(tokens for tokens in range(4096) if not fits(tokens))


def admits(capacity_tokens: int, page_tokens: int, prompt_tokens: int, answer_tokens: int, is_fixed: bool) -> bool:
    """Whether SGLang's own admission takes a request into an empty pool."""
    from sglang.srt.managers.schedule_policy import PrefillAdder
    from sglang.srt.mem_cache.prefill_budget import PrefillBudget

    class Adder(PrefillAdder):
        def __init__(self) -> None:
            self.page_size = self.per_req_token_overhead = page_tokens
            self.token_to_kv_pool_allocator = allocator
            self.tree_cache, self.running_batch = tree, None
            self.memory_budget = PrefillBudget(allocator, tree)
            self.can_run_list, self.req_states, self.new_token_ratio = [], None, 0.7
            self.is_hybrid_swa, self._mamba_slot_cost = False, 0
            self.rem_chunk_tokens = self.rem_mamba_slots = None
            self.prefill_delayer_single_pass = self.dllm_config = self.kv_shard_scratch_spec = None
            self.rem_input_tokens, self.exact_chunk_fill = 1 << 30, False
            self.log_hit_tokens = self.log_input_tokens = self.log_replay_tokens = 0

    allocator: Any = SimpleNamespace(
        page_size=page_tokens, available_size=lambda: capacity_tokens, request_slot_reserve=lambda **_: 0
    )
    tree: Any = SimpleNamespace(evictable_size=lambda: 0, supports_mamba=lambda: False)
    req: Any = SimpleNamespace(
        full_untruncated_fill_ids=range(prompt_tokens),
        origin_input_ids=range(prompt_tokens),
        output_ids=[],
        prefix_len=0,
        extend_len=prompt_tokens,
        retracted_stain=False,
        auxiliary_swa_host_hit_length=0,
        kv=SimpleNamespace(req_pool_idx=None),
        sampling_params=SimpleNamespace(max_new_tokens=answer_tokens, ignore_eos=is_fixed),
    )
    adder = Adder()
    if is_fixed:
        adder.add_one_req_ignore_eos(req)
        return req in adder.can_run_list
    fits, _ = adder.memory_budget.check_prefill(
        extend_input_len=prompt_tokens,
        total_tokens=prompt_tokens + answer_tokens + page_tokens,
        max_new_tokens=answer_tokens,
        input_tokens=prompt_tokens,
        swa_host_hit_length=0,
        chunk_limit=None,
    )
    return fits


@pytest.mark.parametrize("is_fixed", [False, True])
@pytest.mark.parametrize("page_tokens", [1, 16, 64])
def test_what_is_refused_is_what_sglang_would_never_admit(page_tokens: int, is_fixed: bool) -> None:
    pool, seen = EmptyPool(256, page_tokens), set()
    for prompt_tokens in range(1, 257):
        for answer_tokens in {0, 1, 2, 50, *range(max(0, 250 - prompt_tokens - page_tokens), 260 - prompt_tokens)}:
            takes = admits(256, page_tokens, prompt_tokens, answer_tokens, is_fixed)
            assert pool.takes(prompt_tokens, answer_tokens, is_fixed) == takes, (prompt_tokens, answer_tokens)
            seen.add(takes)
    assert seen == {False, True}


def test_only_of_a_pool_that_is_counted_in_tokens_it_is_known_what_never_fits() -> None:
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.mem_cache.allocator.swa import SWATokenToKVPoolAllocator

    class Plain(BaseTokenToKVPoolAllocator):
        page_size = 16

        def __init__(self) -> None:
            pass

        def available_size(self) -> int:
            return 100

    class Windows(SWATokenToKVPoolAllocator):
        page_size = 16

        def __init__(self) -> None:
            pass

    Plain.__abstractmethods__ = Windows.__abstractmethods__ = frozenset()  # type: ignore[attr-defined]
    assert EmptyPool.of(Plain()) == EmptyPool(100, 16)
    assert EmptyPool.of(Windows()) == EmptyPool(math.inf, 16)
    assert EmptyPool.of(Windows()).takes(10**9, 10**9, is_fixed=True)


def test_pools_of_whole_prompts_or_of_windows_alone_refuse_none_for_their_length() -> None:
    assert sliding_window_limit(SimpleNamespace(page_size=1)) == math.inf
    assert sliding_window_limit(SimpleNamespace(size_swa=64, page_size=1, swa_req_ring=True)) == math.inf


def test_a_step_runs_again_only_where_it_writes_kv_cache_alone() -> None:
    from sglang.srt.mem_cache.memory_pool import (
        HybridLinearKVPool,
        HybridReqToTokenPool,
        MHATokenToKVPool,
        MLATokenToKVPool,
        ReqToTokenPool,
    )
    from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

    class OfAPlatform(MHATokenToKVPool):
        pass

    def runs_again(rows: type, kv: type, **attributes: Any) -> bool:
        pools = {"req_to_token_pool": rows.__new__(rows), "token_to_kv_pool": kv.__new__(kv)}
        return writes_kv_alone(SimpleNamespace(**pools, **attributes))

    for plain in (MHATokenToKVPool, MLATokenToKVPool, SWAKVPool):
        assert runs_again(ReqToTokenPool, plain)
        assert not runs_again(HybridReqToTokenPool, plain), "its layers keep the state of a sequence"
        assert not runs_again(ReqToTokenPool, plain, watermark_state=object())
    assert not runs_again(ReqToTokenPool, HybridLinearKVPool)
    assert not runs_again(ReqToTokenPool, OfAPlatform), "nobody knows what it keeps"


def test_ranks_share_heads_and_dense_mlps_and_neither_hidden_states_nor_experts() -> None:
    alone, of_eight, of_sixteen = (Activations.of(config(), 2, None, shared=ranks) for ranks in (1, 8, 16))
    assert (of_eight.attention, of_eight.mlp) == (alone.attention // 8, alone.mlp // 8)
    assert of_sixteen.attention == 2 * (2 + 1) * HEAD_DIM * 2, "two heads, and a copy of a KV head"
    assert of_eight.hidden == alone.hidden
    text = {"moe_intermediate_size": 768, "num_experts_per_tok": 8}
    assert Activations.of(config(**text), 2, None, shared=8).mlp == Activations.of(config(**text), 2, None).mlp


def test_a_prompt_that_is_too_short_to_be_suspended_in_an_mlp_counts_none_of_its_rows() -> None:
    """As ``tiles`` says which tile is SHORT."""
    tiled, points = Activations.of(config(), 2, lambda: 4096), list[None]()
    in_attention_bytes = (2 * (HEADS + KV_HEADS) * HEAD_DIM - HIDDEN) * 2
    for tokens, is_short in ((1024, True), (1025, False)):
        in_tiles(torch.nn.Identity(), lambda: 4096, lambda: points.append(None))(torch.ones(tokens, 1))
        assert bool(points) != is_short
        row_bytes = in_attention_bytes if is_short else 2 * INTERMEDIATE * 2
        assert tiled.suspended_bytes(tokens) == tiled.checkpoint_bytes(tokens) + tokens * row_bytes


def test_the_longest_tile_of_an_mlp_is_counted() -> None:
    few_heads = Activations(hidden=1, attention=1, mlp=100, mlp_tile_tokens=lambda: 4096, between_linears=60)
    longest = max(tile.stop - tile.start for tokens in range(30_000, 36_000) for tile in row_tiles(tokens, 4096))
    assert few_heads.running_bytes(36_000) - few_heads.checkpoint_bytes(36_000) == longest * 100
    assert few_heads.suspended_bytes(36_000) - few_heads.checkpoint_bytes(36_000) == longest * 60


def test_where_all_mlps_are_mixtures_of_experts_no_rows_of_one_are_held() -> None:
    text = {"moe_intermediate_size": 768, "num_experts_per_tok": 8}
    experts = Activations.of(config(**text), 2, lambda: 4096, has_dense_mlps=False)
    in_attention_bytes = (2 * (HEADS + KV_HEADS) * HEAD_DIM - HIDDEN) * 2
    assert experts.suspended_bytes(4096) == experts.checkpoint_bytes(4096) + 4096 * in_attention_bytes
    assert experts.running_bytes(4096) == Activations.of(config(**text), 2, lambda: 4096).running_bytes(4096)


def test_experts_count_as_often_as_they_are_visited() -> None:
    experts = Activations.of(config(moe_intermediate_size=768, num_experts_per_tok=8), 2, lambda: 4096)
    assert experts.mlp == max(3 * INTERMEDIATE, 8 * (3 * 768 + HIDDEN)) * 2
    assert experts.running_bytes(100_000) == 100_000 * (4 * HIDDEN * 2 + experts.mlp), "experts run whole"
    dense_bytes = 4096 * 2 * INTERMEDIATE * 2
    assert experts.suspended_bytes(4096) - experts.checkpoint_bytes(4096) == dense_bytes, "MLPs beside them in tiles"


def test_a_start_without_enough_memory_says_what_to_lower() -> None:
    assert budget(free_bytes=900 * MIB, slots_bytes=300 * MIB, longest_bytes=600 * MIB, tasks=18) == 600 * MIB
    with pytest.raises(SystemExit) as refusal:
        budget(free_bytes=899 * MIB, slots_bytes=300 * MIB, longest_bytes=600 * MIB, tasks=18)
    sentence = str(refusal.value)
    assert "18 tasks need 900 MiB beside the KV pool" in sentence
    assert "899 MiB are free: lower --mem-fraction-static or --flowprefill-max-suspended" in sentence
    assert "\n" not in sentence


def test_decode_steps_and_what_is_in_pieces_come_off_what_suspended_prefills_may_hold() -> None:
    def left(free_bytes: int) -> int:
        return budget(free_bytes, 300 * MIB, longest_bytes=600 * MIB, tasks=18, steps_bytes=100 * MIB)

    assert left(2000 * MIB) == (2000 - 300 - 100 - 100) * MIB
    assert left(950 * MIB) == 600 * MIB, "the longest prompt can be computed alone"


def test_tasks_start_while_their_activations_fit() -> None:
    activations = Activations(hidden=1, attention=5, mlp=7, mlp_tile_tokens=None)
    tasks = TaskMemory(activations, budget_bytes=11_000)
    assert activations.running_bytes(1000) == 11_000
    assert tasks.admits([], 5000), "alone a task always starts, or nothing ever would"
    assert not tasks.admits([1000], 1)
    assert activations.suspended_bytes(1000) == 8000
    assert tasks.admits([900, 137], 0)
    assert not tasks.admits([900, 138], 0)
    # However they come, the one that takes most is counted as running.
    assert tasks.admits([137], 900) == tasks.admits([900], 137)


def test_suspended_tasks_are_counted_by_their_own_tiles() -> None:
    tasks = TaskMemory(Activations(1, 1, 6, lambda: 100, between_linears=4), budget_bytes=6050)
    assert tasks.activations.suspended_bytes(500) == 4 * 500 + 4 * 125, "the last tile may be longer by a quarter"
    # Two long ones and two short ones, each between the linear layers of a tile, and one of them behind these.
    assert tasks.admits([500, 500, 50], 50)
    assert not tasks.admits([500, 500, 50], 51)


def test_logits_of_prompts_are_counted_as_chunks_while_a_prefill_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    one_matrix = 128_256 * 4
    chunked = Activations.of(config(), 2, lambda: 4096)
    assert chunked.logits_bytes(32_000) == 2048 * 3 * one_matrix
    assert chunked.logits_bytes(100) == 100 * 3 * one_matrix
    with envs.SGLANG_ENABLE_LOGPROB_CHUNK.override(False):
        assert Activations.of(config(), 2, lambda: 4096).logits_bytes(32_000) == 32_000 * 3 * one_matrix
    budget_bytes = chunked.suspended_bytes(3000) + chunked.logits_bytes(2048)
    tasks = TaskMemory(chunked, budget_bytes)
    assert tasks.admits([1200], 1800, 32_000)
    assert not tasks.admits([1200], 1801, 32_000)
    assert tasks.admits([1200], 1801)


def test_the_plan_measures_a_slot_and_counts_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    allocated = [0]

    def make(init_new_workspace: bool) -> Any:
        assert not init_new_workspace, "slots share the large float workspace"
        allocated[0] += 32 * MIB
        return object()

    runner = SimpleNamespace(
        device="cuda",
        dtype=torch.bfloat16,
        attn_backend=object(),
        max_total_num_tokens=100_000,
        model_config=config(),
        _get_attention_backend=make,
        kv_index_translator=SimpleNamespace(bind_and_verify_backends=lambda backends: None),
    )
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: allocated[0])
    monkeypatch.setattr(memory, "free_device_bytes", lambda: 8000 * MIB)
    slots = AttentionSlots(runner, None)
    plan = TaskMemory.plan(runner, slots, max_suspended=16, mlp_tile_tokens=lambda: 4096)
    assert plan.budget_bytes == (8000 - 16 * 32 - 400) * MIB
    assert allocated[0] == 32 * MIB, "one slot is made ahead, the others when they are needed"
    taken = [slots.take() for _ in range(3)]
    assert len(set(map(id, taken))) == 3
    assert allocated[0] == 64 * MIB
    decoding = TaskMemory.plan(runner, slots, max_suspended=16, mlp_tile_tokens=lambda: 4096, streams=64)
    assert plan.budget_bytes - decoding.budget_bytes == 64 * 128_256 * 3 * 4
    monkeypatch.setattr(memory, "free_device_bytes", lambda: 500 * MIB)
    with pytest.raises(SystemExit, match="18 tasks need"):
        TaskMemory.plan(runner, slots, max_suspended=16, mlp_tile_tokens=lambda: 4096)


def test_what_the_start_has_left_in_the_cache_is_given_back_and_what_stays_there_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for PyTorch's allocator: a profile of 600 MiB has been measured, and graphs have a pool."""
    cached = {"of the start's stream": 600 * MIB, "of CUDA graphs": 300 * MIB}
    used = 1000 * MIB
    total = 4000 * MIB

    def empty_cache() -> None:
        cached["of the start's stream"] = 0

    monkeypatch.setattr(memory.torch.cuda, "empty_cache", empty_cache)
    monkeypatch.setattr(memory.torch.cuda, "memory_allocated", lambda: used)
    monkeypatch.setattr(memory.torch.cuda, "memory_reserved", lambda: used + sum(cached.values()))
    monkeypatch.setattr(memory.torch.cuda, "mem_get_info", lambda: (total - used - sum(cached.values()), total))
    assert memory.free_device_bytes() == 2700 * MIB
    assert cached["of the start's stream"] == 0
