"""Attention in query tiles: which of SGLang's backends run it so, and how each is made to.

``platforms.attention`` tiles its queries itself; backends for GPUs do not, and are taught it from outside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol, runtime_checkable

from sgl_flowprefill.runtime.fa3_tiles import FA3Tiles
from sgl_flowprefill.runtime.flashinfer_tiles import FlashInferTiles

_INNER: Final = {"HybridAttnBackend": "prefill_backend", "HybridLinearAttnBackend": "full_attn_backend"}
"""SGLang's backends that hand attention of prefills on to another."""

_TILES: Final[dict[str, type[FlashInferTiles] | type[FA3Tiles]]] = {
    "FlashInferAttnBackend": FlashInferTiles,
    "FlashAttentionBackend": FA3Tiles,
}
"""By the exact class: their subclasses compute something else."""

_WHOLE: Final = {"TritonAttnBackend": "its kernel reads new keys from the rows of its queries"}


@runtime_checkable
class TiledAttention(Protocol):
    """An attention backend that works in query tiles and lets others run between them."""

    between_tiles: Callable[[], None]
    tile_pairs: float
    """Most pairs of a query and a key in a tile."""


def tile_queries(backend: Any, between_tiles: Callable[[], None], tile_pairs: float) -> str | None:
    """Let ``backend`` run attention over the prompts of a prefill in tiles of at most ``tile_pairs`` pairs of a query
    and a key, with ``between_tiles`` called between them. If it cannot, it stays as it is: why.
    """
    backend = prefill_backend(backend)
    name = type(backend).__name__
    if not isinstance(backend, TiledAttention):
        reason = _TILES[name](backend).install() if name in _TILES else _WHOLE.get(name, "it is not known how")
        if reason is not None:
            return f"{name}: {reason}"
    backend.between_tiles = between_tiles
    backend.tile_pairs = tile_pairs
    return None


def prefill_backend(backend: Any) -> Any:
    """The backend that computes attention of prefills inside ``backend``."""
    while type(backend).__name__ in _INNER:
        backend = getattr(backend, _INNER[type(backend).__name__])
    return backend
