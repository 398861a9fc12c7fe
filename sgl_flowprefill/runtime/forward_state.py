"""What SGLang keeps per forward in module or object state, saved and restored when one forward takes over from another.

Complete for SGLang 0.5.23, without the options that ``compat`` refuses for the state that they add: a timer, a
recorder, a buffer or a check of one forward at a time; and without the models that ``module_state`` refuses. Context
variables follow the greenlet by themselves, grad mode is off throughout, and eager input buffers are not shared under
``SGLANG_EAGER_INPUT_NO_COPY=1``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from sglang.srt.layers import dp_attention
from sglang.srt.model_executor import forward_context
from sglang.srt.runtime_context import get_forward, get_model

from sgl_flowprefill.runtime.adapters import batch_state
from sgl_flowprefill.runtime.draft_model import draft_backend_of, draft_flags, set_draft_flags
from sgl_flowprefill.runtime.experts import of_new_pass, pass_state, set_pass_state


@dataclass(frozen=True)
class ForwardState:
    """One forward's share of the process's state."""

    context: Any
    """``forward_context._current``: which attention backend the model's layers find."""
    flags: dict[str, Any]
    """The plain slots of ``runtime_context.get_forward()``; its other flags are context variables."""
    shared_experts: Any
    """``get_model().shared_experts``, overridden around every forward; overrides undo in the order of their exits."""
    attn_backend: Any
    """``ModelRunner.attn_backend``, which plans each batch's metadata and must be the task's own."""
    gathered: tuple[Any, ...] | None = None
    """With data-parallel attention, how many tokens each rank has in the pass of all: what ``set_dp_buffer_len`` takes.
    """
    loads: Any = None
    """The ``LayerDoneCounter`` of a hierarchical cache, if there is one."""
    awaited_load: int = -1
    """The load that the layers wait for, by its number in ``loads``; -1: none."""
    adapters: dict[str, Any] = field(default_factory=dict)
    """What the LoRA backend keeps of it: which rows of the batch go through which adapter."""
    draft_runner: Any = None
    """The draft model's, if there is one. Its attention backend is the one that belongs to ``attn_backend``."""
    draft_flags: dict[str, Any] = field(default_factory=dict)
    """What SGLang has set for the draft's part of it."""
    experts: dict[str, Any] = field(default_factory=dict)
    """What SGLang's recorder of experts keeps of it, if there is one."""

    @classmethod
    def capture(
        cls, model_runner: Any, loads: Any = None, draft_runner: Any = None, gathers: bool = False
    ) -> ForwardState:
        """``gathers``: attention is data-parallel."""
        return cls(
            loads=loads,
            awaited_load=-1 if loads is None else loads.consumer_index,
            context=forward_context._current,
            flags=dict(get_forward()._plain),
            shared_experts=get_model().shared_experts,
            attn_backend=model_runner.attn_backend,
            gathered=_gathered() if gathers else None,
            adapters=batch_state(model_runner),
            draft_runner=draft_runner,
            draft_flags={} if draft_runner is None else draft_flags(),
            experts=pass_state(),
        )

    def install(self, model_runner: Any) -> None:
        forward_context.set_forward_context(self.context)
        get_forward()._plain.update(self.flags)
        get_model()._set("shared_experts", self.shared_experts)
        model_runner.attn_backend = self.attn_backend
        if self.gathered is not None:
            dp_attention.set_dp_buffer_len(*self.gathered)
        if self.loads is not None:
            self.loads.set_consumer(self.awaited_load)
        if self.adapters:
            vars(model_runner.lora_manager.lora_backend).update(self.adapters)
        if self.draft_runner is not None:
            self.draft_runner.attn_backend = draft_backend_of(self.attn_backend)
            set_draft_flags(self.draft_flags)
        if self.experts:
            set_pass_state(self.experts)

    def with_backend(self, attn_backend: Any) -> ForwardState:
        """That of a forward pass that is about to begin. ``self``: that of none."""
        return replace(self, attn_backend=attn_backend, experts=of_new_pass(self.experts))


def _gathered() -> tuple[Any, ...]:
    kept = dp_attention._DpGatheredBufferWrapper
    return (
        kept._global_dp_buffer_len,
        kept._local_dp_buffer_len,
        kept._dp_max_padding,
        kept._global_num_tokens,
        kept._global_num_tokens_gpu,
    )
