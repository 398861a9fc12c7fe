"""Attention backend of the portable CPU platform, on PyTorch's fused CPU attention kernel.

Queries run in tiles of at most ``QUERY_TILE_TOKENS`` rows, fewer where there are so many keys that a tile would block
for too long. A tile sees its keys in two parts, each of which needs no mask tensor: every key before the tile (not
causal), and the keys of the tile itself (causal). The outputs of both are merged by their log-sum-exps, which is exact.
Cached prefixes are only ever keys: no query of a prefix is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from sglang.srt.layers.attention.attention_registry import register_attention_backend
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sgl_flowprefill.platforms import ATTENTION_BACKEND

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

QUERY_TILE_TOKENS: Final = 256
"""Query rows of a tile: the most that attention computes at a time, and what bounds its memory."""

_LEAST_TILE_TOKENS: Final = 32
"""Query rows that the fused kernel computes at a time anyway: fewer would take as long."""

MAX_SCORES_BYTES: Final = 64 << 20
"""Bound on the score matrix of layers that the fused kernel cannot serve (sliding window, logit cap)."""

_MIN_RUN_TOKENS: Final = 64
"""A leading run of adjacent KV slots of at least this length is read in place instead of being gathered."""


def register() -> None:
    """Make the backend known to SGLang under its name. Called in each worker process."""
    register_attention_backend(ATTENTION_BACKEND)(PortableCpuAttention)


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class QueryRows:
    """One request's rows in the batch and its keys in the pool."""

    query_start: int
    query_tokens: int
    slots: torch.Tensor
    """[kv_tokens] KV slot of every token, cached prefix first."""
    run_tokens: int
    """How many leading slots are adjacent, so that their keys can be read in place."""


