"""FlashInfer's prefill wrappers in query tiles, below SGLang's backend, which stays as it is.

SGLang (``FlashInferAttnBackend``) attends to the new keys with a ragged wrapper, and to the keys of a cached prefix
with a paged one, whose outputs it merges; or to both with the paged one. Each wrapper is made to run in tiles: what it
is asked to plan for the batch it also plans for each tile, when the first layer comes to it, and every layer then runs
the tiles one by one. A tile's run is complete, the merge of its split keys included, before ``between_tiles`` lets
another task use the float workspace.

Planning reads nothing back from the device here: lengths are known on the host, so their copies there are handed over.
Nothing therefore waits before a plan overwrites the pinned memory of the one before it, whose copy may be queued. It is
not: a slot plans for the next task when all that the last one queued has run. (With sliding windows SGLang plans the
ragged wrapper twice, and alike.)
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

import torch

from sgl_flowprefill.runtime.query_tiles import BLOCK_ROWS, Lengths, Tile, cut, unit_rows

WORKSPACE_BYTES: Final = 64 << 10
"""Integer workspace of a tile's plan."""
MOST_TILES: Final = 128
"""Tiles of all operators of a task together, which bounds the workspaces of an attention slot."""
_PLAN_BYTES: Final = 8 << 10
"""Part of a plan that does not depend on its rows: indices for each multiprocessor, and alignment."""

_TILED_BACKENDS: Final = ("fa2", "fa3")
"""FlashInfer's own kernels, in which causal masks are aligned to the ends of queries and keys."""


@dataclass
class _PlannedTile:
    """Some rows of a batch, with a wrapper that is planned for them when they are first run."""

    tile: Tile
    rows: slice
    keys: slice
    """Range in the new keys (ragged) or in the list of KV slots (paged)."""
    indptr: tuple[list[int], list[int]]
    """First row and first key of each segment, and the ends."""
    workspace: torch.Tensor
    wrapper: Any = None


