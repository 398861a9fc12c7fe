"""SGLang's FlashAttention-3 backend in query tiles.

Its kernel takes the queries of a batch by ``cu_seqlens_q`` and reads all keys from the pool, with the causal mask
aligned to the end of ``cache_seqlens``. So a tile is the backend's own ``forward_extend`` with these two set for the
tile; requests outside of it have no rows. No plan is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from sgl_flowprefill.runtime.query_tiles import Lengths, cut, unit_rows


@dataclass(frozen=True)
class _MetadataTile:
    rows: slice
    metadata: Any
    """SGLang's FlashAttentionMetadata of these rows."""


class FA3Tiles:
    """The tiles of one backend, thus of one live task."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._metadata: Any = None
        """The batch's, for which the tiles were made."""
        self._tiles: dict[int | None, list[_MetadataTile]] = {}
        """By the window of a layer."""

    def install(self) -> str | None:
        """Take the place of what SGLang calls; if this backend cannot be tiled, why."""
        backend = self._backend
        if backend.use_mla:
            return "latent attention is not tiled"
        if backend.fa_impl_ver != 3 or backend.fa_skip_kv_cache or backend._kv_shard_pool is not None:
            return "only FlashAttention 3 on a KV cache that is not sharded is tiled"
        self._forward_extend = backend.forward_extend
        backend.forward_extend = self.forward_extend
        return None

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> Any:
        """``FlashAttentionBackend.forward_extend``, in tiles where the batch has tiles."""
        if sinks is not None:
            others["sinks"] = sinks
        tiles = self._tiles_of(layer, forward_batch) if others.keys() <= {"sinks"} else []
        if len(tiles) < 2:
            return self._forward_extend(q, k, v, layer, forward_batch, save_kv_cache, **others)
        backend, output = self._backend, None
        for tile in tiles:
            if output is not None:
                backend.between_tiles()
            backend.forward_metadata = tile.metadata
            try:
                part = self._forward_extend(q[tile.rows], k, v, layer, forward_batch, save_kv_cache, **others)
            finally:
                backend.forward_metadata = self._metadata
            # The first tile has stored the keys and values of all.
            k = v = None
            if output is None:
                output = part.new_empty((len(q), *part.shape[1:]))
            output[tile.rows] = part
        return output

    def _tiles_of(self, layer: Any, forward_batch: Any) -> list[_MetadataTile]:
        """The tiles of an operator; none if it runs whole."""
        from sglang.srt.layers.attention.flashattention_backend import is_cp_active
        from sglang.srt.layers.radix_attention import AttentionType

        backend = self._backend
        metadata = backend.forward_metadata
        if (
            not forward_batch.forward_mode.is_extend_without_speculative()
            or layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or metadata.local_attn_metadata is not None
            or metadata.image_token_ranges is not None
            or getattr(forward_batch, "_attn_output", None) is not None
            or is_cp_active(forward_batch)
        ):
            return []
        if self._metadata is not metadata:
            self._metadata, self._tiles = metadata, {}
        window = layer.sliding_window_size
        window = window if window is not None and window > -1 else None
        if window not in self._tiles:
            lengths = Lengths(
                tuple(forward_batch.extend_seq_lens_cpu), tuple(forward_batch.extend_prefix_lens_cpu), window=window
            )
            self._tiles[window] = self._cut(lengths, layer, metadata)
        return self._tiles[window]

    def _cut(self, lengths: Lengths, layer: Any, metadata: Any) -> list[_MetadataTile]:
        tile_pairs = self._backend.tile_pairs
        if lengths.all_pairs <= tile_pairs:
            return []
        device = metadata.cu_seqlens_q.device
        tiles = []
        row = 0
        for tile in cut(lengths, tile_pairs, unit_rows(layer.tp_q_head_num, device)):
            rows = [0] * len(lengths.new)
            # Keys of a request with no rows here are not read, but one must be there.
            keys = [1] * len(lengths.new)
            for segment in tile:
                rows[segment.request] = segment.rows
                keys[segment.request] = lengths.before[segment.request] + segment.stop
            starts = [0, *accumulate(rows)]
            own = replace(
                metadata,
                cu_seqlens_q=_on(device, starts),
                cache_seqlens_int32=_on(device, keys),
                max_seq_len_q=max(rows),
            )
            tiles.append(_MetadataTile(slice(row, row + starts[-1]), own))
            row += starts[-1]
        return tiles


def _on(device: torch.device, values: list[int]) -> torch.Tensor:
    """Copied to ``device`` without waiting for it."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda").to(device, non_blocking=True)
