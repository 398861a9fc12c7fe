"""Query tiles of SGLang's FlashInfer and FA3 backends, run on the CPU.

SGLang's backends and FlashInfer's wrappers are the installed ones. What stands in is below them: FlashInfer's compiled
module, which here computes with PyTorch what was planned, from the indices in the integer workspace, and refuses
anything else; and FA3's kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from greenlet import greenlet
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("sglang")
pytest.importorskip("flashinfer")

from sgl_flowprefill.runtime import fa3_tiles, flashinfer_tiles
from sgl_flowprefill.runtime.query_tiles import BLOCK_ROWS, Lengths, Segment, cut, unit_rows
from sgl_flowprefill.runtime.tiled_attention import tile_queries
from tests.gpu_backends import Anything, build, go_offline, kernel_names, model_runner

HEADS, KV_HEADS, DIM = 8, 2, 64
TOKENS, ROWS = 256, 8
UNIT_ROWS = 8
"""Least rows of a tile in these tests; on a device as many as fill it."""


# ---- which rows make a tile ---------------------------------------------------------------------------------------

requests = st.lists(st.tuples(st.integers(1, 700), st.integers(0, 500)), min_size=1, max_size=5)


@given(requests, st.booleans(), st.none() | st.integers(0, 300), st.integers(1, 60_000), st.integers(1, 12))
def test_tiles_cover_a_batch_in_order_and_stay_small(
    batch: list[tuple[int, int]], causal: bool, window: int | None, most_pairs: int, most_blocks: int
) -> None:
    new, before = zip(*batch, strict=True)
    lengths = Lengths(new, before, causal, window)
    tiles = cut(lengths, most_pairs, BLOCK_ROWS, most_blocks)
    rows = [(s.request, row) for tile in tiles for s in tile for row in range(s.start, s.stop)]
    assert rows == [(request, row) for request, count in enumerate(new) for row in range(count)]
    for tile in tiles:
        assert sum(lengths.pairs(s) for s in tile) <= most_pairs or sum(s.rows for s in tile) <= BLOCK_ROWS
        assert sum(-(-s.rows // BLOCK_ROWS) for s in tile) <= most_blocks
        for segment, following in itertools.pairwise(tile):
            assert segment.stop == new[segment.request]
            assert (following.request, following.start) == (segment.request + 1, 0)


@given(st.integers(1, 60), st.integers(0, 60), st.none() | st.integers(0, 80), st.data())
def test_pairs_are_those_of_the_mask(new: int, before: int, window: int | None, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, new - 1))
    stop = data.draw(st.integers(start + 1, new))
    segment = Segment(0, start, stop)
    seen = mask(new, before + new, True, -1 if window is None else window)[start:stop]
    assert Lengths((new,), (before,), True, window).pairs(segment) == int(seen.sum())
    assert Lengths((new,), (before,), False).pairs(segment) == (stop - start) * before


def test_a_unit_fills_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    device = torch.device("cuda")
    assert [unit_rows(heads, device) // BLOCK_ROWS * heads for heads in (1, 8, 32, 64, 128)] == [
        132,
        128,
        128,
        128,
        128,
    ]
    assert unit_rows(256, device) == BLOCK_ROWS


# ---- the stand-ins ------------------------------------------------------------------------------------------------


def mask(rows: int, keys: int, causal: bool, window: int) -> torch.Tensor:
    """Which keys each row sees, the ends of both aligned."""
    position = torch.arange(rows)[:, None] + keys - rows
    key = torch.arange(keys)[None, :]
    seen = key <= position if causal else torch.ones(rows, keys, dtype=torch.bool)
    return seen & (key >= position - window) if window >= 0 else seen


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, window: int, scale: float, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output, and log-sum-exps to the base of two: without keys, zeros and minus infinity."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->qhk", q, k) * scale
    scores = cap * torch.tanh(scores / cap) if cap else scores
    scores = scores.masked_fill(~mask(len(q), len(k), causal, window)[:, None], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.where(torch.isinf(lse)[..., None], 0.0, torch.exp(scores - lse[..., None]))
    return torch.einsum("qhk,khd->qhd", weights, v), lse / math.log(2)


class Module:
    """Stands in for FlashInfer's compiled module."""

    numbers = itertools.count(1)

    def __init__(self, runs: list[int], backend: str, *args: Any) -> None:
        self.runs = runs
        """Pairs of each kernel that ran, as the mask has them."""
        self.plans: dict[int, list[int]] = {}
        self.window, self.cap = args[7], args[8]

    def plan(self, float_workspace: Any, workspace: torch.Tensor, pinned: torch.Tensor, *args: Any) -> list[int]:
        rows, keys, _, total, requests, heads, kv_heads = args[:7]
        assert rows.device.type == keys.device.type == "cpu"
        assert (heads, kv_heads, total, requests) == (HEADS, KV_HEADS, int(rows[-1]), len(rows) - 1)
        assert len(pinned) == len(workspace)
        number = next(self.numbers)
        workspace[:8].view(torch.int64).fill_(number)
        self.plans[number] = rows.tolist()
        return [number]

    def _check(self, workspace: torch.Tensor, plan: list[int], q: torch.Tensor, rows: torch.Tensor) -> None:
        assert workspace[:8].view(torch.int64).item() == plan[0], "another plan is in the workspace"
        assert self.plans[plan[0]] == rows.tolist(), "run for other rows than planned"
        assert len(q) == int(rows[-1])

    def ragged_run(self, float_workspace: Any, workspace: torch.Tensor, plan: list[int], *args: Any) -> None:
        q, k, v, rows, keys, out, lse, mode, _, window, _, custom, *others = args
        self._check(workspace, plan, q, rows)
        assert custom is None
        assert len(k) == len(v) == int(keys[-1])
        self._run(q, list(zip(k.split(keys.diff().tolist()), v.split(keys.diff().tolist()), strict=True)),
                  rows, out, lse, mode, window, others)  # fmt: skip

    def paged_run(self, float_workspace: Any, workspace: torch.Tensor, plan: list[int], *args: Any) -> None:
        q, k, v, rows, keys, slots, last, out, lse, mode, _, window, _, custom, *others = args
        self._check(workspace, plan, q, rows)
        assert last.tolist() == [1] * (len(rows) - 1)
        assert custom is None
        read = [slots[a:b].long() for a, b in itertools.pairwise(keys.tolist())]
        self._run(q, [(k[s, 0], v[s, 0]) for s in read], rows, out, lse, mode, window, others)

    def _run(
        self, q: torch.Tensor, keys: Any, rows: Any, out: Any, lse: Any, mode: int, window: int, others: Any
    ) -> None:
        cap, scale = others[5], others[6]
        causal = {0: False, 1: True}[mode]
        pairs = 0
        for (k, v), (a, b) in zip(keys, itertools.pairwise(rows.tolist()), strict=True):
            # As the installed kernels: what was not planned is not compiled in.
            part, part_lse = attend(q[a:b], k, v, causal, window if self.window else -1, scale, cap if self.cap else 0)
            out[a:b] = part
            if lse is not None:
                lse[a:b] = part_lse
            pairs += int(mask(b - a, len(k), causal, window if self.window else -1).sum())
        self.runs.append(pairs)


