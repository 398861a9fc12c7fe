"""What FlowPrefill does about each option of SGLang that has to do with prefills, and why.

The adjustment of a server's options, what is refused, ``launch.py doctor --explain`` and docs/compatibility.md all come
from here.

FlowPrefill sets what decides when a prompt runs and in which pieces. What a server offers its users or its operator (a
cache, adapters, a way to be parallel, a metric) it never switches off: where that cannot work, the server is refused.
"""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.compat.row import ABOVE_ONE, POSITIVE, Group, Row, leave, one_of, other_than, put, refuse

CHECKED_ATTENTION_BACKENDS: Final = ("flashinfer", "fa3", "triton", "flowprefill_cpu", "torch_native")
"""Backends of which several instances can be live at once (tests/unit/test_gpu_contracts.py)."""
INSTEAD_OF_UNCHECKED: Final = {"trtllm_mha": "flashinfer", "trtllm_mla": "flashinfer"}
"""Backends that SGLang chooses by itself, and what takes their place."""
CHECKED_LORA_BACKENDS: Final = ("csgmv", "triton", "torch_native")
"""Backends that keep nothing of a forward pass but what ``runtime.adapters`` restores."""
TRANSFER_BACKENDS: Final = ("nixl", "mooncake", "mooncake_tcp")

DECODES: Final = "of decode servers"
NO_EFFECT: Final = "no effect here"
WHOLE: Final = "a prompt is prefilled whole and suspended when it has to wait"
BY_SLACK: Final = "requests are ordered by their slack (see --flowprefill-policy)"
NOT_DELAYED: Final = "requests are started by their slack, not delayed"
ONE_STEP: Final = (
    "decode steps start when the objectives of their streams ask for it (see --flowprefill-default-tbt-slo)"
)
NO_GRAPHS: Final = "a captured graph cannot be suspended between its operators"
UNCAPTURED: Final = f"{NO_EFFECT}: prefills are not captured"
ONE_CHUNK: Final = "its buffers hold the tokens of one chunk, and a prompt is prefilled whole"
TRANSFERS: Final = "SGLang waits for its transfers layer by layer in one forward pass at a time"
STAGED: Final = "what it reads from storage is of one request and no cached prefix, and has not been compared"
LORA_KERNELS: Final = "it has not been checked to keep the batches of suspended prefills apart; use csgmv or triton"
EXPERT_ADAPTERS: Final = "adapters of experts have not been checked to keep the batches of suspended prefills apart"
DRAFTS: Final = "what its prefills compute for the decode server has not been compared; use EAGLE, EAGLE3 or NEXTN"
DRAFT_STEPS: Final = "when decode steps start is decided by steps that give each stream one token"
REBALANCING: Final = "experts move between ranks when nothing is suspended"
STEPS_BETWEEN_MOVES: Final = "experts that move between decode steps have not been compared"
RANKS_THAT_FAIL: Final = "when a rank has failed, experts move in the middle of a forward pass, beside suspended ones"
REPLICAS: Final = (
    "its ranks are replicas, one of which a request gets by its number; start as many servers, for which launch.py has "
    "--prefill N and --unified N"
)
SHARED_ATTENTION: Final = "ranks that share the attention of their requests have not been checked with others that do"
ONE_MACHINE: Final = "a rank that sleeps is woken by those of its machine alone"
ONE_SENDER: Final = "all ranks have to get a pause or a change of weights in the same round"
HTTP: Final = "the objective of a request is checked by the HTTP server"

ATTENTION: Final = refuse(
    ("attention_backend", "prefill_attention_backend"),
    "it has not been checked to keep the batches of suspended prefills apart; use flashinfer, fa3 or triton",
    other_than(*CHECKED_ATTENTION_BACKENDS),
)
GRAPH_CONFIG: Final = Row("set", ("cuda_graph_config",), f"its prefill.backend is taken out: {NO_GRAPHS}")
"""The one option of which a part is set."""

