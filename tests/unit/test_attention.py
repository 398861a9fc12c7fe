"""Attention of the portable CPU platform against a float64 reference that is written from the definition."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sgl_flowprefill.platforms import attention
from sgl_flowprefill.platforms.attention import PortableCpuAttention, attend_causal, attend_windowed

POOL_SLOTS = 400
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}


def reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window_tokens: int | None = None,
    logit_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention of the last queries, row by row and head by head, in float64."""
    queries, keys, values = queries.double(), keys.double(), values.double()
    group = queries.shape[1] // keys.shape[1]
    prefix = len(keys) - len(queries)
    output = torch.empty(len(queries), queries.shape[1], values.shape[-1], dtype=torch.float64)
    for row in range(len(queries)):
        end = prefix + row + 1
        begin = 0 if window_tokens is None else max(0, end - 1 - window_tokens)
        for head in range(queries.shape[1]):
            scores = keys[begin:end, head // group] @ queries[row, head] * scale
            if logit_cap:
                scores = logit_cap * torch.tanh(scores / logit_cap)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            weights = torch.softmax(scores, 0)[: end - begin]
            output[row, head] = weights @ values[begin:end, head // group]
    return output


def make(
    new: int, prefix: int, heads: int, kv_heads: int, dim: int, seed: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((new, heads, dim), (prefix + new, kv_heads, dim), (prefix + new, kv_heads, dim))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def make_sinks(heads: int, seed: int) -> torch.Tensor:
    return torch.randn(heads, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    new=st.integers(1, 70),
    prefix=st.integers(0, 70),
    tile=st.integers(1, 80),
    kv_heads=st.sampled_from([1, 2, 3]),
    group=st.sampled_from([1, 2, 4]),
    dim=st.sampled_from([8, 32]),
    dtype=st.sampled_from(list(TOLERANCE)),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_causal_tiles_equal_the_float64_reference(
    new: int,
    prefix: int,
    tile: int,
    kv_heads: int,
    group: int,
    dim: int,
    dtype: torch.dtype,
    with_sinks: bool,
    seed: int,
) -> None:
    queries, keys, values = make(new, prefix, kv_heads * group, kv_heads, dim, seed, dtype)
    sinks = make_sinks(kv_heads * group, seed).to(dtype) if with_sinks else None
    output = torch.full_like(queries, float("nan"))
    attend_causal(queries, keys, values, output, dim**-0.5, tile, sinks=sinks)
    error = (output.double() - reference(queries, keys, values, dim**-0.5, sinks=sinks)).abs().max()
    assert error < TOLERANCE[dtype]


@settings(max_examples=40, deadline=None)
@given(
    new=st.integers(1, 40),
    prefix=st.integers(0, 40),
    tile=st.integers(1, 50),
    window=st.one_of(st.none(), st.integers(0, 60)),
    cap=st.sampled_from([0.0, 5.0]),
    with_sinks=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_windows_logit_caps_and_sinks_equal_the_float64_reference(
    new: int, prefix: int, tile: int, window: int | None, cap: float, with_sinks: bool, seed: int
) -> None:
    queries, keys, values = make(new, prefix, 4, 2, 16, seed, torch.float32)
    values = values[..., :8].contiguous()
    output = torch.full((new, 4, 8), float("nan"))
    sinks = make_sinks(4, seed) if with_sinks else None
    attend_windowed(queries, keys, values, output, 0.25, tile, window, cap, sinks=sinks)
    error = (output.double() - reference(queries, keys, values, 0.25, window, cap, sinks)).abs().max()
    assert error < 5e-6


def test_large_scores_do_not_overflow_the_merge_of_tiles() -> None:
    queries, keys, values = make(64, 64, 2, 2, 16, 0, torch.float32)
    output = torch.empty_like(queries)
    attend_causal(queries * 1e3, keys, values, output, 1.0, 8)
    expected = reference(queries * 1e3, keys, values, 1.0)
    assert torch.isfinite(output).all()
    # Such scores pick single keys, and float32 cannot always tell which of two near ones: nearly all rows agree.
    assert ((output.double() - expected).abs().amax((1, 2)) < 1e-2).double().mean() > 0.9


class Pool:
    """KV pool of one layer with SGLang's interface."""

    def __init__(self, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.keys = torch.full((POOL_SLOTS, kv_heads, dim), float("nan"), dtype=dtype)
        self.values = self.keys.clone()

    def set_kv_buffer(self, layer: Any, loc: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[loc] = k
        self.values[loc] = v

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


class Engine:
    """A backend on a pool of its own, and the sequences that it has seen."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 16, **layer: Any) -> None:
        self.layer = RadixAttention(heads, dim, dim**-0.5, kv_heads, layer_id=0, **layer)
        self.pool = Pool(kv_heads, dim)
        self.req_to_token = torch.full((16, 200), -1, dtype=torch.int32)
        self.runner = SimpleNamespace(
            use_mla_backend=False,
            model_config=SimpleNamespace(is_encoder_decoder=False),
            token_to_kv_pool=self.pool,
            req_to_token_pool=SimpleNamespace(req_to_token=self.req_to_token),
        )
        self.backend = PortableCpuAttention(self.runner, query_tile_tokens=7)
        self.lengths = [0] * 16
        self.keys: list[torch.Tensor] = [torch.empty(0, kv_heads, dim)] * 16
        self.values = list(self.keys)

    def batch(self, requests: dict[int, list[int]], mode: ForwardMode) -> SimpleNamespace:
        """Forward batch that appends the given slots to the given requests."""
        prefixes = [self.lengths[request] for request in requests]
        for request, slots in requests.items():
            length = self.lengths[request]
            self.req_to_token[request, length : length + len(slots)] = torch.tensor(slots, dtype=torch.int32)
            self.lengths[request] += len(slots)
        return SimpleNamespace(
            forward_mode=mode,
            seq_lens_cpu=torch.tensor([self.lengths[request] for request in requests]),
            extend_prefix_lens_cpu=prefixes,
            extend_seq_lens_cpu=[len(slots) for slots in requests.values()],
            req_pool_indices=torch.tensor(list(requests)),
            out_cache_loc=torch.tensor([slot for slots in requests.values() for slot in slots]),
        )

    def run(self, requests: dict[int, list[int]], mode: ForwardMode, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Output of a batch and the reference for it, both [tokens, heads, dim]."""
        batch = self.batch(requests, mode)
        tokens = len(batch.out_cache_loc)
        heads, kv_heads, dim = self.layer.tp_q_head_num, self.layer.tp_k_head_num, self.layer.qk_head_dim
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(tokens, heads * dim, generator=generator)
        k, v = (torch.randn(tokens, kv_heads, dim, generator=generator) for _ in range(2))
        self.backend.init_forward_metadata(batch)
        output = self.backend.forward(q, k, v, self.layer, batch)
        expected, start = [], 0
        window = self.layer.sliding_window_size if self.layer.sliding_window_size > -1 else None
        for request, slots in requests.items():
            rows = slice(start, start + len(slots))
            self.keys[request] = torch.cat([self.keys[request], k[rows]])
            self.values[request] = torch.cat([self.values[request], v[rows]])
            queries = q.view(tokens, heads, dim)[rows]
            scale, cap = self.layer.scaling, self.layer.logit_cap
            expected.append(reference(queries, self.keys[request], self.values[request], scale, window, cap))
            start += len(slots)
        return output.view(tokens, heads, dim), torch.cat(expected)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("layer", [{}, {"sliding_window_size": 9}, {"logit_cap": 3.0}], ids=["full", "window", "cap"])
def test_ragged_batches_of_prefill_chunks_and_decodes_equal_the_reference(layer: dict[str, Any], data: Any) -> None:
    engine = Engine(**layer)
    free = list(range(1, POOL_SLOTS))
    if data.draw(st.booleans(), "scattered slots"):
        free = [slot for start in range(3) for slot in free[start::3]]
    for step in range(data.draw(st.integers(1, 5), "steps")):
        started = [request for request in range(16) if engine.lengths[request]]
        decode = bool(started) and data.draw(st.booleans(), "decode")
        pool = started if decode else list(range(16))
        chosen = data.draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4, unique=True), "requests")
        lengths = [1 if decode else data.draw(st.integers(1, 18), "new tokens") for _ in chosen]
        requests = {request: [free.pop(0) for _ in range(n)] for request, n in zip(chosen, lengths, strict=True)}
        output, expected = engine.run(requests, ForwardMode.DECODE if decode else ForwardMode.EXTEND, step)
        assert (output.double() - expected).abs().max() < 5e-6


def test_long_decode_reads_its_adjacent_slots_in_place_and_gathers_the_rest() -> None:
    engine = Engine()
    engine.run({0: list(range(10, 110)), 1: list(range(200, 203))}, ForwardMode.EXTEND, 0)
    for step, (first, second) in enumerate([(300, 110), (150, 151), (120, 301)]):
        output, expected = engine.run({0: [first], 1: [second]}, ForwardMode.DECODE, step + 1)
        assert engine.backend.forward_metadata[0].run_tokens == 100
        assert (output.double() - expected).abs().max() < 2e-6


def test_a_stream_in_a_mixed_batch_gathers_no_more_of_its_cache_than_in_a_decode_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = Engine()
    engine.run({0: list(range(10, 110)), 1: list(range(200, 203))}, ForwardMode.EXTEND, 0)
    engine.run({0: [300], 1: [301]}, ForwardMode.DECODE, 1)  # slots that are not adjacent to the prompts'
    gathered: list[int] = []

    def read(buffer: torch.Tensor, sequence: attention.Sequence, dtype: torch.dtype) -> torch.Tensor:
        gathered.append(sequence.query_start)
        return gather(buffer, sequence, dtype)

    gather = attention.gather
    monkeypatch.setattr(attention, "gather", read)
    tiles: list[int] = []
    engine.backend.between_tiles = lambda: tiles.append(1)
    mixed = {2: list(range(150, 164)), 0: [302], 1: [303]}
    output, expected = engine.run(mixed, ForwardMode.EXTEND, 2)
    assert (output.double() - expected).abs().max() < 2e-6
    assert gathered == [0, 0], "keys and values of the prompt alone"
    assert len(tiles) == 2 + 1 + 1, "a preemption checkpoint behind each tile of 7 rows, and behind each stream"


def test_instances_keep_their_own_batch() -> None:
    engine = Engine()
    other = PortableCpuAttention(engine.runner)
    engine.backend.init_forward_metadata(engine.batch({0: [1, 2, 3]}, ForwardMode.EXTEND))
    other.init_forward_metadata(engine.batch({1: [4]}, ForwardMode.EXTEND))
    assert [sequence.query_tokens for sequence in engine.backend.forward_metadata] == [3]
    assert [sequence.query_tokens for sequence in other.forward_metadata] == [1]


def test_scores_of_the_unfused_path_stay_within_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_SCORES_BYTES", 4096)
    queries, keys, values = make(50, 30, 4, 2, 16, 1, torch.float32)
    output = torch.empty_like(queries)
    attend_windowed(queries, keys, values, output, 0.25, 64, None, 2.0)
    assert (output.double() - reference(queries, keys, values, 0.25, None, 2.0)).abs().max() < 5e-6


@pytest.mark.parametrize(
    ("layer", "argument", "named"),
    [
        ({"is_cross_attention": True}, {}, "cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, {}, "ENCODER_ONLY"),
        ({}, {"topk_indices": torch.zeros(2)}, "topk_indices"),
    ],
)
def test_attention_that_would_be_wrong_is_refused(layer: dict[str, Any], argument: dict[str, Any], named: str) -> None:
    engine = Engine(**layer)
    batch = engine.batch({0: [1, 2]}, ForwardMode.EXTEND)
    engine.backend.init_forward_metadata(batch)
    with pytest.raises(NotImplementedError, match=named):
        engine.backend.forward(
            torch.zeros(2, 64), torch.zeros(2, 2, 16), torch.zeros(2, 2, 16), engine.layer, batch, **argument
        )


def test_encoder_decoder_models_are_refused() -> None:
    runner = SimpleNamespace(**{**vars(Engine().runner), "model_config": SimpleNamespace(is_encoder_decoder=True)})
    with pytest.raises(ValueError, match="encoder"):
        PortableCpuAttention(runner)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE])
def test_sinks_take_their_share_in_prefill_and_decode(mode: ForwardMode) -> None:
    engine = Engine()
    engine.run({0: [1, 2, 3]}, ForwardMode.EXTEND, 0)
    slots = [4] if mode == ForwardMode.DECODE else [4, 5, 6]
    batch = engine.batch({0: slots}, mode)
    engine.backend.init_forward_metadata(batch)
    sinks = make_sinks(4, 1)
    q, k, v = torch.randn(len(slots), 64), torch.randn(len(slots), 2, 16), torch.randn(len(slots), 2, 16)
    output = engine.backend.forward(q, k, v, engine.layer, batch, sinks=sinks)
    keys, values = torch.cat([engine.keys[0], k]), torch.cat([engine.values[0], v])
    expected = reference(q.view(-1, 4, 16), keys, values, engine.layer.scaling, sinks=sinks)
    assert (output.view(-1, 4, 16).double() - expected).abs().max() < 2e-6


def test_long_attention_lets_others_run_between_all_of_its_tiles() -> None:
    queries, keys, values = make(50, 30, 4, 2, 16, 1, torch.float32)
    for attend in (attend_causal, attend_windowed):
        tiles: list[int] = []
        output = torch.full_like(queries, float("nan"))
        attend(queries, keys, values, output, 0.25, 20, between_tiles=lambda tiles=tiles: tiles.append(1))
        assert len(tiles) == 3