def merge(a: torch.Tensor, lse_a: torch.Tensor, b: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, Any]:
    share = torch.sigmoid((lse_b - lse_a) * math.log(2))[..., None]
    return a + (b - a) * share, None


class Pool(Anything):
    """Keys and values by slot, of one layer."""

    def __init__(self) -> None:
        slots = ROWS * TOKENS
        super().__init__(
            start_layer=0,
            keys=torch.randn(slots, KV_HEADS, DIM, generator=torch.Generator().manual_seed(1)),
            values=torch.randn(slots, KV_HEADS, DIM, generator=torch.Generator().manual_seed(2)),
            writes=0,
            get_kv_cache_quant_method=lambda: Anything(
                resolve_attention_access=lambda phase, backend: Anything(), needs_global_scale=lambda: False
            ),
        )

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.values

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor, *scales: Any) -> None:
        assert len(k) == len(v) == len(where.loc)
        self.writes += 1
        self.keys[where.loc], self.values[where.loc] = k.view(-1, KV_HEADS, DIM), v.view(-1, KV_HEADS, DIM)


class Rig:
    """A model runner with a pool, the backends of several tasks, and what their kernels ran."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, window: int | None = None) -> None:
        go_offline(patch)
        self.name = name
        self.runs: list[int] = []
        self.runner = model_runner(window, TOKENS, torch.float32)
        self.pool = Pool()
        self.runner.token_to_kv_pool = self.pool
        self.runner.token_to_kv_pool_allocator = SimpleNamespace(get_kvcache=lambda: self.pool)
        self.runner.kv_index_translator.pack_read_stream = self._pack
        self.runner.model_config.attention_arch = None
        slots = torch.randperm(ROWS * TOKENS, generator=torch.Generator().manual_seed(3)).to(torch.int32)
        self.runner.req_to_token_pool.req_to_token[:ROWS] = slots.view(ROWS, TOKENS)
        patch.setattr(flashinfer_tiles, "unit_rows", lambda heads, device: UNIT_ROWS)
        patch.setattr(fa3_tiles, "unit_rows", lambda heads, device: UNIT_ROWS)
        if name == "flashinfer":
            import flashinfer.prefill as prefill
            from sglang.srt.layers.attention import flashinfer_backend

            modules: dict[Any, Module] = {}
            patch.setattr(
                prefill, "get_batch_prefill_module",
                lambda *args: modules[args] if args in modules else modules.setdefault(args, Module(self.runs, *args)),
            )  # fmt: skip
            patch.setattr(prefill, "determine_attention_backend", lambda *args, **named: "fa3")
            patch.setattr(prefill, "device_support_pdl", lambda device: False)
            patch.setattr(flashinfer_backend, "_safe_merge_state", merge, raising=False)
            patch.setattr(flashinfer_backend, "is_in_tc_piecewise_cuda_graph", lambda: False)
        else:
            from sglang.srt.layers.attention import flashattention_backend

            patch.setattr(flashattention_backend, "flash_attn_with_kvcache", self._fa3)
            patch.setattr(flashattention_backend, "is_cp_active", lambda batch: False)

    def backend(self, tile_pairs: float | None = None, between_tiles: Callable[[], None] = lambda: None) -> Any:
        backend = build(self.name, self.runner)
        if tile_pairs is not None:
            assert tile_queries(backend, between_tiles, tile_pairs) is None
        return backend

    def batch(self, lengths: list[tuple[int, int]], first_row: int = 0) -> Any:
        """Requests of (new, cached) tokens, with random queries, keys and values of the new ones."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        new, before = (list(values) for values in zip(*lengths, strict=True))
        both = [n + b for n, b in lengths]
        rows = torch.arange(first_row, first_row + len(lengths))
        table = self.runner.req_to_token_pool.req_to_token
        generator = torch.Generator().manual_seed(first_row)
        tensor = lambda values: torch.tensor(values, dtype=torch.int64)  # noqa: E731
        return Anything(
            forward_mode=ForwardMode.EXTEND,
            batch_size=len(lengths),
            req_pool_indices=rows,
            seq_lens=tensor(both),
            seq_lens_cpu=tensor(both),
            seq_lens_sum=sum(both),
            extend_prefix_lens=tensor(before),
            extend_prefix_lens_cpu=before,
            extend_seq_lens=tensor(new),
            extend_seq_lens_cpu=new,
            extend_num_tokens=sum(new),
            out_cache_loc=torch.cat([table[r, b : b + n] for r, (n, b) in zip(rows, lengths, strict=True)]).long(),
            out_cache_loc_is_physical=True,
            values=[torch.randn(sum(new), heads * DIM, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)],
        )

    def forward(self, backend: Any, batch: Any, layers: int = 1, **layer: Any) -> list[torch.Tensor]:
        """Plan a batch and attend to it in some layers, which all have the same keys and values."""
        from sglang.srt.layers.radix_attention import AttentionType

        backend.init_forward_metadata(batch)
        shape = Anything(
            layer_id=0, tp_q_head_num=HEADS, tp_k_head_num=KV_HEADS, tp_v_head_num=KV_HEADS, head_dim=DIM,
            v_head_dim=DIM, qk_head_dim=DIM, scaling=DIM**-0.5, logit_cap=0.0, sliding_window_size=-1,
            is_cross_attention=False, attn_type=AttentionType.DECODER,
        )  # fmt: skip
        for name, value in layer.items():
            setattr(shape, name, value)
        return [backend.forward_extend(*batch.values, shape, batch) for _ in range(layers)]

    def _pack(
        self, plan: Any, req_pool_indices: Any, seq_lens: Any, indptr: Any, out: Any, kv_start_idx: Any, kind: Any
    ) -> None:
        starts = iter([0] * len(seq_lens) if kv_start_idx is None else kv_start_idx.tolist())
        for row, tokens, place in zip(req_pool_indices.tolist(), seq_lens.tolist(), indptr.tolist(), strict=False):
            start = next(starts)
            out[place : place + tokens] = self.runner.req_to_token_pool.req_to_token[row, start : start + tokens]

    def _fa3(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, page_table: torch.Tensor,
        cache_seqlens: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float, return_softmax_lse: bool, **others: Any,
    ) -> torch.Tensor:  # fmt: skip
        assert others["out"] is None
        assert not return_softmax_lse
        assert cu_seqlens_q.dtype == cache_seqlens.dtype == torch.int32
        assert len(q) == int(cu_seqlens_q[-1])
        assert len(cache_seqlens) == len(cu_seqlens_q) - 1 == len(page_table)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        out, pairs = torch.full((len(q), HEADS, DIM), math.nan), 0
        for request, (a, b) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
            if a == b:  # not in this tile
                continue
            slots = page_table[request, : int(cache_seqlens[request])].long()
            out[a:b], _ = attend(q[a:b], k_cache[slots, 0], v_cache[slots, 0], causal, window_size[0], softmax_scale,
                                 softcap)  # fmt: skip
            pairs += int(mask(b - a, len(slots), causal, window_size[0]).sum())
        self.runs.append(pairs)
        return out


