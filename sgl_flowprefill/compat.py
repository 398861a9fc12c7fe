"""SGLang options of a server that prefills that FlowPrefill sets itself, or refuses with a sentence.

Reads any object with the fields of SGLang 0.5.23's ``ServerArgs``: its record, or the namespace of its command line
parser. Imports nothing of SGLang.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

OWN_SETTINGS: Final = {
    "disable_overlap_schedule": (True, "it decides at every event, not one batch ahead"),
    "chunked_prefill_size": (-1, "a prompt is prefilled whole and suspended when it has to wait"),
    "cuda_graph_backend_prefill": ("disabled", "a captured graph cannot be suspended between its operators"),
    "schedule_policy": ("fcfs", "requests are ordered by their slack (see --flowprefill-policy)"),
}
"""Field of ServerArgs: what FlowPrefill sets it to, and why."""

OWN_SETTINGS_OF_UNIFIED_SERVERS: Final = {
    "prefill_decode_interval": (
        0,
        "decode steps start when the objectives of their streams ask for it (see --flowprefill-default-tbt-slo)",
    ),
}
"""What FlowPrefill sets besides on servers that prefill and decode, and why."""

READ_SETTINGS: Final = (
    "disaggregation_mode",
    "disaggregation_transfer_backend",
    "attention_backend",
    "prefill_attention_backend",
    "disable_cuda_graph",
    "disable_prefill_cuda_graph",
    "cuda_graph_config",
    "device",
)
"""Fields of ServerArgs that are read beside those."""

TRANSFER_BACKENDS: Final = ("nixl", "mooncake")

CHECKED_ATTENTION_BACKENDS: Final = ("flashinfer", "fa3", "triton", "flowprefill_cpu", "torch_native")
"""Backends of which several instances can be live at once (tests/unit/test_gpu_contracts.py)."""

REFUSED_WHEN_SET: Final = {
    "speculative_algorithm": "a draft model's forward passes have no preemption checkpoints",
    "enable_dynamic_chunking": "a prompt is prefilled whole and suspended when it has to wait",
    "enable_prefill_delayer": "requests are started by their slack, not delayed",
    "enable_priority_scheduling": "requests are ordered by their slack (see --flowprefill-policy)",
    "enable_dp_attention": "its ranks have to run the same number of forward passes",
    "enable_two_batch_overlap": "it interleaves two batches inside of one forward pass",
    "enable_single_batch_overlap": "it interleaves operators inside of one forward pass",
    "enable_unified_memory": "it moves the KV cache of a suspended prefill, which writes on to where that was",
    "enable_torch_compile": "a compiled model has no boundaries between its operators",
    "enable_hierarchical_cache": "its transfers are tied to SGLang's own scheduling of batches",
    "enable_lmcache": "its transfers are tied to SGLang's own scheduling of batches",
    "enable_flexkv": "its transfers are tied to SGLang's own scheduling of batches",
    "enable_unified_cache_external_linker": "its transfers are tied to SGLang's own scheduling of batches",
    "enable_lora": "the adapters of suspended tasks would have to stay loaded",
    "lora_paths": "the adapters of suspended tasks would have to stay loaded",
    "enable_streaming_session": "a session's requests have to run in order",
    "dllm_algorithm": "a diffusion model has no prefill that ends with a first token",
    "is_embedding": "an embedding has no first token",
    "encoder_only": "an encoder has no first token",
    "language_only": "embeddings arrive from its encoders at sockets of their own, which wake nobody",
    "enable_forward_pass_metrics": "its timer takes one forward pass at a time",
    "enable_eplb": "the experts of one forward pass at a time are counted",
    "expert_distribution_recorder_mode": "the experts of one forward pass at a time are counted",
    "enable_return_routed_experts": "the experts of all forward passes are kept in one buffer",
    "enable_return_indexer_topk": "the indices of all forward passes are kept in one buffer",
    "kv_canary": "it checks one forward pass at a time",
    "use_ray": "the scheduler has to be a process of this machine",
    "smg_grpc_mode": "the objective of a request is checked by the HTTP server",
    "grpc_mode": "the objective of a request is checked by the HTTP server",
}
"""Field of ServerArgs: why FlowPrefill refuses a value other than None, False, 0, "none" or nothing."""

REFUSED_ON_PREFILL_SERVERS: Final = {
    "enable_mixed_chunk": "a prefill server has no decode steps to mix in",
    "enable_pdmux": "it runs prefill and decode in one process",
    "enable_pd_role_switch": "the server has to stay a prefill server",
    "optimistic_prefill_attempts": "a prefill starts once the decode server has reserved its KV cache",
}
"""What FlowPrefill refuses besides on servers that prefill and do not decode."""

REFUSED_ON_UNIFIED_SERVERS: Final = {
    "enable_mixed_chunk": "decode steps run between the operators of prefills and are no part of their batches",
    "enable_pdmux": "it divides the device between prefills and decodes, which here take turns",
    "enable_pd_role_switch": "the server has to go on to prefill and decode",
    "min_free_slots_delay": "requests are started by their slack, not delayed",
    "enable_hisparse": "its transition from prefill to decode is tied to SGLang's own scheduling of batches",
}
"""What FlowPrefill refuses besides on servers that prefill and decode."""

REFUSED_ABOVE_ONE: Final = {
    "pp_size": "a pipeline's stages cannot be suspended together",
    "dp_size": "its ranks are replicas, one of which a request gets by its number; start as many prefill servers, for "
    "which launch.py has --prefill N",
    "attn_dp_size": "its ranks have to run the same number of forward passes",
    "attn_cp_size": "context parallelism is not supported",
    "tokenizer_worker_num": "the objective of a request is checked by the HTTP server, whose workers load no plugins",
}

REFUSED_ENVIRONMENT: Final = {
    "SGLANG_ENABLE_METRICS_DEVICE_TIMER": "its timer takes one forward pass at a time",
    "SGLANG_ENABLE_GRAPH_POOL_BORROW": "log probabilities of a suspended prefill would lie in memory of graphs "
    "that others replay",
    "SGLANG_RUST_SERVER": "the objective of a request is checked by the Python HTTP server, and what arrives from the "
    "other wakes nobody",
}
"""Variable that SGLang reads: why FlowPrefill refuses it when it is on."""


def take_over(server_args: Any) -> list[str]:
    """Set what FlowPrefill works with in the options of a server, before SGLang resolves them; a line for each
    that was set to something else.
    """
    lines = []
    is_unified = getattr(server_args, "disaggregation_mode", None) == "null"
    for field, (needed, reason) in (OWN_SETTINGS | (OWN_SETTINGS_OF_UNIFIED_SERVERS if is_unified else {})).items():
        given = getattr(server_args, field, None)
        if given != needed:
            setattr(server_args, field, needed)
            was = "not set" if given is None else given
            lines.append(f"--{field.replace('_', '-')} is {needed} (was {was}): {reason}")
    graphs = getattr(server_args, "cuda_graph_config", None)
    if isinstance(graphs, dict) and "backend" in (graphs.get("prefill") or {}):
        prefill = {key: value for key, value in graphs["prefill"].items() if key != "backend"}
        server_args.cuda_graph_config = {**graphs, "prefill": prefill}
        reason = OWN_SETTINGS["cuda_graph_backend_prefill"][1]
        lines.append(
            f"--cuda-graph-config says nothing of prefill.backend (was {graphs['prefill']['backend']}): {reason}"
        )
    return lines


def incompatible_option(server_args: Any, env: Mapping[str, str] | None = None) -> str | None:
    """One sentence about the first option of a server that cannot work with FlowPrefill, or variable of its
    environment (default: this process's), or None.
    """
    env = os.environ if env is None else env

    def value(field: str) -> Any:
        return getattr(server_args, field, None)

    def flag(field: str) -> str:
        return "--" + field.replace("_", "-")

    mode = value("disaggregation_mode")
    if mode not in ("prefill", "null"):
        return f"FlowPrefill schedules prefills: --disaggregation-mode has to be prefill or null, not {mode}"
    is_unified = mode == "null"
    backend = value("disaggregation_transfer_backend")
    if not is_unified and backend not in TRANSFER_BACKENDS:
        return f"--disaggregation-transfer-backend {backend} cannot work with FlowPrefill: use nixl"
    refused = REFUSED_WHEN_SET | (REFUSED_ON_UNIFIED_SERVERS if is_unified else REFUSED_ON_PREFILL_SERVERS)
    for field, reason in refused.items():
        if value(field) and value(field) != "none":
            given = flag(field) if value(field) is True else f"{flag(field)} {value(field)}"
            return f"{given} cannot work with FlowPrefill: {reason}"
    for field, reason in REFUSED_ABOVE_ONE.items():
        if (value(field) or 1) > 1:
            return f"{flag(field)} {value(field)} cannot work with FlowPrefill: {reason}"
    for name, reason in REFUSED_ENVIRONMENT.items():
        if env.get(name, "").lower() in ("1", "true", "yes", "y"):
            return f"{name}={env[name]} cannot work with FlowPrefill: {reason}; unset it"
    for field in ("attention_backend", "prefill_attention_backend"):
        unchecked = unchecked_attention_backend(value(field), flag(field))
        if unchecked is not None:
            return unchecked
    if value("schedule_policy") not in (None, "fcfs"):
        return (
            f"--schedule-policy {value('schedule_policy')} cannot work with FlowPrefill: "
            "requests are ordered by their slack (see --flowprefill-policy)"
        )
    chunk = value("chunked_prefill_size")
    if chunk is None or chunk > 0:
        given = "" if chunk is None else f", not {chunk}"
        return (
            f"FlowPrefill needs --chunked-prefill-size -1{given}: a prompt is prefilled whole and suspended when it "
            "has to wait"
        )
    if not value("disable_overlap_schedule"):
        return "FlowPrefill needs --disable-overlap-schedule: it decides at every event, not one batch ahead"
    graphs_off = value("disable_cuda_graph") or value("disable_prefill_cuda_graph")
    if value("device") != "cpu" and value("cuda_graph_backend_prefill") != "disabled" and not graphs_off:
        return (
            "FlowPrefill needs --cuda-graph-backend-prefill disabled: a captured graph cannot be suspended between its "
            "operators"
        )
    return None


def unchecked_attention_backend(name: str | None, flag: str = "--attention-backend") -> str | None:
    """One sentence about an attention backend that is not known to keep the batches of suspended tasks apart."""
    if name is None or name in CHECKED_ATTENTION_BACKENDS:
        return None
    return (
        f"{flag} {name} cannot work with FlowPrefill: it has not been checked to keep the batches of suspended "
        "prefills apart; use flashinfer, fa3 or triton"
    )