SCHEDULING: Final = Group(
    "Scheduling and memory",
    ("schedule",),
    (
        put("disable_overlap_schedule", True, "it decides at every event, not one batch ahead", default=False),
        put("chunked_prefill_size", -1, WHOLE, default=None),
        put("schedule_policy", "fcfs", BY_SLACK, default="fcfs"),
        put("scheduler_recv_interval", 1, "messages are read when they come", default=1),
        put(
            "enable_mixed_chunk",
            False,
            "a prefill server has no decode steps to mix in",
            default=False,
            servers=("prefill",),
        ),
        put(
            "enable_mixed_chunk",
            False,
            "decode steps run between the operators of prefills and are no part of their batches",
            default=False,
            servers=("unified",),
        ),
        put("enable_dynamic_chunking", False, WHOLE, default=False),
        put("enable_prefill_delayer", False, NOT_DELAYED, default=False),
        put("min_free_slots_delay", None, NOT_DELAYED, default=None, servers=("unified",)),
        leave("min_free_slots_delay", f"{NO_EFFECT}: a prefill server has no running requests", ("prefill",)),
        put("prefill_decode_interval", 0, ONE_STEP, default=None, servers=("unified",)),
        leave("prefill_decode_interval", f"{NO_EFFECT}: a prefill server has no decode steps", ("prefill",)),
        leave("prefill_decode_interval_min_bs", f"{NO_EFFECT}: goes with --prefill-decode-interval"),
        leave(
            "enable_priority_scheduling default_priority_value schedule_low_priority_values_first",
            "a request's priority says which objective it has where --flowprefill-priority-ttft-slo or "
            "--flowprefill-slo-policy says which; elsewhere it does not change the order of prefills",
        ),
        put(
            "disable_priority_preemption",
            True,
            "prefills are suspended by their slack, and no stream is stopped for a request that waits",
            default=False,
            only_with="enable_priority_scheduling",
        ),
        leave("priority_scheduling_preemption_threshold", f"{NO_EFFECT}: goes with SGLang's preemption by priority"),
        leave("abort_on_priority_when_disabled"),
        leave("max_queued_requests retraction_policy", "as in SGLang, priorities too"),
        leave(
            "max_prefill_tokens prefill_max_requests",
            "bounds of SGLang's admission, beside --flowprefill-max-batch-tokens",
        ),
        leave(
            "mem_fraction_static",
            "not given, KV cache on a GPU is all that neither CUDA graphs need nor attention state and activations of "
            "the longest prompt; given, it stays",
        ),
        leave("max_running_requests max_total_tokens schedule_conservativeness page_size"),
        leave("swa_full_tokens_ratio swa_prefix_tails disable_hybrid_swa_memory c128_page_size"),
        leave("max_mamba_cache_size mamba_full_memory_ratio disable_chunked_prefix_cache num_continuous_decode_steps"),
        leave("prefill_only_disable_kv_cache", "goes with --is-embedding, which is refused"),
        leave(
            "prefill_delayer_max_delay_passes prefill_delayer_token_usage_low_watermark "
            "prefill_delayer_forward_passes_buckets prefill_delayer_wait_seconds_buckets "
            "prefill_delayer_queue_min_ratio prefill_delayer_max_delay_ms",
            f"{NO_EFFECT}: go with --enable-prefill-delayer",
        ),
    ),
)

GRAPHS: Final = Group(
    "CUDA graphs and compilation",
    ("exec.graph",),
    (
        put("cuda_graph_backend_prefill", "disabled", NO_GRAPHS, default=None),
        GRAPH_CONFIG,
        put("enable_torch_compile", False, "a compiled model has no boundaries between its operators", default=False),
        leave("enable_torch_compile_debug_mode torch_compile_max_bs", f"{NO_EFFECT}: go with --enable-torch-compile"),
        leave("disable_cuda_graph disable_prefill_cuda_graph", "prefills are not captured anyway"),
        leave(
            "cuda_graph_max_bs_prefill cuda_graph_bs_prefill cuda_graph_max_seq_len_prefill "
            "cuda_graph_prefill_max_context",
            UNCAPTURED,
        ),
        leave(
            "cuda_graph_backend_decode cuda_graph_max_bs_decode cuda_graph_bs_decode disable_decode_cuda_graph "
            "disable_cuda_graph_padding",
            "decode steps are SGLang's",
        ),
        leave("enable_profile_cuda_graph enable_cudagraph_gc debug_cuda_graph"),
    ),
)

OVERLAP: Final = Group(
    "Overlap of batches",
    ("exec.overlap",),
    (
        put("enable_two_batch_overlap", False, "it interleaves two batches inside of one forward pass", default=False),
        put("enable_single_batch_overlap", False, "it interleaves operators inside of one forward pass", default=False),
        leave("tbo_token_distribution_threshold", f"{NO_EFFECT}: goes with --enable-two-batch-overlap"),
    ),
)

