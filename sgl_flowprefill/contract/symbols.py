"""Symbols of SGLang that several parts of the contract have rows of."""

from __future__ import annotations

from typing import Final

SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
REQ: Final = "sglang.srt.managers.schedule_batch:Req"
FORWARD_BATCH: Final = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
FORWARD_MODE: Final = "sglang.srt.model_executor.forward_batch_info:ForwardMode"
MODEL_RUNNER: Final = "sglang.srt.model_executor.model_runner:ModelRunner"
BACKENDS: Final = "sglang.srt.layers.attention"
LAYER: Final = "sglang.srt.layers.radix_attention:RadixAttention"
HTTP: Final = "sglang.srt.entrypoints.http_server:"
TIMES: Final = "sglang.srt.observability.req_time_stats:"
CONTEXT: Final = "sglang.srt.runtime_context:"
OPTIONS: Final = "sglang.srt.arg_groups.fields:*"
"""Fields of ``ServerArgs``, which SGLang assembles from the classes of these modules."""
DECODE_QUEUE: Final = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
