"""Rows of the contract: NIXL with KV cache in host memory."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, source

PART: Final = Part(
    "nixl_dram",
    "NIXL with KV cache in host memory",
    ("scheduler",),
    (
        source(
            "hooks",
            "sglang.srt.disaggregation.nixl.conn:NixlKVManager.register_buffer_to_engine",
            ["self.agent.register_memory(kv_addrs, mem_kind)"],
            "is the first user of the NIXL agent",
            "servers do not start without an accelerator",
            "(self)",
        ),
        source(
            "assumes",
            "nixl._api:nixl_agent.__init__",
            ["self.nixl_mems = {", '"DRAM": nixlBind.DRAM_SEG', '"VRAM": nixlBind.VRAM_SEG'],
            "translates the names of kinds of memory",
            "servers do not start without an accelerator",
        ),
        *attributes(
            "sglang.srt.disaggregation.nixl.conn:NixlKVManager",
            "agent",
            "is the NIXL agent",
            "servers do not start without an accelerator",
        ),
    ),
)