DISAGGREGATION: Final = Group(
    "Prefill/decode disaggregation",
    ("disagg",),
    (
        leave("disaggregation_mode", "`prefill` and `null` get FlowPrefill's schedulers, `decode` SGLang's own"),
        refuse(
            "disaggregation_transfer_backend",
            "nothing would tell FlowPrefill that its transfers have ended; use nixl",
            other_than(*TRANSFER_BACKENDS),
            ("prefill",),
        ),
        leave("disaggregation_bootstrap_port disaggregation_ib_device disaggregation_enable_kv_checksum"),
        put(
            "optimistic_prefill_attempts",
            0,
            "a prefill starts once the decode server has reserved its KV cache",
            default=0,
            servers=("prefill",),
        ),
        leave("optimistic_prefill_attempts", NO_EFFECT, ("unified",)),
        refuse(
            "disaggregation_decode_allocation_policy",
            "a prefill starts once the decode server has reserved its KV cache",
            one_of("prefill_complete"),
            ("prefill",),
        ),
        leave(
            "disaggregation_transfer_backend disaggregation_decode_allocation_policy",
            f"{NO_EFFECT}: nothing is transferred",
            ("unified",),
        ),
        refuse("enable_pd_role_switch", "the server has to stay a prefill server", servers=("prefill",)),
        refuse("enable_pd_role_switch", "the server has to go on to prefill and decode", servers=("unified",)),
        put(
            "enable_pdmux",
            False,
            "it divides the device between prefills and decodes, which here take turns",
            default=False,
            servers=("unified",),
        ),
        refuse("enable_pdmux", "it runs prefill and decode in one process", servers=("prefill",)),
        leave("pdmux_config_path sm_group_num", f"{NO_EFFECT}: go with --enable-pdmux"),
        leave(
            "disaggregation_decode_enable_radix_cache disaggregation_decode_enable_offload_kvcache "
            "disaggregation_decode_retraction_backup num_reserved_decode_tokens disaggregation_decode_extra_slots "
            "disaggregation_decode_polling_interval disaggregation_decode_host_receive_threshold",
            DECODES,
        ),
        refuse("encoder_only", "an encoder has no first token"),
        refuse("language_only", "embeddings arrive from its encoders at sockets of their own, which wake nobody"),
        leave(
            "encoder_transfer_backend encoder_urls encoder_bootstrap_port encoder_register_urls "
            "enable_adaptive_dispatch_to_encoder",
            "go with --encoder-only and --language-only, which are refused",
        ),
        leave("language_model_only"),
        refuse("decoupled_spec_role", "drafts of another server have not been compared"),
        leave(
            "decoupled_spec_bind_endpoint decoupled_spec_connect_endpoints decoupled_spec_rank",
            "go with --decoupled-spec-role, which is refused",
        ),
    ),
)

CACHES: Final = Group(
    "KV cache",
    ("memory",),
    (
        leave("radix_eviction_policy radix_eviction_policy_config disable_radix_cache enable_session_radix_cache"),
        refuse("radix_cache_backend", TRANSFERS, one_of("flexkv", "lmcache")),
        leave("enable_hierarchical_cache"),
        leave(
            "hicache_ratio hicache_size hicache_host_memory_fraction hicache_write_policy hicache_io_backend "
            "hicache_mem_layout",
            "goes with --enable-hierarchical-cache",
        ),
        leave(
            "hicache_storage_backend",
            "goes with --enable-hierarchical-cache",
        ),
        leave(
            "hicache_storage_prefetch_policy hicache_storage_backend_extra_config",
            "go with --hicache-storage-backend. The policy chooses among requests that it lets start",
        ),
        leave(
            "hicache_storage_prefetch_retry_poll_interval hicache_storage_prefetch_retry_max_attempts",
            "go with --hicache-storage-backend. A pass is a start of a task, or a decode step",
        ),
        refuse("hicache_host_memory_mode", STAGED, one_of("buffer_only")),
        refuse(("enable_lmcache", "enable_flexkv", "enable_unified_cache_external_linker"), TRANSFERS),
        leave(
            "lmcache_config_file flexkv_config_file unified_cache_external_linker_backend "
            "unified_cache_external_linker_config enable_linker_mla_dedup",
            "go with caches that are refused",
        ),
        refuse(
            "enable_hisparse",
            "its transition from prefill to decode is tied to SGLang's own scheduling of batches",
            servers=("unified",),
        ),
        leave(
            "enable_hisparse",
            "the decode server of a pair is what uses it, SGLang's prefill server does not; not run",
            servers=("prefill",),
        ),
        leave("hisparse_config", "goes with --enable-hisparse"),
        refuse(
            "enable_unified_memory", "it moves the KV cache of a suspended prefill, which writes on to where that was"
        ),
        leave("enable_page_major_kv_layout", "goes with --enable-unified-memory, which is refused"),
    ),
)

