"""The draft model of speculative decoding, on a prefill server: its prefill is the end of a task's forward pass.

SGLang runs the target's forward pass over a batch, and then the draft model's, of the target's hidden states and first
tokens. Here both are one forward pass: the draft's layers have preemption checkpoints and tiles as the target's have,
its attention backend belongs to that of the target, and the flags that SGLang sets around it are saved and restored.
Its KV cache lies at the places of the target's. A prefill server drafts nothing: the decode server does, which is sent
the draft's KV cache and what the first draft begins with.
"""

from __future__ import annotations

from typing import Any, Final

from sglang.srt.runtime_context import get_flags
from torch import nn

DRAFT_BACKEND: Final = "flowprefill_draft_backend"
"""Attribute of the target's attention backends: the draft's, which computes the same batches."""
EAGLE3_LAYERS: Final = ("low", "middle", "high")
"""Those whose hidden states an EAGLE3 draft is given, where it does not say which."""
FLAGS: Final = ("runner_backend", "a2a_backend", "disable_fp4_allgather", "speculative_context")
"""What SGLang sets around the draft's forward pass, of the flags for experts."""


def draft_runner(scheduler: Any) -> Any | None:
    """The draft's model runner, if SGLang's ``scheduler`` has one."""
    worker = scheduler.draft_worker
    return None if worker is None else worker.draft_worker.draft_runner


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
