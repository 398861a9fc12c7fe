"""Which options of SGLang no server of FlowPrefill starts with, by name: here, and not taken from the code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Final

import pytest

from sgl_flowprefill.compat import incompatible_option, take_over

LAUNCHED: Final = {
    "disaggregation_mode": "prefill",
    "disaggregation_transfer_backend": "nixl",
    "disable_overlap_schedule": False,
    "cuda_graph_backend_prefill": None,
    "chunked_prefill_size": None,
    "schedule_policy": "fcfs",
    "device": None,
    "tp_size": 1,
}
MODES: Final = {"prefill": ("prefill",), "unified": ("null",), "both": ("prefill", "null")}

REFUSED: Final = (
    ("both", "speculative_algorithm", "NGRAM"),
    ("unified", "speculative_algorithm", "EAGLE"),
    ("both", "enable_multi_layer_eagle", True),
    ("both", "speculative_draft_attention_backend", "fa4"),
    ("both", "enable_unified_memory", True),
    ("both", "hicache_host_memory_mode", "buffer_only"),
    ("both", "enable_lmcache", True),
    ("both", "enable_flexkv", True),
    ("both", "enable_unified_cache_external_linker", True),
    ("both", "lora_backend", "triton_v2"),
    ("both", "lora_use_virtual_experts", True),
    ("both", "enable_streaming_session", True),
    ("both", "dllm_algorithm", "LowConfidence"),
    ("both", "is_embedding", True),
    ("both", "encoder_only", True),
    ("both", "language_only", True),
    ("both", "enable_forward_pass_metrics", True),
    ("both", "expert_distribution_recorder_mode", "per_token"),
    ("both", "enable_return_routed_experts", True),
    ("both", "enable_return_indexer_topk", True),
    ("both", "kv_canary", "log"),
    ("both", "use_ray", True),
    ("both", "smg_grpc_mode", True),
    ("both", "grpc_mode", True),
    ("both", "enable_dp_attention_local_control_broadcast", True),
    ("both", "pp_size", 2),
    ("both", "dp_size", 2),
    ("both", "attn_dp_size", 2),
    ("both", "attn_cp_size", 2),
    ("both", "attention_backend", "trtllm_mha"),
    ("both", "prefill_attention_backend", "fa4"),
    ("both", "enable_pd_role_switch", True),
    ("prefill", "enable_pdmux", True),
    ("unified", "enable_hisparse", True),
    ("prefill", "disaggregation_transfer_backend", "mori"),
)
"""Kind of server, option, and a value that it is refused with: what a user asks for would not be there otherwise."""

KEPT_OUT: Final = (
    ("both", "disable_overlap_schedule", False),
    ("both", "chunked_prefill_size", 2048),
    ("both", "schedule_policy", "lpm"),
    ("both", "cuda_graph_backend_prefill", "full"),
    ("both", "enable_mixed_chunk", True),
    ("both", "enable_dynamic_chunking", True),
    ("both", "enable_prefill_delayer", True),
    ("both", "enable_two_batch_overlap", True),
    ("both", "enable_single_batch_overlap", True),
    ("both", "enable_torch_compile", True),
    ("both", "tokenizer_worker_num", 2),
    ("unified", "enable_pdmux", True),
    ("unified", "min_free_slots_delay", 2),
    ("unified", "prefill_decode_interval", 4),
    ("prefill", "optimistic_prefill_attempts", 2),
)
"""The same of what decides when a prompt runs and in which pieces: the server is refused, or runs without it."""

VARIABLES: Final = (
    ("both", "SGLANG_ENABLE_METRICS_DEVICE_TIMER"),
    ("both", "SGLANG_ENABLE_GRAPH_POOL_BORROW"),
    ("both", "SGLANG_RUST_SERVER"),
    ("prefill", "SGLANG_DISAGG_STAGING_BUFFER"),
)


def each_mode(*cases: tuple[str, str, Any]) -> list[Any]:
    return [
        pytest.param(mode, option, value, id=f"{option}, {mode}")
        for kind, option, value in cases
        for mode in MODES[kind]
    ]


def started(mode: str, **options: Any) -> SimpleNamespace:
    """The options of a server, after what FlowPrefill sets itself."""
    server_args = SimpleNamespace(**(LAUNCHED | {"disaggregation_mode": mode} | options))
    take_over(server_args)
    return server_args


@pytest.mark.parametrize("mode", MODES["both"])
def test_a_server_as_it_comes_starts(mode: str) -> None:
    assert incompatible_option(started(mode), {}) is None


@pytest.mark.parametrize(("mode", "option", "value"), each_mode(*REFUSED))
def test_an_option_that_cannot_work_is_refused_by_name(mode: str, option: str, value: Any) -> None:
    refusal = incompatible_option(started(mode, **{option: value}), {})
    assert refusal is not None
    assert refusal.startswith("--" + option.replace("_", "-"))
    assert "cannot work with FlowPrefill: " in refusal


@pytest.mark.parametrize(("mode", "option", "value"), each_mode(*KEPT_OUT))
def test_an_option_that_schedules_otherwise_is_refused_or_set_back(mode: str, option: str, value: Any) -> None:
    server_args = started(mode, **{option: value})
    assert incompatible_option(server_args, {}) is not None or getattr(server_args, option) != value


@pytest.mark.parametrize(("mode", "name"), [(mode, name) for kind, name in VARIABLES for mode in MODES[kind]])
def test_a_variable_that_cannot_work_is_refused_by_name(mode: str, name: str) -> None:
    refusal = incompatible_option(started(mode), {name: "true"})
    assert refusal is not None
    assert refusal.startswith(f"{name}=true cannot work with FlowPrefill: ")
    assert incompatible_option(started(mode), {name: "0"}) is None


def test_staging_buffers_say_nothing_to_a_server_that_sends_no_kv_cache() -> None:
    assert incompatible_option(started("null"), {"SGLANG_DISAGG_STAGING_BUFFER": "1"}) is None