PARALLEL: Final = Group(
    "Parallelism",
    ("parallel",),
    (
        leave("tp_size ep_size nnodes node_rank dist_init_addr nccl_port dist_timeout gated_launch_port"),
        refuse("pp_size", "a pipeline's stages cannot be suspended together", ABOVE_ONE),
        leave("pp_max_micro_batch_size pp_async_batch_depth", "go with --pp-size, which is refused above 1"),
        leave(
            "enable_dp_attention attn_dp_size",
            "a prefill is a forward pass of all ranks, which are suspended together, behind a layer, and a decode step "
            "is one of all, too. "
            f"**Refused** with fewer than `--tp-size` ranks of attention ({SHARED_ATTENTION}), and with `--nnodes` "
            f"above 1 ({ONE_MACHINE})",
        ),
        leave("dp_size", f"goes with DP attention. **Refused** above 1 without: {REPLICAS}"),
        refuse("enable_dp_attention_local_control_broadcast", ONE_SENDER),
        leave(
            "load_balance_method enable_dp_lm_head enable_tp_lm_head_all_to_all enable_dense_mlp_attn_tp "
            "moe_dense_tp_size",
            "go with data parallelism",
        ),
        refuse(
            "attn_cp_size",
            "its ranks hold parts of one prompt, which were not checked to stay apart from those of other prompts",
            ABOVE_ONE,
        ),
        leave(
            "enable_prefill_cp cp_strategy enable_dsa_cache_layer_split enable_cp_decode_attn_tp",
            "go with --attn-cp-size, which is refused above 1",
        ),
        refuse("enable_kv_cache_sharding", ONE_CHUNK),
        refuse("dwdp_size", "a layer fetches the weights of the next one in the same forward pass", ABOVE_ONE),
        leave("dcp_size dcp_comm_backend dcp_replicate_q_proj moe_dp_size"),
        leave("enable_attn_tp_input_scattered enable_shared_experts_attn_tp shared_experts_tp_size"),
        leave("enable_layernorm_sp enable_megamoe_for_layernorm_sp disable_attn_tp_gather enable_p2p_check"),
        leave("ep_join_rank_offset elastic_ep_initial_size max_ep_size"),
    ),
)

EXPERT_PARALLEL: Final = Group(
    "Experts",
    ("exec.moe",),
    (
        refuse(
            "moe_a2a_backend",
            ONE_CHUNK,
            one_of("flashinfer", "flashinfer_megamoe", "megamoe", "deepep_v2", "mori", "pplx"),
        ),
        leave("deepep_mode deepep_config deepep_dispatcher_output_dtype moe_runner_backend mooncake_ib_device"),
        leave(
            "deepep_v2_mode enable_w4a4_mxfp4_megamoe flashinfer_a2a_dispatch_type",
            "go with values of --moe-a2a-backend that are refused",
        ),
        refuse("enable_eplb", STEPS_BETWEEN_MOVES, servers=("unified",)),
        leave("enable_eplb", REBALANCING, servers=("prefill",)),
        leave(
            "eplb_algorithm eplb_rebalance_num_iterations eplb_min_rebalancing_utilization_threshold",
            f"{REBALANCING}. **Refused** with `--elastic-ep-backend`: {RANKS_THAT_FAIL}",
        ),
        leave("eplb_rebalance_layers_per_chunk", f"{NO_EFFECT}: all layers move at once, when nothing is suspended"),
        refuse("expert_distribution_recorder_mode", ONE_CHUNK, one_of("per_token")),
        leave(
            "expert_distribution_recorder_buffer_size expert_balancedness_report_mode",
            "experts are counted for each forward pass apart, of prefills that have run to their ends",
        ),
        leave("ep_num_redundant_experts ep_dispatch_algorithm init_expert_location enable_waterfill fuseep_mode"),
        leave("elastic_ep_backend enable_elastic_expert_backup ep_join_mode elastic_ep_scale_timeout"),
        leave("flashinfer_mxfp4_moe_precision disable_flashinfer_cutlass_moe_fp4_allgather"),
        leave("enable_fused_moe_sum_all_reduce disable_shared_experts_fusion enforce_shared_experts_fusion"),
        leave("enable_paged_experts paged_experts_num_resident"),
        leave("kt_weight_path kt_method kt_cpuinfer kt_threadpool_count kt_num_gpu_experts"),
        leave("kt_max_deferred_experts_per_token"),
    ),
)