class FlashInferTiles:
    """The tiles of one backend, thus of one live task."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend
        self._batch: Any = None
        """The batch whose metadata is being made."""
        self._workspaces: Sequence[torch.Tensor] = ()
        self._free: Sequence[torch.Tensor] = self._workspaces
        """Workspaces that no tile of the batch has."""

    def install(self) -> str | None:
        """Take the place of what SGLang calls; if this backend cannot be tiled, why."""
        backend = self.backend
        if backend.is_dllm_model or backend.prefill_uses_dequant_workspace:
            return "diffusion models and FP4 KV cache are not tiled"
        if getattr(backend.dispatch_reason, "name", None) == "CROSS_ATTENTION":
            return "cross attention is not tiled"
        updater = backend.indices_updater_prefill
        heads = updater.num_qo_heads
        self.float_workspace: torch.Tensor = backend.workspace_buffer
        device = self.float_workspace.device
        # Indices of a block: seven for each head with the kernels for Hopper; with the others at most three for each
        # head, and one for each row.
        block_bytes = 4 * (7 * heads + BLOCK_ROWS)
        self.most_blocks = (WORKSPACE_BYTES - _PLAN_BYTES) // block_bytes
        self.unit_rows = min(unit_rows(heads, device), self.most_blocks * BLOCK_ROWS)
        whole = torch.empty(MOST_TILES * WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._workspaces = whole.split(WORKSPACE_BYTES)
        self._ragged = _TiledWrapper(self, backend.prefill_wrapper_ragged, ragged=True)
        self._paged = {id(wrapper): _TiledWrapper(self, wrapper) for wrapper in backend.prefill_wrappers_paged}
        self._init_forward_metadata = backend.init_forward_metadata
        self._call_begin_forward = updater.call_begin_forward
        backend.init_forward_metadata = self.init_forward_metadata
        updater.call_begin_forward = self.call_begin_forward
        return None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """``FlashInferAttnBackend.init_forward_metadata``: plans for a batch."""
        self._free = self._workspaces
        self._batch = forward_batch if forward_batch.forward_mode.is_extend_without_speculative() else None
        try:
            self._init_forward_metadata(forward_batch)
        finally:
            self._batch = None

    def call_begin_forward(
        self,
        wrapper_ragged: Any,
        wrapper_paged: Any,
        req_pool_indices: torch.Tensor,
        paged_kernel_lens: torch.Tensor,
        paged_kernel_lens_sum: int,
        seq_lens: torch.Tensor,
        prefix_lens: torch.Tensor | None,
        *args: Any,
        **named: Any,
    ) -> None:
        """``FlashInferIndicesUpdaterPrefill.call_begin_forward``, with the batch's lengths where they are known."""
        paged = self._paged.get(id(wrapper_paged))
        self._ragged.lengths = None
        if paged is not None:
            paged.lengths = None
        if self._batch is not None and paged is not None:
            new = tuple(self._batch.extend_seq_lens_cpu)
            before = tuple(self._batch.extend_prefix_lens_cpu)
            self._ragged.lengths = (new, new)
            if paged_kernel_lens is prefix_lens:
                paged.lengths = (new, before)
            elif paged_kernel_lens is seq_lens:
                paged.lengths = (new, tuple(n + b for n, b in zip(new, before, strict=True)))
            # Else the keys are those that sliding windows reach, whose number only the device knows.
        self._call_begin_forward(
            wrapper_ragged,
            wrapper_paged,
            req_pool_indices,
            paged_kernel_lens,
            paged_kernel_lens_sum,
            seq_lens,
            prefix_lens,
            *args,
            **named,
        )

    def cut(self, lengths: Lengths) -> list[tuple[Tile, torch.Tensor]]:
        """Tiles of an operator, each with its workspace; none if it is short. Larger ones if they would be too many."""
        most_pairs, all_pairs = self.backend.tile_pairs, lengths.all_pairs
        while most_pairs < all_pairs:
            tiles = cut(lengths, most_pairs, self.unit_rows, self.most_blocks)
            if len(tiles) <= len(self._free):
                workspaces, self._free = self._free[: len(tiles)], self._free[len(tiles) :]
                return list(zip(tiles, workspaces, strict=True))
            most_pairs *= 1.25
        return []


