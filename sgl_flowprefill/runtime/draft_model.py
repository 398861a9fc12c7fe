"""The draft model of speculative decoding, on a prefill server: its prefill is the end of a task's forward pass.

SGLang runs the target's forward pass over a batch, and then the draft model's, of the target's hidden states and first
tokens. Here both are one forward pass: the draft's layers have preemption checkpoints and tiles as the target's have,
its attention backend belongs to that of the target, and the flags that SGLang sets around it are saved and restored.
Its KV cache lies at the places of the target's. A prefill server drafts nothing: the decode server does, which is sent
the draft's KV cache and what the first draft begins with.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from sglang.srt.runtime_context import get_flags
from torch import nn

from sgl_flowprefill.compat import SWITCHED_ON

logger = logging.getLogger(__name__)

DRAFT_BACKEND: Final = "flowprefill_draft_backend"
"""Attribute of the target's attention backends: the draft's, which computes the same batches."""
EAGLE3_LAYERS: Final = ("low", "middle", "high")
"""Those whose hidden states an EAGLE3 draft is given, where it does not say which."""
FLAGS: Final = ("runner_backend", "a2a_backend", "disable_fp4_allgather", "speculative_context")
"""What SGLang sets around the draft's forward pass, of the flags for experts."""
COMPARED_COPIES: Final = ("none", "sidecar")
"""How a hierarchical cache may copy the draft's KV cache to host memory (SGLang's ``HiCacheDraftMode``): not at all, or
beside the model's."""
UNCOMPARED_COPY: Final = (
    "--enable-hierarchical-cache with this draft model, whose KV cache is copied to host memory {} with the model's, "
    "not beside it, has not been compared"
)


def draft_runner(scheduler: Any) -> Any | None:
    """The draft's model runner, if SGLang's ``scheduler`` has one."""
    worker = scheduler.draft_worker
    return None if worker is None else worker.draft_worker.draft_runner


def check_copies(scheduler: Any, takes_uncompared: bool) -> None:
    """Raises SystemExit with one line where the KV cache of the draft is copied to host memory in a way that has not
    been compared. A server that ``takes_uncompared`` warns of it.
    """
    copied: str = scheduler.draft_worker.hicache_draft_plan.mode.value
    if copied in COMPARED_COPIES:
        return
    risk = UNCOMPARED_COPY.format(copied)
    if not takes_uncompared:
        raise SystemExit(f"sgl-flowprefill: {risk}; {SWITCHED_ON}")
    logger.warning("FlowPrefill: %s, and what this server answers may be wrong", risk)


def whole_model(scheduler: Any) -> nn.Module:
    """All layers of a forward pass, in their order: the model's, and those of its draft if there is one."""
    model: nn.Module = scheduler.tp_worker.model_runner.model
    draft = draft_runner(scheduler)
    return model if draft is None else nn.ModuleDict({"target": model, "draft": draft.model})


def kept_hidden_states(scheduler: Any) -> int:
    """How many hidden states of a token are kept for the draft until it has run."""
    if draft_runner(scheduler) is None:
        return 0
    return kept_by(scheduler.tp_worker.model_runner.spec_aux_config)


def kept_by(layers: Any) -> int:
    """How many hidden states of a token are kept, by SGLang's configuration of the draft (``spec_aux_config``)."""
    if not layers.eagle_use_aux_hidden_state:
        return 1
    return len(layers.eagle_aux_hidden_state_layer_ids or EAGLE3_LAYERS)


def pair(attn_backend: Any, draft_backend: Any) -> None:
    """Who computes with ``attn_backend`` computes drafts with ``draft_backend``."""
    setattr(attn_backend, DRAFT_BACKEND, draft_backend)


def draft_backend_of(attn_backend: Any) -> Any | None:
    """The draft's attention backend that belongs to ``attn_backend``."""
    return getattr(attn_backend, DRAFT_BACKEND, None)


def draft_flags() -> dict[str, Any]:
    """The flags that SGLang sets around the draft's forward pass, as they are now."""
    moe = get_flags().moe
    return {name: getattr(moe, name) for name in FLAGS}


def set_draft_flags(flags: dict[str, Any]) -> None:
    moe = get_flags().moe
    for name, value in flags.items():
        setattr(moe, name, value)