KERNELS: Final = Group(
    "Kernels",
    ("exec.kernel",),
    (
        ATTENTION,
        leave("decode_attention_backend enable_lean_attention", "decode steps are SGLang's"),
        leave("sampling_backend grammar_backend enable_nvidia_megakernel enable_amd_monokernel"),
        leave("fp8_gemm_runner_backend fp4_gemm_runner_backend bf16_gemm_backend prefill_kv_cache_dequant_dtype"),
        leave(
            "dsa_prefill_backend dsa_decode_backend dsa_paged_mqa_logits_backend dsa_topk_backend dsa_triton_union "
            "enable_dsa_fused_indexer dsv4_prefill_backend enable_deepseek_v4_fp4_indexer"
        ),
        refuse("dsv4_attn_backend", ONE_CHUNK, one_of("trtllm")),
        leave("disable_flashinfer_autotune flashinfer_autotune_skip_ops flashinfer_mla_disable_ragged"),
        leave("triton_attention_reduce_in_fp32 triton_attention_num_kv_splits triton_attention_split_tile_size"),
        leave("enable_fused_qk_norm_rope enable_precise_embedding_interpolation"),
    ),
)

SPECULATION: Final = Group(
    "Speculative decoding",
    ("spec",),
    (
        refuse("speculative_algorithm", DRAFTS, other_than("EAGLE", "EAGLE3", "NEXTN"), ("prefill",)),
        refuse("speculative_algorithm", DRAFT_STEPS, servers=("unified",)),
        refuse("enable_multi_layer_eagle", "drafts of several models have not been compared"),
        refuse("speculative_draft_attention_backend", ATTENTION.why, other_than(*CHECKED_ATTENTION_BACKENDS)),
        leave(
            "speculative_draft_model_path speculative_draft_model_revision",
            "the draft model's prefill is the end of the prompt's, and can be suspended as that can",
            ("prefill",),
        ),
        leave(
            "speculative_draft_model_path speculative_draft_model_revision",
            "go with --speculative-algorithm, which is refused",
            ("unified",),
        ),
        leave(
            "uno_lora_path speculative_draft_load_format"
            " speculative_num_steps speculative_eagle_topk speculative_num_draft_tokens speculative_dflash_block_size "
            "speculative_dspark_block_size speculative_dspark_sps_table_path speculative_dspark_confidence_sts_path "
            "speculative_dspark_align_verify_tokens_to_graph_tier speculative_accept_threshold_single "
            "speculative_accept_threshold_acc speculative_use_rejection_sampling speculative_token_map "
            "speculative_attention_mode speculative_dsa_topk_backend "
            "speculative_draft_kv_cache_dtype speculative_draft_window_size speculative_draft_sink_size "
            "speculative_moe_runner_backend speculative_moe_a2a_backend speculative_enable_w4a4_mxfp4_megamoe "
            "speculative_draft_model_quantization speculative_adaptive "
            "speculative_adaptive_config spec_trace_dir speculative_ngram_min_bfs_breadth "
            "speculative_ngram_max_bfs_breadth speculative_ngram_match_type speculative_ngram_max_trie_depth "
            "speculative_ngram_capacity speculative_ngram_external_corpus_path speculative_ngram_external_sam_budget "
            "speculative_ngram_external_corpus_max_tokens speculative_domino_candidate_pool_size "
            "speculative_use_block_verification speculative_skip_dp_mlp_sync",
            "of the draft model, or of decode servers, which draft; go with --speculative-algorithm",
        ),
    ),
)

ADAPTER: Final = Group(
    "LoRA",
    ("lora",),
    (
        leave(
            "enable_lora lora_paths max_loras_per_batch",
            "adapters of live prefills and of streams keep their slots; requests whose adapters find none wait",
        ),
        refuse("lora_backend", LORA_KERNELS, other_than(*CHECKED_LORA_BACKENDS)),
        put(
            "enable_lora_overlap_loading",
            None,
            "an adapter is loaded when its prefill starts: nothing would tell FlowPrefill that it has been loaded",
            default=None,
        ),
        leave(
            "lora_drain_wait_threshold",
            "0 stands for --flowprefill-max-starvation-s: no request waits longer for slots that streams have until "
            "one of their adapters takes no more requests",
            ("unified",),
        ),
        leave("lora_drain_wait_threshold", f"{NO_EFFECT}: slots are free when prefills have ended", ("prefill",)),
        leave("max_lora_rank lora_target_modules max_loaded_loras lora_eviction_policy lora_strict_loading"),
        leave("max_lora_chunk_size"),
        refuse("lora_use_virtual_experts", EXPERT_ADAPTERS),
        leave("experts_shared_outer_loras", f"{NO_EFFECT}: adapters of experts are refused"),
    ),
)

