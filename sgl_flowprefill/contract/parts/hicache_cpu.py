"""Rows of the contract: the hierarchical cache without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

POOLS: Final = "sglang.srt.mem_cache.pool_host"
STARTS: Final = "servers with a hierarchical cache do not start without an accelerator"

PART: Final = Part(
    "hicache_cpu",
    "The hierarchical cache without an accelerator",
    ("scheduler",),
    (
        *rows(
            "reads", f"{POOLS}.common:", "ALLOC_MEMORY_FUNCS", "says how each type of device allocates memory", STARTS
        ),
        *rows("calls", f"{POOLS}.common:", "alloc_with_host_register", "allocates memory of the host", STARTS),
        *rows(
            "hooks",
            f"{POOLS}.base:",
            "HICACHE_HOST_MEMORY_RESERVE_BYTES",
            "is what is left free of the host's memory",
            "small machines have no memory for a hierarchical cache",
        ),
        *rows("hooks", f"{POOLS}.mha:", "MHATokenToKVPoolHost", "is in the module that copies KV cache", STARTS),
        *rows("hooks", f"{POOLS}.mla:", "MLATokenToKVPoolHost", "is in the module that copies KV cache", STARTS),
        *(
            source(
                "assumes",
                f"{POOLS}.{module}:{pool}.{method}",
                ["transfer_kv_direct("],
                "copies KV cache between device and host",
                STARTS,
            )
            for module, pool in (("mha", "MHATokenToKVPoolHost"), ("mla", "MLATokenToKVPoolHost"))
            for method in ("load_to_device_per_layer", "backup_from_device_all_layer")
        ),
        *(
            source(
                "hooks",
                f"{POOLS}.{module}:{pool}.get_dummy_flat_data_page",
                ["pin_memory=self.pin_memory"],
                "is the memory into which a page is read from storage",
                "nothing is read from storage without an accelerator",
                "(self)",
            )
            for module, pool in (("mha", "MHATokenToKVPoolHost"), ("mla", "MLATokenToKVPoolHost"))
        ),
        source(
            "assumes",
            f"{POOLS}.mha:MHATokenToKVPoolHost.init_kv_buffer",
            ["ALLOC_MEMORY_FUNCS[self._transfer_device.type]"],
            "allocates memory of the host",
            STARTS,
        ),
    ),
)
