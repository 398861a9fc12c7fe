"""Which rows of a batch make a tile of attention on a GPU.

A tile is a run of consecutive rows of a batch, each over all its keys, so tiles compute what the whole operator would.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

BLOCK_ROWS: Final = 128
"""Rows of a head that one thread block computes (FlashAttention-3, and FlashInfer's kernels of both kinds)."""


@dataclass(frozen=True)
class Segment:
    """Rows of one request within a tile."""

    request: int
    start: int
    """First of them, counted from the request's first new token."""
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


Tile = tuple[Segment, ...]


@dataclass(frozen=True)
class Lengths:
    """What one attention operator computes, for each request of the batch."""

    new: tuple[int, ...]
    """Query rows."""
    before: tuple[int, ...]
    """Keys that each of them sees, besides new ones."""
    causal: bool = True
    """Whether a row sees the new keys up to its own too; if not, it sees no new keys."""
    window: int | None = None
    """Keys before its own that a row sees; None: all."""

    def pairs(self, segment: Segment) -> int:
        """Pairs of a query and a key."""
        before = self.before[segment.request]
        if not self.causal:
            return segment.rows * before
        first, last = before + segment.start + 1, before + segment.stop  # keys of the first and of the last row
        if self.window is None or last <= self.window + 1:
            return (first + last) * segment.rows // 2
        whole_window = min(segment.rows, last - self.window)
        growing = segment.rows - whole_window
        return whole_window * (self.window + 1) + (2 * first + growing - 1) * growing // 2

    @property
    def all_pairs(self) -> int:
        return sum(self.pairs(Segment(request, 0, rows)) for request, rows in enumerate(self.new))


def cut(lengths: Lengths, most_pairs: float, unit_rows: int = BLOCK_ROWS, most_blocks: float = math.inf) -> list[Tile]:
    """Tiles of at most ``most_pairs`` pairs and ``most_blocks`` blocks, but at least ``unit_rows`` rows, of whose
    multiples they are made. A tile that holds rows of several requests holds those between them whole.
    """
    tiles: list[Tile] = []
    tile: list[Segment] = []
    pairs = blocks = 0
    for request, rows in enumerate(lengths.new):
        for start in range(0, rows, unit_rows):
            unit = Segment(request, start, min(start + unit_rows, rows))
            unit_pairs, unit_blocks = lengths.pairs(unit), -(-unit.rows // BLOCK_ROWS)
            if tile and (pairs + unit_pairs > most_pairs or blocks + unit_blocks > most_blocks):
                tiles.append(tuple(tile))
                tile, pairs, blocks = [], 0, 0
            if tile and tile[-1].request == request:
                tile[-1] = Segment(request, tile[-1].start, unit.stop)
            else:
                tile.append(unit)
            pairs, blocks = pairs + unit_pairs, blocks + unit_blocks
    if tile:
        tiles.append(tuple(tile))
    return tiles


def unit_rows(heads: int, device: torch.device) -> int:
    """Rows whose blocks, one for each head, fill the device once: fewer would take as long as these."""
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    return BLOCK_ROWS * max(1, cores // heads)
