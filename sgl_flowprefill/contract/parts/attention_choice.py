"""Rows of the contract: the attention backend of a server whose user has given none."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows

NO_START: Final = "servers on Blackwell do not start without --attention-backend"

PART: Final = Part(
    "attention_choice",
    "Attention backends that SGLang chooses",
    ("HTTP server",),
    (
        *rows(
            "hooks",
            "sglang.srt.arg_groups.model_override_base:",
            "get_default_attn_backend(server_args, use_mla_backend, model_config)",
            "chooses an attention backend by the GPU",
            NO_START,
        ),
        *rows(
            "hooks",
            "sglang.srt.arg_groups.overrides:",
            "collect_model_override_declarations(architecture, server_args, hf_config)",
            "has the attention backends that models choose",
            NO_START,
        ),
        *attributes(
            "sglang.srt.configs.model_config:ModelConfig",
            "has_attention_sinks",
            "says that FlashInfer cannot serve a model",
            "servers on Blackwell do not start with models that have attention sinks",
        ),
    ),
)
