"""Page indices of KV cache are read from a GPU by a copy alone, and divided on the host.

Target: ``kv_to_page_indices`` (mem_cache/common.py), by which a prefill server finds the pages that it sends. SGLang
divides on the device and copies what comes of it. The division is a kernel, and takes its turn behind the blocks of the
kernel that runs, also on a stream of its own; a copy needs no multiprocessor. What is copied is four bytes a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sgl_flowprefill.patches.base import expect

if TYPE_CHECKING:
    import numpy as np
    import torch

SEAM: Final = "page_indices"
TARGET: Final = "sglang.srt.mem_cache.common.kv_to_page_indices"


def apply() -> None:
    """Register the seam in a process that may send KV cache. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, read_page_indices, HookType.REPLACE)


def read_page_indices(kv_indices: torch.Tensor, page_size: int) -> np.ndarray[Any, Any]:
    """The page of each first token of a page, in an array of its own of the dtype of ``kv_indices``, [tokens]."""
    pages: np.ndarray[Any, Any] = kv_indices.cpu().numpy()[::page_size] // page_size
    return pages