@pytest.fixture(scope="module", autouse=True)
def names() -> Iterator[None]:
    with kernel_names():
        yield


BACKENDS = ("flashinfer", "fa3")
batches = st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100)), min_size=1, max_size=4)


def least_pairs(lengths: list[tuple[int, int]]) -> int:
    """Pairs of the largest tile that has no more rows than it must have."""
    return max(UNIT_ROWS * (n + b) for n, b in lengths)


# ---- tiles compute what the whole does ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(batches, st.integers(1, 6000), st.booleans(), st.sampled_from([0.0, 20.0]))
def test_tiles_give_what_the_whole_operator_gives(
    name: str, lengths: list[tuple[int, int]], tile_pairs: int, paged: bool, cap: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if paged:
            patch.setenv("SGLANG_FLASHINFER_USE_PAGED", "1")
        rig = Rig(patch, name)
        batch = rig.batch(lengths)
        [whole] = rig.forward(rig.backend(), batch, logit_cap=cap)
        whole_runs = len(rig.runs)
        rig.runs.clear()
        switches: list[int] = []
        tiled = rig.backend(tile_pairs, lambda: switches.append(len(rig.runs)))
        outputs = rig.forward(tiled, batch, layers=2, logit_cap=cap)
        for output in outputs:
            assert torch.allclose(output, whole, atol=1e-5)
            assert not output.isnan().any()
        assert all(pairs <= max(tile_pairs, least_pairs(lengths)) for pairs in rig.runs)
        # Between two tiles of an operator, and nowhere else.
        assert len(switches) == len(rig.runs) - 2 * whole_runs
        assert rig.pool.writes == 3


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(batches, st.integers(1, 3000), st.integers(0, 120), st.booleans())
def test_layers_with_a_window_give_the_same(
    name: str, lengths: list[tuple[int, int]], tile_pairs: int, window: int, paged: bool
) -> None:
    """FA3 tiles them; FlashInfer's run whole where the window counts, and so do SGLang's masks of cached keys."""
    with pytest.MonkeyPatch.context() as patch:
        if paged or name == "fa3":
            patch.setenv("SGLANG_FLASHINFER_USE_PAGED", "1")
        else:
            lengths = [(n, min(b, window)) for n, b in lengths if n + min(b, window) <= window + 1] or [(1, 0)]
        rig = Rig(patch, name, window)
        batch = rig.batch(lengths)
        for layer_window in (window, -1):
            [whole] = rig.forward(rig.backend(), batch, sliding_window_size=layer_window)
            rig.runs.clear()
            [tiled] = rig.forward(rig.backend(tile_pairs), batch, sliding_window_size=layer_window)
            assert torch.allclose(tiled, whole, atol=1e-5)
            if name == "fa3" or layer_window == -1:
                assert all(pairs <= max(tile_pairs, least_pairs(lengths)) for pairs in rig.runs)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_batch_that_is_short_runs_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, name)
    lengths = [(60, 30), (50, 0)]
    new, before = (60, 50), (30, 0)
    # FlashInfer's new and cached keys are two operators.
    pairs = Lengths(new, before if name == "fa3" else (0, 0)).all_pairs
    switches: list[None] = []
    rig.forward(rig.backend(), rig.batch(lengths))
    untiled = list(rig.runs)
    rig.runs.clear()
    rig.forward(rig.backend(pairs, lambda: switches.append(None)), rig.batch(lengths))
    assert rig.runs == untiled
    assert not switches
    rig.forward(rig.backend(pairs - 1, lambda: switches.append(None)), rig.batch(lengths))
    assert switches


