"""Rows of the contract: attention of the portable CPU platform."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows
from sgl_flowprefill.contract.symbols import BACKENDS, FORWARD_BATCH, FORWARD_MODE, LAYER

BACKEND: Final = f"{BACKENDS}.base_attn_backend:AttentionBackend"

PART: Final = Part(
    "cpu_attention",
    "Attention of the portable CPU platform",
    ("scheduler",),
    (
        *rows(
            "calls",
            f"{BACKENDS}.attention_registry:",
            "register_attention_backend(name)",
            "makes the backend known",
            "servers do not start without an accelerator",
        ),
        *rows(
            "overrides",
            BACKEND,
            "forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) "
            "forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) "
            "init_forward_metadata(self, forward_batch) support_triton(self) "
            "get_cuda_graph_seq_len_fill_value(self)",
            "is how SGLang calls an attention backend",
            "prefills fail on the CPU",
        ),
        *rows(
            "calls",
            f"{BACKENDS}.base_attn_backend:",
            "AttentionBackend",
            "is what the backend is a subclass of",
            "servers do not start without an accelerator",
        ),
        *attributes(
            BACKEND,
            "forward_metadata",
            "is where SGLang's backends keep the state of a batch",
            "prefills fail on the CPU",
        ),
        *rows(
            "reads",
            "sglang.srt.mem_cache.swa_memory_pool:",
            "SWAKVPool",
            "is a KV cache that is not served",
            "models with sliding windows compute something else",
        ),
        *attributes(
            FORWARD_BATCH,
            "seq_lens_cpu req_pool_indices out_cache_loc",
            "says which rows and keys a batch has",
            "prefills fail on the CPU",
        ),
        *rows(
            "calls",
            FORWARD_MODE,
            "is_target_verify(self) is_draft_extend_v2(self) is_decode(self)",
            "tells batches that are not served",
            "batches of speculative decoding compute something else",
        ),
        *attributes(
            LAYER,
            "layer_id logit_cap logit_capping_method qk_head_dim scaling tp_k_head_num v_head_dim xai_temperature_len",
            "says what a layer computes",
            "prefills fail on the CPU",
        ),
        *attributes(
            "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
            "req_to_token",
            "says where the keys of a request are",
            "prefills fail on the CPU",
        ),
        *rows(
            "calls",
            "sglang.srt.mem_cache.memory_pool:KVCache",
            "get_key_buffer(self, layer_id) get_value_buffer(self, layer_id) "
            "set_kv_buffer(self, layer, loc, cache_k, cache_v, ...)",
            "holds keys and values",
            "prefills fail on the CPU",
        ),
        *rows(
            "calls",
            "sglang.srt.models.deepseek_common.attention_backend_handler:",
            "AttentionBackendRegistry AttentionBackendRegistry.register(cls, backend_name, handler_func)",
            "lets latent attention attend to latents",
            "models with latent attention do not run on the CPU",
        ),
        *rows(
            "reads",
            "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods:",
            "AttnForwardMethod AttnForwardMethod.MLA",
            "lets latent attention attend to latents",
            "models with latent attention do not run on the CPU",
        ),
        *rows(
            "reads",
            "sglang.srt.model_executor.forward_batch_info:",
            "ForwardBatch",
            "is the batch that attention is computed of",
            "prefills fail on the CPU",
        ),
        *rows(
            "reads",
            "sglang.srt.model_executor.model_runner:",
            "ModelRunner",
            "is what a backend is made from",
            "prefills fail on the CPU",
        ),
    ),
)