DIFFUSION: Final = Group(
    "Diffusion models",
    ("exec.dllm",),
    (
        refuse("dllm_algorithm", "a diffusion model has no prefill that ends with a first token"),
        leave("dllm_algorithm_config dllm_fdfo", "go with --dllm-algorithm, which is refused"),
    ),
)

OFFLOADING: Final = Group(
    "Offloading of weights",
    ("exec.offload",),
    (
        refuse("offload_group_size", "a layer fetches the weights of a later one in the same forward pass", POSITIVE),
        leave(
            "offload_num_in_group offload_prefetch_step offload_mode",
            "go with --offload-group-size, which is refused above 0",
        ),
        leave("cpu_offload_gb ple_offload_embedding ple_offload_backend ple_offload_dir"),
    ),
)

OTHERS: Final = Group(
    "Of other groups",
    (),
    (
        put(
            "tokenizer_worker_num",
            1,
            f"{HTTP}, whose workers load no plugins",
            default=1,
        ),
        refuse(("smg_grpc_mode", "grpc_mode"), HTTP),
        leave(
            "grpc_port",
            "gRPC beside HTTP: OpenAI requests get objectives as those of HTTP do, SGLang's own by their priority "
            "alone. For one server a machine: several would get the same port",
        ),
        refuse("use_ray", "the scheduler has to be a process of this machine"),
        refuse("is_embedding", "an embedding has no first token"),
        refuse("enable_streaming_session", "a session's requests have to run in order"),
        refuse("enable_encoder_swa_bounded_replay", ONE_CHUNK),
        refuse("enable_forward_pass_metrics", "its timer takes one forward pass at a time"),
        refuse("enable_return_routed_experts", "the experts of all forward passes are kept in one buffer"),
        refuse("enable_return_indexer_topk", "the indices of all forward passes are kept in one buffer"),
        refuse("kv_canary", "it checks one forward pass at a time"),
    ),
)

DECODE_SERVERS: Final = Group(
    "Decode servers",
    (),
    (
        put(
            "tokenizer_worker_num",
            1,
            "workers load no plugins: a request that comes by one would have neither a deadline nor a report",
            default=1,
        ),
    ),
)
"""The rows of servers that only decode, which keep all other options."""

TABLE: Final = (
    SCHEDULING,
    GRAPHS,
    OVERLAP,
    DISAGGREGATION,
    CACHES,
    PARALLEL,
    EXPERT_PARALLEL,
    KERNELS,
    SPECULATION,
    ADAPTER,
    DIFFUSION,
    OFFLOADING,
    OTHERS,
)
ROWS: Final = tuple(row for group in TABLE for row in group.rows)

UNSET_ENVIRONMENT: Final = {"SGLANG_SCHEDULER_DECREASE_PREFILL_IDLE": NOT_DELAYED}
"""Variable by which SGLang changes an option that FlowPrefill sets: why it is taken out of the environment."""
REFUSED_ENVIRONMENT: Final = {
    "SGLANG_ENABLE_METRICS_DEVICE_TIMER": "its timer takes one forward pass at a time",
    "SGLANG_ENABLE_GRAPH_POOL_BORROW": "log probabilities of a suspended prefill would lie in memory of graphs "
    "that others replay",
    "SGLANG_RUST_SERVER": f"{HTTP} in Python, and what arrives from the other wakes nobody",
    "SGLANG_DISAGG_STAGING_BUFFER": ONE_CHUNK,
}
"""Variable that SGLang reads: why FlowPrefill refuses it when it is on."""
OF_PREFILL_SERVERS: Final = ("SGLANG_DISAGG_STAGING_BUFFER",)
"""Those of them that only prefill servers read."""
READ_OPTIONS: Final = ("disaggregation_mode", "disable_cuda_graph", "disable_prefill_cuda_graph", "device")
"""Fields of ServerArgs that are read beside those that are set or refused."""
