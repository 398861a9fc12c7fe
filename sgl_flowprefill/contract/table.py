"""Every symbol of SGLang that this project overrides, hooks, calls or reads, by the part of the project that needs it.

``tests/unit/test_contract_complete.py`` compares the table with the code: what the code uses is here, and what is here
the code uses. A row goes to its part's file in ``contract/parts/``; a new part is a file there, named here.
"""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.parts import (
    adapters,
    affinity,
    answer_report,
    attention,
    before_0_5_23,
    caches,
    cpu_attention,
    cpu_tp,
    data_parallel,
    decode_idle,
    decode_order,
    disaggregation,
    dp_attention_cpu,
    draft_cpu,
    draft_model,
    forward_state,
    frontend,
    health,
    hicache_cpu,
    hooks,
    host_cache,
    launcher,
    live,
    lone_prefill,
    loop,
    lora_cpu,
    made_weights,
    model,
    nixl_dram,
    nixl_sleep,
    options,
    overload,
    platform,
    profile,
    request_slo,
    request_spans,
    request_times,
    requests,
    scheduler,
    token_ids,
    unified,
    wakeups,
)
from sgl_flowprefill.contract.row import Part

PARTS: Final[tuple[Part, ...]] = (
    hooks.PART,
    # the HTTP server
    options.PART,
    request_slo.PART,
    answer_report.PART,
    overload.PART,
    health.PART,
    live.PART,
    request_times.PART,
    token_ids.PART,
    # the scheduler process
    loop.PART,
    scheduler.PART,
    unified.PART,
    requests.PART,
    request_spans.PART,
    disaggregation.PART,
    data_parallel.PART,
    wakeups.PART,
    caches.PART,
    host_cache.PART,
    adapters.PART,
    draft_model.PART,
    forward_state.PART,
    model.PART,
    attention.PART,
    decode_order.PART,
    decode_idle.PART,
    affinity.PART,
    before_0_5_23.PART,
    # the portable CPU platform
    platform.PART,
    cpu_attention.PART,
    cpu_tp.PART,
    hicache_cpu.PART,
    lora_cpu.PART,
    draft_cpu.PART,
    dp_attention_cpu.PART,
    nixl_dram.PART,
    nixl_sleep.PART,
    # without a server
    profile.PART,
    made_weights.PART,
    lone_prefill.PART,
    launcher.PART,
    frontend.PART,
)
