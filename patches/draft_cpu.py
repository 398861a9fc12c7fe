"""The draft model of speculative decoding on the portable CPU platform, on prefill servers: they draft nothing.

Targets: ``DraftBackendFactory.create_decode_backend`` and ``create_draft_extend_backend``, which know SGLang's own
attention backends by name and end the server at another one. The first one's backend is for drafting, which the decode
server does; for the draft's prefill, SGLang falls back to the attention backend of the draft's own model runner where
the second one makes none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.patches.base import expect
from sgl_flowprefill.platforms import ATTENTION_BACKEND

SEAM: Final = "draft_cpu"
DECODES: Final = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_decode_backend"
PREFILLS: Final = "sglang.srt.speculative.draft_utils.DraftBackendFactory.create_draft_extend_backend"


def apply() -> None:
    """Register the seam. Only for processes on the portable CPU platform. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    for target in (DECODES, PREFILLS):
        HookRegistry.register(target, _none_on_prefill_servers, HookType.AROUND)


def _none_on_prefill_servers(make: Callable[[Any], Any], factory: Any) -> Any:
    from sglang.srt.runtime_context import get_disagg

    is_ours = factory.draft_model_runner.prefill_attention_backend_str == ATTENTION_BACKEND
    return None if is_ours and get_disagg().disaggregation_mode == "prefill" else make(factory)
