"""Rows of the contract: model runner and model."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER

MODEL_CONFIG: Final = "sglang.srt.configs.model_config:ModelConfig"

PART: Final = Part(
    "model",
    "Model runner and model",
    ("scheduler",),
    (
        *attributes(
            MODEL_RUNNER,
            "attn_backend model model_config dtype device max_total_num_tokens prefill_attention_backend_str "
            "decode_attention_backend_str "
            "kv_index_translator req_to_token_pool token_to_kv_pool use_mla_backend prefill_aware_swa",
            "holds the model, its attention backend and its KV cache",
            "the server does not start",
        ),
        source(
            "calls",
            f"{MODEL_RUNNER}._get_attention_backend",
            ["model_runner=self, init_new_workspace=init_new_workspace"],
            "makes an attention backend for another live task",
            "prefills cannot be suspended: their attention state is one and the same",
            "(self, init_new_workspace)",
        ),
        *rows(
            "calls",
            "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator",
            "bind_and_verify_backends(self, backends)",
            "is what SGLang does with a new attention backend",
            "backends of suspended prefills read wrong KV indices",
        ),
        *attributes(
            MODEL_CONFIG,
            "context_len head_dim hf_config hf_text_config hidden_size is_encoder_decoder model_path "
            "num_attention_heads vocab_size",
            "says how large the model is",
            "profiles do not belong to a model, and memory of tasks cannot be told",
        ),
        *rows(
            "calls",
            MODEL_CONFIG,
            "get_total_num_kv_heads(self)",
            "says how large the model is",
            "memory of tasks cannot be told",
        ),
        *rows(
            "reads",
            "sglang.srt.environ:",
            "envs Envs.SGLANG_ENABLE_LOGPROB_CHUNK Envs.SGLANG_LOGPROB_CHUNK_SIZE",
            "says how many rows of logits are computed at once",
            "memory of tasks cannot be told",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.radix_attention:",
            "RadixAttention",
            "is what a decoder layer is found by, by its name",
            "prefills cannot be suspended",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.logits_processor:",
            "LogitsProcessor",
            "is what a model that ends with a token is found by, by its name",
            "models are refused",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.radix_linear_attention:",
            "RadixLinearAttention",
            "is what linear attention is found by, by its name",
            "hybrid models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.attention.mamba.mamba:",
            "MambaMixer2",
            "is what attention of Mamba models is found by, by its name",
            "these models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.attention.mamba.mamba1:",
            "MambaMixer1",
            "is what attention of Mamba models is found by, by its name",
            "these models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.models.lfm2:",
            "Lfm2ShortConv",
            "is what attention of LFM2 models is found by, by its name",
            "these models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.models.lfm2_moe:",
            "Lfm2MoeShortConv",
            "is what attention of LFM2 models is found by, by its name",
            "these models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.models.jet_nemotron:",
            "JetBlock",
            "is what attention of Jet-Nemotron models is found by, by its name",
            "these models have fewer preemption checkpoints",
        ),
        *rows(
            "reads",
            "sglang.srt.models.gemma3n_causal:",
            "Gemma3nAltUp",
            "is what helps a layer and is no MLP, by its name",
            "its matrices are taken for an MLP",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.hyperconnection:",
            "GatedResidual",
            "is what helps a layer and is no MLP, by its name",
            "its matrices are taken for an MLP",
        ),
    ),
)
