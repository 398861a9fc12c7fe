"""The draft model of speculative decoding on the portable CPU platform, on prefill servers: they draft nothing.

Targets: ``DraftBackendFactory.create_decode_backend`` and ``create_draft_extend_backend``, which know SGLang's own
attention backends by name and end the server at another one. The first one's backend is for drafting, which the decode
server does; for the draft's prefill, SGLang falls back to the attention backend of the draft's own model runner where
the second one makes none. And ``MHATokenToKVPool._init_kv_copy_and_warmup``, which runs a Triton kernel: it moves the
KV cache of tokens that were drafted and accepted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "draft_cpu"
DECODES: Final = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend"
PREFILLS: Final = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend"
MOVES: Final = "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool._init_kv_copy_and_warmup"


def apply() -> None:
    """Register the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    for target in (DECODES, PREFILLS, MOVES):
        HookRegistry.register(target, _nothing_on_prefill_servers, HookType.AROUND)


def _nothing_on_prefill_servers(make: Callable[[Any], Any], owner: Any) -> Any:
    from sglang.srt.runtime_context import get_disagg

    return None if get_disagg().disaggregation_mode == "prefill" else make(owner)
