"""Which decode steps can be queued while another one runs, as SGLang prepares them."""

from __future__ import annotations

import math
from typing import Any

from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool


def needs_last_tokens(batch: Any) -> bool:
    """Whether what the next step of ``batch`` samples depends on what the host does with the last tokens: grammars,
    penalties and the logit processors of clients look at them.
    """
    sampling_info = batch.sampling_info
    return bool(
        batch.has_grammar
        or sampling_info.penalizer_orchestrator.is_required
        or sampling_info.has_custom_logit_processor
    )


def most_streams(model_runner: Any) -> float:
    """How many streams a step may have that is queued without waiting for the device; infinity for any number.

    FlashInfer reads back from the device how long its requests are, but for a step that runs as a CUDA graph, and,
    where layers with a sliding window have a KV pool of their own, how many of its slots there are (SGLang's
    ``FlashInferIndicesUpdaterDecode.call_begin_forward``). The host waits for the step in flight there, so that
    little is gained ahead of its end, and whoever arrives meanwhile waits for both.
    """
    if model_runner.decode_attention_backend_str != "flashinfer":
        return math.inf
    graphs = model_runner.decode_cuda_graph_runner
    if isinstance(model_runner.token_to_kv_pool, SWAKVPool) or graphs in (None, model_runner.eager_runner):
        return 0
    return int(max(graphs.capture_bs))
