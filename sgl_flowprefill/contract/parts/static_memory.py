"""Rows of the contract: how much of a GPU's memory becomes KV cache, where the user has not said it."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import OPTIONS

MEMORY_HOOK: Final = "sglang.srt.arg_groups.memory_hook:"
CONFIGURATOR: Final = "sglang.srt.mem_cache.kv_cache_configurator:KVCacheConfigurator"
NO_START: Final = "servers do not start on small GPUs, or with a small KV cache, without --mem-fraction-static"

PART: Final = Part(
    "static_memory",
    "Memory for the KV cache",
    ("HTTP server", "scheduler"),
    (
        source(
            "hooks",
            f"{MEMORY_HOOK}handle_gpu_memory_settings",
            ["max(cfg.max_prefill_tokens, 2048)", "mem_fraction_static=mem_fraction_static"],
            "reserves memory for each token of --max-prefill-tokens where prompts are not chunked",
            NO_START,
            "(server_args)",
        ),
        source(
            "assumes",
            "sglang.srt.arg_groups.pipeline:run_resolution_pipeline",
            ["_raw_input = {", "import handle_gpu_memory_settings"],
            "keeps what the user has given, and looks that function up when it calls it",
            NO_START,
        ),
        *rows(
            "calls",
            MEMORY_HOOK,
            "reserve_for_graph_mb(server_args) reserve_for_deepep_a2a_mb(server_args) "
            "adjust_mem_fraction_for_vlm(mem_fraction_static, model_config, post_capture_kv_sizing, gpu_mem)",
            "says what SGLang reserves for CUDA graphs, experts and encoders",
            NO_START,
        ),
        *rows(
            "calls",
            "sglang.srt.arg_groups.overrides:",
            "declare_resolution(server_args, source, ...) model_config_of(server_args)",
            "takes the share that is chosen, and has the model's configuration",
            NO_START,
        ),
        *rows(
            "calls",
            "sglang.srt.utils.common:",
            "get_device_memory_capacity(device)",
            "says how much memory a GPU has",
            NO_START,
        ),
        *rows(
            "calls",
            "sglang.srt.distributed.parallel_state:",
            "get_world_group()",
            "are all ranks, which have pools of the same size",
            NO_START,
        ),
        *attributes(
            OPTIONS,
            "mem_fraction_static prefill_attention_backend speculative_algorithm tp_size pp_size attn_dp_size nnodes "
            "enable_lora lora_paths cuda_graph_config language_only language_model_only",
            "says what is needed beside the KV cache",
            NO_START,
        ),
        source(
            "hooks",
            f"{CONFIGURATOR}.config_from_budget",
            ["calculate_pool_sizes("],
            "makes a KV pool of the bytes that it is given",
            NO_START,
            "(self, budget_bytes, ...)",
        ),
        source(
            "assumes",
            f"{CONFIGURATOR}._resolve_memory_pool_config",
            ["self._profile_available_bytes(pre_model_load_memory)", "self.config_from_budget(available_bytes)"],
            "gives it what is free within --mem-fraction-static when the weights have been loaded",
            NO_START,
        ),
        *attributes(
            CONFIGURATOR,
            "device model_config model_dtype server_args sliding_window_size spec_aux_config",
            "knows the model and the server's options",
            NO_START,
        ),
        *attributes(
            "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
            "max_total_num_tokens",
            "says how many tokens a pool has",
            NO_START,
        ),
        *attributes(
            "sglang.srt.configs.model_config:ModelConfig",
            "is_multimodal",
            "tells what a prompt needs beside its KV cache",
            NO_START,
        ),
    ),
)
