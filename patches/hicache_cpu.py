"""The hierarchical cache on the portable CPU platform: host memory that is not registered with CUDA, and plain copies.

Targets: ``ALLOC_MEMORY_FUNCS`` (mem_cache/pool_host/common.py), SGLang's own table of how each type of device allocates
host pools, which has no entry for "cpu" and falls back to ``cudaHostRegister``; and ``transfer_kv_direct`` in the
modules of both host pools, which they import from sgl-kernel on CUDA, ROCm and XPU only. Without this seam a server
with ``--enable-hierarchical-cache`` fails at start. And ``HICACHE_HOST_MEMORY_RESERVE_BYTES``: SGLang leaves 10 GiB of
host memory free, more than a small machine has. And ``get_dummy_flat_data_page`` of these pools, the memory into which
a page is read from storage, which they pin: without this seam, nothing is ever read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "hicache_cpu"
ALLOCATORS: Final = "sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS"
ALLOCATOR: Final = "sglang.srt.mem_cache.pool_host.common.alloc_with_host_register"
RESERVE: Final = "sglang.srt.mem_cache.pool_host.base.HICACHE_HOST_MEMORY_RESERVE_BYTES"
RESERVED_BYTES: Final = 1 << 30
POOLS: Final = (
    "sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost",
    "sglang.srt.mem_cache.pool_host.mla.MLATokenToKVPoolHost",
)
COPY: Final = "transfer_kv_direct"
PAGE: Final = "get_dummy_flat_data_page"


def apply() -> None:
    """Take the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    expect(SEAM)
    resolve(SEAM, ALLOCATORS)["cpu"] = allocate
    module, _, name = RESERVE.rpartition(".")
    setattr(sys.modules[module], name, RESERVED_BYTES)
    for pool in POOLS:
        kind = resolve(SEAM, pool)
        setattr(sys.modules[kind.__module__], COPY, copy)
        setattr(kind, PAGE, unpinned(getattr(kind, PAGE)))


def allocate(*args: Any, **options: Any) -> torch.Tensor:
    """Memory of a host pool, as SGLang allocates it where it is not registered."""
    memory: torch.Tensor = resolve(SEAM, ALLOCATOR)(*args, **options | {"pin_memory": False})
    return memory


def unpinned(page: Callable[[Any], torch.Tensor]) -> Callable[[Any], torch.Tensor]:
    """``page`` of a host pool that pins no memory."""

    def of(pool: Any) -> torch.Tensor:
        pool.pin_memory = False
        return page(pool)

    return of


def copy(
    src_layers: Sequence[torch.Tensor],
    dst_layers: Sequence[torch.Tensor],
    src_indices: torch.Tensor,
    dst_indices: torch.Tensor,
    page_size: int,
) -> None:
    """sgl-kernel's ``transfer_kv_direct``: rows ``src_indices`` of each layer, (tokens, heads, dim), go to rows
    ``dst_indices`` of the other's.
    """
    for src, dst in zip(src_layers, dst_layers, strict=True):
        dst.index_copy_(0, dst_indices, src.index_select(0, src_indices).view(-1, *dst.shape[1:]))