class PortableCpuAttention(AttentionBackend):
    """Causal attention of decoder layers for prefill, chunked prefill and decode.

    The batch's state is in ``forward_metadata``, one list of sequences, so that tasks that are live at the same time
    each use an instance of their own. Raises ValueError for models, and NotImplementedError for layers, whose
    attention is not served here.
    """

    def __init__(self, model_runner: ModelRunner, query_tile_tokens: int = QUERY_TILE_TOKENS) -> None:
        super().__init__()
        if model_runner.use_mla_backend:
            attend_to_latents()
        if model_runner.model_config.is_encoder_decoder:
            raise ValueError(f"--attention-backend {ATTENTION_BACKEND} does not serve encoder-decoder models")
        if isinstance(model_runner.token_to_kv_pool, SWAKVPool):
            raise ValueError(
                f"--attention-backend {ATTENTION_BACKEND} serves sliding-window models only with "
                "--disable-hybrid-swa-memory"
            )
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.query_tile_tokens = query_tile_tokens
        self.forward_metadata: list[QueryRows] = []
        self.between_tiles: Callable[[], None] = _nothing
        """Called after each query tile of a prefill; whoever sets it may let another forward run there."""
        self.tile_pairs: float = math.inf
        """Most pairs of a query row and a key in one tile, which bounds its time; whoever runs it knows the time."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Find the KV slots of every request of the batch. SGLang calls it once before each forward."""
        mode = forward_batch.forward_mode
        if mode.is_target_verify() or mode.is_draft_extend_v2():
            raise NotImplementedError(f"--attention-backend {ATTENTION_BACKEND} does not serve speculative decoding")
        if mode.is_idle():  # rows that make a joint step as long at this rank as at others attend to nothing
            self.forward_metadata = []
            return
        kv_lens: list[int] = forward_batch.seq_lens_cpu.tolist()
        query_lens = [1] * len(kv_lens) if mode.is_decode() else list(forward_batch.extend_seq_lens_cpu)
        pool_indices = forward_batch.req_pool_indices.tolist()
        sequences = []
        start = 0
        for pool_index, query_tokens, kv_tokens in zip(pool_indices, query_lens, kv_lens, strict=True):
            slots = self.req_to_token_pool.req_to_token[pool_index, :kv_tokens]
            sequences.append(QueryRows(start, query_tokens, slots, _leading_run(slots)))
            start += query_tokens
        self.forward_metadata = sequences

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> torch.Tensor:
        """Attend from the new tokens to prefix and new tokens. q [tokens, heads * dim] to [tokens, heads * v_dim].

        ``sinks`` [heads] are logits of a key without a value, which takes its share of every query's attention. A
        sequence with one new token, such as a stream in a mixed chunk, is computed as in a decode step.
        """
        queries, output, keys, values = self._prepare(q, k, v, layer, forward_batch, save_kv_cache, unsupported)
        window, fused = _window(layer), _is_fused(layer)
        for sequence in self.forward_metadata:
            if sequence.query_tokens == 1 and fused and sinks is None:
                _attend_row(queries, keys, values, output, sequence, layer)
                self.between_tiles()
                continue
            rows = slice(sequence.query_start, sequence.query_start + sequence.query_tokens)
            sequence_keys = gather(keys, sequence, q.dtype)
            sequence_values = gather(values, sequence, q.dtype)
            if fused:
                attend_causal(
                    queries[rows],
                    sequence_keys,
                    sequence_values,
                    output[rows],
                    layer.scaling,
                    self.query_tile_tokens,
                    self.between_tiles,
                    sinks,
                    self.tile_pairs,
                )
            else:
                attend_windowed(
                    queries[rows],
                    sequence_keys,
                    sequence_values,
                    output[rows],
                    layer.scaling,
                    self.query_tile_tokens,
                    window,
                    layer.logit_cap,
                    self.between_tiles,
                    sinks,
                    self.tile_pairs,
                )
        return output.flatten(1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **unsupported: Any,
    ) -> torch.Tensor:
        """Attend from one token per request. q [requests, heads * dim] to [requests, heads * v_dim]."""
        if not _is_fused(layer) or sinks is not None:
            return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache, sinks, **unsupported)
        queries, output, keys, values = self._prepare(q, k, v, layer, forward_batch, save_kv_cache, unsupported)
        for sequence in self.forward_metadata:
            _attend_row(queries, keys, values, output, sequence, layer)
        return output.flatten(1)

    def support_triton(self) -> bool:
        """No Triton kernels on this device."""
        return False

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Padding value of sequence lengths; no graph is ever captured here."""
        return 1

    def _prepare(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
        unsupported: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Refuse what would be wrong, store the new keys and values; queries, output, key and value buffers."""
        _check_layer(layer, unsupported)
        if save_kv_cache and k is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        return (
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            q.new_empty(q.shape[0], layer.tp_q_head_num, layer.v_head_dim),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
        )


def _attend_row(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    sequence: QueryRows,
    layer: RadixAttention,
) -> None:
    """Attention of a sequence with one new token, written to its row of ``output``. Keys and values are the pool's: the
    leading run of adjacent slots is read in place, and only what lies behind it is gathered."""
    row = slice(sequence.query_start, sequence.query_start + 1)
    folded = _fold(queries[row], layer.tp_k_head_num)
    split = sequence.run_tokens if sequence.run_tokens >= _MIN_RUN_TOKENS else 0
    dtype, out = queries.dtype, None
    if split:
        first = int(sequence.slots[0])
        run = slice(first, first + split)
        out, lse = _attend(folded, keys[run].to(dtype), values[run].to(dtype), layer.scaling)
    if split < len(sequence.slots):
        rest = sequence.slots[split:]
        rest_out, rest_lse = _attend(folded, keys[rest].to(dtype), values[rest].to(dtype), layer.scaling)
        out = rest_out if out is None else _merge(out, lse, rest_out, rest_lse)
    assert out is not None
    output[row] = _unfold(out, 1)


