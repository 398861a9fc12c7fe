"""Rows of the contract: draft models without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.parts.draft_model import DRAFT_WORKER
from sgl_flowprefill.contract.row import Part, rows, source
from sgl_flowprefill.contract.symbols import CONTEXT

FACTORY: Final = "sglang.srt.speculative.draft_utils:DraftBackendFactory"
STARTS: Final = "prefill servers with a draft model do not start without an accelerator"

PART: Final = Part(
    "draft_cpu",
    "Draft models without an accelerator",
    ("scheduler",),
    (
        *rows(
            "hooks",
            FACTORY,
            "create_decode_backend(self) create_draft_extend_backend(self)",
            "makes the draft's attention backends",
            STARTS,
        ),
        *rows(
            "hooks",
            "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
            "_init_kv_copy_and_warmup(self)",
            "moves the KV cache of drafted tokens",
            STARTS,
        ),
        *rows("calls", CONTEXT, "get_disagg()", "says whether the server drafts", STARTS),
        source(
            "assumes",
            f"{DRAFT_WORKER}.init_attention_backend",
            ["if self.draft_extend_attn_backend is not None:"],
            "leaves the draft its own attention backend where there is no other",
            STARTS,
        ),
        *rows(
            "overrides",
            "sglang.srt.platforms.interface:SRTPlatform",
            "supports_speculative_algorithm(self, algorithm)",
            "says which draft models the platform serves",
            STARTS,
        ),
    ),
)