@pytest.mark.parametrize("name", BACKENDS)
def test_tiles_of_live_tasks_do_not_disturb_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks switch at every gap between tiles; a slot is used again by a later, different task."""
    rig = Rig(monkeypatch, name)
    lengths = [[(90, 40), (30, 0)], [(100, 0)], [(20, 70), (64, 64), (1, 9)]]
    work = [rig.batch(lengths[0], 0), rig.batch(lengths[1], 2), rig.batch(lengths[2], 3)]
    expected = [rig.forward(rig.backend(), batch) for batch in work]
    hub = greenlet.getcurrent()
    slots = [rig.backend(500, lambda: hub.switch()) for _ in work]
    for turn in range(2):  # each slot first serves one task, then another
        results: dict[int, list[torch.Tensor]] = {}

        def task(number: int, slot: Any, results: dict[int, list[torch.Tensor]] = results) -> None:
            results[number] = rig.forward(slot, work[number], layers=2)

        live = [greenlet(task) for _ in work]
        arguments = [(n, slots[(n + turn) % len(work)]) for n in range(len(work))]
        switches = 0
        while any(not g.dead for g in live):
            for g, args in zip(live, arguments, strict=True):
                if not g.dead:
                    g.switch(*(() if g else args))
                    switches += 1
        assert switches > 40
        for number, outputs in results.items():
            assert all(torch.allclose(output, expected[number][0], atol=1e-5) for output in outputs)


def test_flashinfer_plans_a_tile_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "flashinfer")
    backend = rig.backend(400)
    plans: list[Any] = []
    plan = Module.plan
    monkeypatch.setattr(Module, "plan", lambda self, *args: (plans.append(args[1]), plan(self, *args))[1])
    rig.forward(backend, rig.batch([(100, 50)]), layers=5)
    tile_plans = [workspace for workspace in plans if len(workspace) == flashinfer_tiles.WORKSPACE_BYTES]
    assert len(tile_plans) == len(rig.runs) / 5 > 20
    assert len({workspace.data_ptr() for workspace in tile_plans}) == len(tile_plans)


def test_flashinfer_tiles_are_at_most_as_many_as_there_are_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_tiles, "MOST_TILES", 5)
    rig = Rig(monkeypatch, "flashinfer")
    [whole] = rig.forward(rig.backend(), rig.batch([(100, 100)]))
    rig.runs.clear()
    backend = rig.backend(10)
    for _ in range(2):
        [tiled] = rig.forward(backend, rig.batch([(100, 100)]))
        assert torch.allclose(tiled, whole, atol=1e-5)
    assert 2 <= len(rig.runs) / 2 <= 6  # five tiles, or those of one operator and the other whole


def test_flashinfer_planning_reads_nothing_back_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a plan would copy to the host is there already."""
    rig = Rig(monkeypatch, "flashinfer")
    backend = rig.backend(math.inf)
    host: list[torch.Tensor] = []
    make = flashinfer_tiles.on_host
    monkeypatch.setattr(flashinfer_tiles, "on_host", lambda values: (host.append(make(values)), host[-1])[1])
    asked: list[Any] = []
    to = torch.Tensor.to
    monkeypatch.setattr(
        torch.Tensor, "to",
        lambda self, *args, **named: (asked.append(self) if args == ("cpu",) else None, to(self, *args, **named))[1],
    )  # fmt: skip
    backend.init_forward_metadata(rig.batch([(30, 20), (40, 0)]))
    assert len(asked) == 5  # two in a ragged plan and three in a paged one
    assert {id(tensor) for tensor in asked} <= {id(tensor) for tensor in host}