class _TiledWrapper:
    """Stands before the three methods of a FlashInfer wrapper that SGLang calls."""

    def __init__(self, owner: FlashInferTiles, wrapper: Any, ragged: bool = False) -> None:
        self.lengths: tuple[tuple[int, ...], tuple[int, ...]] | None = None
        """New tokens and keys of each request, for the next plan."""
        self._owner = owner
        self._ragged = ragged
        self._wrapper = wrapper
        self._template = copy.copy(wrapper)  # its own methods, and none of its plans
        self._plan: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        """Arguments of a plan for which tiles can be planned alike."""
        self._planned_lengths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._tiles: dict[bool, list[_PlannedTile]] = {}
        """By whether attention is causal, which only a run tells."""
        wrapper.begin_forward = self.begin_forward
        wrapper.forward = self.forward
        wrapper.forward_return_lse = self.forward_return_lse

    def begin_forward(self, qo_indptr: torch.Tensor, kv_indptr: torch.Tensor, *args: Any, **named: Any) -> None:
        """Plan the whole batch, as SGLang asks; that serves all batches that are not too long."""
        begin = type(self._wrapper).begin_forward
        self._tiles = {}
        self._plan = None
        masked = named.get("custom_mask") is not None or named.get("prefix_len_ptr") is not None
        if self.lengths is None or not all(self.lengths[0]) or masked:
            begin(self._wrapper, qo_indptr, kv_indptr, *args, **named)
            return
        self._planned_lengths = new, keys = self.lengths
        if not self._ragged:
            kv_indices, _, *rest = args
            args = (kv_indices, on_host([1] * len(new)), *rest)
        begin(self._wrapper, on_host(_starts(new)), on_host(_starts(keys)), *args, **named)
        self._plan = (args, named)

    def forward(self, q: torch.Tensor, *keys_and_values: Any, **options: Any) -> torch.Tensor:
        output: torch.Tensor = self._run("forward", q, keys_and_values, options)
        return output

    def forward_return_lse(
        self, q: torch.Tensor, *keys_and_values: Any, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output: tuple[torch.Tensor, torch.Tensor] = self._run("forward_return_lse", q, keys_and_values, options)
        return output

    def _run(self, method: str, q: torch.Tensor, keys_and_values: tuple[Any, ...], options: dict[str, Any]) -> Any:
        run = getattr(type(self._wrapper), method)
        tiles = self._tiles_of(options)
        if len(tiles) < 2:
            return run(self._wrapper, q, *keys_and_values, **options)
        outputs: list[torch.Tensor] = []
        for tile in tiles:
            if tile.wrapper is None:  # before the gap is recorded, which an aborted task is waited for
                tile.wrapper = self._planned(tile)
            if tile is not tiles[0]:
                self._owner.backend.between_tiles()
            own = tuple(value[tile.keys] for value in keys_and_values) if self._ragged else keys_and_values
            parts = run(tile.wrapper, q[tile.rows], *own, **options)
            parts = parts if isinstance(parts, tuple) else (parts,)
            if not outputs:
                outputs = [part.new_empty((len(q), *part.shape[1:])) for part in parts]
            for output, part in zip(outputs, parts, strict=True):
                output[tile.rows] = part
        return tuple(outputs) if len(outputs) > 1 else outputs[0]

    def _tiles_of(self, options: dict[str, Any]) -> list[_PlannedTile]:
        """The tiles of an operator; none if it runs whole."""
        window = options.get("window_left", -1)
        if self._plan is None or window >= 0 or self._wrapper._backend not in _TILED_BACKENDS:
            return []
        causal = bool(options.get("causal", False))
        if causal not in self._tiles:
            self._tiles[causal] = self._cut(causal)
        return self._tiles[causal]

    def _cut(self, causal: bool) -> list[_PlannedTile]:
        """Where the tiles lie in what requests have one after the other. What a tile reads is consecutive, because only
        its last segment ends before its request does.
        """
        new, keys = self._planned_lengths
        before = tuple(k - n for n, k in zip(new, keys, strict=True)) if causal else keys
        row_starts, key_starts = _starts(new), _starts(keys)
        planned = []
        for tile, workspace in self._owner.cut(Lengths(new, before, causal)):
            row, key = row_starts[tile[0].request] + tile[0].start, key_starts[tile[0].request]
            rows = _starts([segment.rows for segment in tile])
            seen = _starts([before[s.request] + s.stop if causal else keys[s.request] for s in tile])
            planned.append(
                _PlannedTile(tile, slice(row, row + rows[-1]), slice(key, key + seen[-1]), (rows, seen), workspace)
            )
        return planned

    def _planned(self, tile: _PlannedTile) -> Any:
        """A wrapper with a plan of its own for ``tile``."""
        assert self._plan is not None
        args, named = self._plan
        wrapper = copy.copy(self._template)
        wrapper.reset_workspace_buffer(self._owner.float_workspace, tile.workspace)
        if not self._ragged:
            kv_indices, last_page_len, *rest = args
            first = tile.tile[0].request
            args = (kv_indices[tile.keys], last_page_len[first : first + len(tile.tile)], *rest)
        rows, keys = (on_host(starts) for starts in tile.indptr)
        wrapper.begin_forward(rows, keys, *args, **named)
        return wrapper


def _starts(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def on_host(values: Sequence[int]) -> torch.Tensor:
    """On the host, from where it can be copied to the device without waiting for it."""
    return torch.tensor(values, dtype=torch.int32, pin_memory=torch.cuda.is_available())
