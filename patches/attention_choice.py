"""The attention backend of a server whose user has given none: one that is checked, where SGLang's own choice is not.

Targets: ``get_default_attn_backend``, with which SGLang chooses by the GPU, and
``collect_model_override_declarations``, by which some models have a choice of their own. On Blackwell that is
``trtllm_mha`` or ``trtllm_mla`` for most models. Without this, ``FLOWPREFILL=1 sglang serve --model-path MODEL`` would
be refused there until its user gives another one. What stays is refused as if it had been given: of models for which
SGLang has no other, such as those with sparse attention.
"""

from __future__ import annotations

import logging
from typing import Any, Final

from sgl_flowprefill.compat import Change, checked_attention_backend, flag, server_of
from sgl_flowprefill.patches.base import expect

logger = logging.getLogger(__name__)

SEAM: Final = "attention_choice"
DEFAULT: Final = "sglang.srt.arg_groups.model_override_base.get_default_attn_backend"
OF_MODELS: Final = "sglang.srt.arg_groups.overrides.collect_model_override_declarations"
OPTION: Final = "attention_backend"
Declaration = tuple[str, dict[str, Any]]
"""Where it comes from, and the options that it sets."""


def apply() -> None:
    """Register the hooks. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(DEFAULT, choose, HookType.AFTER)
    HookRegistry.register(OF_MODELS, declare, HookType.AFTER)


def choose(chosen: str, server_args: Any, use_mla_backend: bool, model_config: Any) -> str:
    """The hook of the choice by the GPU."""
    return _checked(chosen, server_args, needs_triton=model_config.has_attention_sinks)


def declare(declarations: list[Declaration], architecture: str, server_args: Any, hf_config: Any) -> list[Declaration]:
    """The hook of the choices of models. One that goes with a page size is what kernels of the model's own need."""
    return [
        (
            source,
            options
            if OPTION not in options or "page_size" in options
            else {**options, OPTION: _checked(options[OPTION], server_args, needs_triton=True)},
        )
        for source, options in declarations
    ]


def _checked(chosen: str, server_args: Any, needs_triton: bool) -> str:
    instead = checked_attention_backend(chosen, needs_triton)
    if instead is None or server_of(server_args) is None:  # a server that only decodes may have any
        return chosen
    change = Change(flag(OPTION), chosen, f"is {instead}", "SGLang's choice has not been checked", asked=False)
    logger.info("FlowPrefill: %s", change)
    return instead