def attend_causal(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    tile_tokens: int = QUERY_TILE_TOKENS,
    between_tiles: Callable[[], None] = _nothing,
    sinks: torch.Tensor | None = None,
    tile_pairs: float = math.inf,
) -> None:
    """Causal attention of the last ``len(queries)`` tokens of one sequence, written to ``output``.

    queries and output [new, heads, dim], keys and values [prefix + new, kv_heads, dim]. Consecutive groups of
    heads / kv_heads query heads share a key head. A tile's keys before it are read once per group, not per head.
    """
    kv_heads = keys.shape[1]
    prefix = len(keys) - len(queries)
    for start, rows in query_tiles(len(queries), prefix, len(keys), tile_tokens, tile_pairs):
        tile = queries[start : start + rows]
        before = prefix + start
        own = slice(before, before + len(tile))
        out, lse = _attend_own(tile, keys[own], values[own], scale)
        if before:
            earlier_out, earlier_lse = _attend(_fold(tile, kv_heads), keys[:before], values[:before], scale)
            earlier_lse = earlier_lse.view(lse.shape)
            out = _merge(out, lse, earlier_out.view(*lse.shape, -1), earlier_lse)
            if sinks is not None:
                lse = torch.logaddexp(lse, earlier_lse)
        if sinks is not None:
            share = torch.sigmoid(lse - sinks.to(lse.dtype).view(kv_heads, -1, 1))
            out = out * share[..., None].to(out.dtype)
        output[start : start + len(tile)] = out.permute(2, 0, 1, 3).flatten(1, 2)
        between_tiles()


