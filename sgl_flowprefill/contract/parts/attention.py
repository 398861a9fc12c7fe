"""Rows of the contract: attention backends for GPUs, in query tiles."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows
from sgl_flowprefill.contract.symbols import BACKENDS, FORWARD_BATCH, FORWARD_MODE, LAYER

FLASHINFER: Final = f"{BACKENDS}.flashinfer_backend:FlashInferAttnBackend"
FLASHINFER_INDICES: Final = f"{BACKENDS}.flashinfer_backend:FlashInferIndicesUpdaterPrefill"
FA3: Final = f"{BACKENDS}.flashattention_backend:FlashAttentionBackend"
FA3_METADATA: Final = f"{BACKENDS}.flashattention_backend:FlashAttentionMetadata"

PART: Final = Part(
    "attention",
    "Attention backends for GPUs, in query tiles",
    ("scheduler",),
    (
        *rows(
            "reads",
            f"{BACKENDS}.hybrid_attn_backend:",
            "HybridAttnBackend",
            "hands attention of prefills on to another backend",
            "long attention operators run whole",
        ),
        *attributes(
            f"{BACKENDS}.hybrid_attn_backend:HybridAttnBackend",
            "prefill_backend",
            "is the backend of prefills",
            "long attention operators run whole",
        ),
        *rows(
            "reads",
            f"{BACKENDS}.hybrid_linear_attn_backend:",
            "HybridLinearAttnBackend",
            "hands attention of prefills on to another backend",
            "long attention operators run whole",
        ),
        *attributes(
            f"{BACKENDS}.hybrid_linear_attn_backend:HybridLinearAttnBackend",
            "full_attn_backend",
            "is the backend of prefills",
            "long attention operators run whole",
        ),
        *rows(
            "reads",
            f"{BACKENDS}.triton_backend:",
            "TritonAttnBackend",
            "is known to run whole",
            "nothing: the warning has another reason",
        ),
        *rows(
            "reads",
            f"{BACKENDS}.flashinfer_backend:",
            "FlashInferAttnBackend",
            "is tiled by its exact class",
            "long attention operators run whole",
        ),
        *rows(
            "hooks",
            FLASHINFER,
            "init_forward_metadata(self, forward_batch)",
            "plans a batch",
            "attention runs with the tiles of another batch",
        ),
        *attributes(
            FLASHINFER,
            "indices_updater_prefill prefill_wrapper_ragged prefill_wrappers_paged workspace_buffer is_dllm_model "
            "prefill_uses_dequant_workspace dispatch_reason",
            "holds the wrappers that are run in tiles",
            "long attention operators run whole, or FlashInfer servers do not start",
        ),
        *rows(
            "hooks",
            FLASHINFER_INDICES,
            "call_begin_forward(self, wrapper_ragged, wrapper_paged, req_pool_indices, paged_kernel_lens, "
            "paged_kernel_lens_sum, seq_lens, prefix_lens, kv_start_idx, kv_indptr, qo_indptr, use_ragged, "
            "spec_info, use_sliding_window_kv_pool, fixed_split_size, multi_item_params, "
            "cross_attention_custom_mask, seq_lens_cpu, custom_kv_indices, window_left, plan)",
            "plans the wrappers, and is told the lengths",
            "attention runs with the lengths of another batch",
        ),
        *attributes(
            FLASHINFER_INDICES,
            "num_qo_heads",
            "says how large the plan of a tile is",
            "FlashInfer servers do not start",
        ),
        *rows(
            "reads",
            f"{BACKENDS}.flashattention_backend:",
            "FlashAttentionBackend",
            "is tiled by its exact class",
            "long attention operators run whole",
        ),
        *rows(
            "hooks",
            FA3,
            "forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope, sinks, ...)",
            "is run once for each tile",
            "long attention operators run whole",
        ),
        *attributes(
            FA3,
            "use_mla fa_impl_ver fa_skip_kv_cache _kv_shard_pool forward_metadata",
            "says whether it can be tiled, and holds the metadata that tiles replace",
            "FlashAttention 3 servers fail at their first prefill",
        ),
        *attributes(
            FA3_METADATA,
            "cu_seqlens_q cache_seqlens_int32 max_seq_len_q local_attn_metadata image_token_ranges",
            "says which rows and keys a kernel computes",
            "FlashAttention 3 servers fail at their first prefill",
        ),
        *rows(
            "calls",
            f"{BACKENDS}.flashattention_backend:",
            "is_cp_active(forward_batch)",
            "tells batches that are not tiled",
            "FlashAttention 3 servers fail at their first prefill",
        ),
        *attributes(
            FORWARD_BATCH,
            "forward_mode extend_seq_lens_cpu extend_prefix_lens_cpu",
            "says which rows and keys a batch has",
            "prefills fail",
        ),
        *attributes(
            FORWARD_BATCH,
            "_attn_output",
            "is where attention is to write, for which it is not tiled",
            "FlashAttention 3 servers compute something else",
        ),
        *rows(
            "calls",
            FORWARD_MODE,
            "is_extend_without_speculative(self)",
            "tells prefills from other batches",
            "prefills fail",
        ),
        *attributes(
            LAYER,
            "attn_type is_cross_attention sliding_window_size tp_q_head_num",
            "says what a layer computes",
            "prefills fail",
        ),
        *rows(
            "reads",
            "sglang.srt.layers.radix_attention:",
            "AttentionType AttentionType.DECODER",
            "tells decoder layers from others",
            "prefills fail",
        ),
    ),
)
