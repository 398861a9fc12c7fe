"""Rows of the contract: page indices of KV cache that is sent."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, source

PART: Final = Part(
    "page_indices",
    "Page indices of KV cache that is sent",
    ("scheduler",),
    (
        source(
            "hooks",
            "sglang.srt.mem_cache.common:kv_to_page_indices",
            ["return (kv_indices[::page_size] // page_size).cpu().numpy()"],
            "finds the pages of the KV cache that is sent",
            "sending on a GPU waits for the kernel that runs",
            "(kv_indices, page_size)",
        ),
    ),
)