def attend_windowed(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    output: torch.Tensor,
    scale: float,
    tile_tokens: int = QUERY_TILE_TOKENS,
    window_tokens: int | None = None,
    logit_cap: float = 0.0,
    between_tiles: Callable[[], None] = _nothing,
    sinks: torch.Tensor | None = None,
    tile_pairs: float = math.inf,
) -> None:
    """``attend_causal`` with a sliding window (a query sees that many keys before its own), a logit cap (tanh), or
    values whose dimension is not that of the keys. Scores are materialised, one bounded tile at a time.
    """
    heads, kv_heads = queries.shape[1], keys.shape[1]
    prefix = len(keys) - len(queries)
    span = len(keys) if window_tokens is None else min(len(keys), window_tokens + tile_tokens)
    most_rows = max(1, min(tile_tokens, MAX_SCORES_BYTES // (heads * span * 4)))
    for start, rows in query_tiles(len(queries), prefix, span, most_rows, tile_pairs):
        tile = queries[start : start + rows]
        first = prefix + start
        end = first + len(tile)
        begin = 0 if window_tokens is None else max(0, first - window_tokens)
        tile_keys = keys[begin:end].permute(1, 2, 0)
        tile_values = values[begin:end].transpose(0, 1)
        scores = torch.matmul(_fold(tile, kv_heads)[:, 0], tile_keys).float() * scale
        if logit_cap:
            scores = logit_cap * torch.tanh(scores / logit_cap)
        query_positions = torch.arange(first, end)[:, None]
        key_positions = torch.arange(begin, end)[None, :]
        hidden = key_positions > query_positions
        if window_tokens is not None:
            hidden |= key_positions < query_positions - window_tokens
        scores = scores.view(kv_heads, -1, len(tile), end - begin).masked_fill_(hidden, float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : end - begin].to(values.dtype).flatten(1, 2)
        output[start : start + len(tile)] = _unfold(torch.matmul(weights, tile_values)[:, None], len(tile))
        between_tiles()


def query_tiles(
    queries: int, prefix: int, most_keys: int, most_rows: int, most_pairs: float
) -> Iterator[tuple[int, int]]:
    """First row and rows of each query tile: fewer, the more keys they see."""
    start = 0
    while start < queries:
        keys = min(most_keys, prefix + start + most_rows)
        by_time = max(_LEAST_TILE_TOKENS, most_pairs / keys)
        rows = min(most_rows, queries - start, int(min(by_time, most_rows)))
        yield start, rows
        start += rows


def _attend(
    folded: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unmasked attention. folded [kv_heads, 1, rows, dim]; output alike and log-sum-exps [kv_heads, 1, rows]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        folded, keys.transpose(0, 1)[:, None], values.transpose(0, 1)[:, None], scale=scale
    )
    return out, lse


def _attend_own(
    tile: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of a tile to itself. Output [kv_heads, group, rows, dim], log-sum-exps without dim."""
    kv_heads = keys.shape[1]
    grouped = tile.view(len(tile), kv_heads, -1, tile.shape[-1]).permute(1, 2, 0, 3)
    shape = grouped.shape
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped,
        keys.transpose(0, 1)[:, None].expand(shape),
        values.transpose(0, 1)[:, None].expand(shape),
        is_causal=True,
        scale=scale,
    )
    return out, lse


def _merge(out: torch.Tensor, lse: torch.Tensor, other: torch.Tensor, other_lse: torch.Tensor) -> torch.Tensor:
    """Attention over two disjoint sets of keys, from the attention over each."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    if out.dtype == share.dtype:
        return torch.lerp(out, other, share)
    return torch.lerp(out.to(share.dtype), other.to(share.dtype), share).to(out.dtype)


def _fold(tile: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[rows, heads, dim] to [kv_heads, 1, group * rows, dim]: the heads that share keys become rows."""
    rows, heads, dim = tile.shape
    return tile.view(rows, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, 1, -1, dim)


def _unfold(out: torch.Tensor, rows: int) -> torch.Tensor:
    """Inverse of ``_fold``."""
    kv_heads, _, _, dim = out.shape
    return out.reshape(kv_heads, -1, rows, dim).permute(2, 0, 1, 3).flatten(1, 2)


def gather(buffer: torch.Tensor, sequence: QueryRows, dtype: torch.dtype) -> torch.Tensor:
    """[kv_tokens, kv_heads, dim] of one sequence; a view of the pool where its slots are adjacent."""
    if sequence.run_tokens == len(sequence.slots):
        first = int(sequence.slots[0])
        return buffer[first : first + sequence.run_tokens].to(dtype)
    return buffer[sequence.slots].to(dtype)


def _leading_run(slots: torch.Tensor) -> int:
    """Length of the leading run of adjacent slots."""
    breaks = (slots[1:] - slots[:-1]) != 1
    return int(breaks.to(torch.uint8).argmax()) + 1 if bool(breaks.any()) else len(slots)


def attend_to_latents() -> None:
    """Let SGLang's latent attention (MLA) attend to the latents themselves, which the pool keeps as one key head.

    The other form of latent attention, with keys and values of every head, stores latents by a Triton kernel
    (``mem_cache/memory_pool.py``, ``MLATokenToKVPool._scatter_mla_rows``).
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register(ATTENTION_BACKEND, lambda attention, batch: AttnForwardMethod.MLA)


def _is_fused(layer: RadixAttention) -> bool:
    """Whether the fused kernel serves this layer."""
    return _window(layer) is None and not layer.logit_cap and layer.qk_head_dim == layer.v_head_dim


def _window(layer: RadixAttention) -> int | None:
    """Keys before its own that a query of this layer sees, None for all of them."""
    window = layer.sliding_window_size
    return window if window is not None and window > -1 else None


def _check_layer(layer: RadixAttention, unsupported: dict[str, Any]) -> None:
    """Raise NotImplementedError for attention that would come out wrong here."""
    reasons = [
        (layer.is_cross_attention, "cross attention"),
        (layer.attn_type != AttentionType.DECODER, f"attention type {layer.attn_type}"),
        (layer.logit_cap and layer.logit_capping_method != "tanh", f"logit capping {layer.logit_capping_method}"),
        (layer.xai_temperature_len > 0, "attention temperature"),
        *((value is not None, f"attention argument {name!r}") for name, value in unsupported.items()),
    ]
    for applies, reason in reasons:
        if applies:
            raise NotImplementedError(
                f"--attention-backend {ATTENTION_BACKEND} does not serve {reason} (layer {layer.layer_id}); "
                "choose another with --attention-backend torch_native"
            )