# ---- what stays whole ---------------------------------------------------------------------------------------------


def test_flashinfer_masks_of_cached_keys_in_a_window_are_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    """A paged plan with a mask is passed on with SGLang's own arguments."""
    rig = Rig(monkeypatch, "flashinfer", window=32)
    backend = rig.backend(100)
    plans: list[tuple[Any, Any]] = []
    paged = backend.prefill_wrappers_paged[0]
    monkeypatch.setattr(type(paged), "begin_forward", lambda self, *args, **named: plans.append((args, named)))
    backend.init_forward_metadata(rig.batch([(60, 80)]))
    (args, named), _ = plans
    assert named["custom_mask"] is not None
    assert args[0].data_ptr() == backend.qo_indptr[0].data_ptr()
    assert args[1].data_ptr() == backend.kv_indptr[0].data_ptr()


@pytest.mark.parametrize("backend", ["cutlass", "cudnn", "fmha_v2"])
def test_flashinfer_kernels_of_other_kinds_run_whole(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "flashinfer")
    slot = rig.backend(100)
    slot.init_forward_metadata(rig.batch([(100, 0)]))
    wrapper = slot.prefill_wrapper_ragged
    wrapper._backend = backend
    whole: list[int] = []
    monkeypatch.setattr(type(wrapper), "forward", lambda self, q, *args, **named: whole.append(len(q)))
    wrapper.forward(torch.zeros(100, HEADS, DIM), causal=True)
    assert whole == [100]


def test_backends_that_cannot_be_tiled_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "triton")
    reason = tile_queries(build("triton", rig.runner), lambda: None, 1.0)
    assert reason is not None
    assert reason.startswith("TritonAttnBackend: ")
    hybrid = type("HybridAttnBackend", (), {})()
    hybrid.prefill_backend = build("triton", rig.runner)
    assert tile_queries(hybrid, lambda: None, 1.0) == reason
    mla = build("fa3", rig.runner)
    mla.use_mla = True
    assert tile_queries(mla, lambda: None, 1.0) == "FlashAttentionBackend: latent attention is not tiled"
    assert "forward_extend" not in vars(mla)


def test_fa3_arguments_that_tiles_do_not_know_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, "fa3")
    calls: list[Any] = []
    backend = rig.backend()
    backend.forward_extend = lambda q, *args, **named: calls.append((len(q), named))
    assert tile_queries(backend, lambda: None, 100) is None
    batch = rig.batch([(100, 0)])
    backend.init_forward_metadata(batch)
    layer = Anything(sliding_window_size=-1, tp_q_head_num=HEADS)
    backend.forward_extend(*batch.values, layer, batch, return_lse=True)
    assert calls == [(100, {"return_lse": True})]
