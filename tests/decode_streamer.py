"""A decode server's way of answers to its clients, without a server."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.managers.scheduler_components import output_streamer
from sglang.srt.sampling.sampling_params import SamplingParams
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from sgl_flowprefill.runtime import decode_scheduler
from sgl_flowprefill.runtime.decode_scheduler import DecodeStreamer
from sgl_flowprefill.slo import Objective


def decoding(rid: str, received_s: float, stream: bool = False, **times_s: float) -> Any:
    """SGLang's request at a decode server, which the HTTP server has received then, with ``times_s`` of SGLang."""
    promised = Objective(0.3, 0.1, "chat", "body").to_custom_params()
    sampling = SamplingParams(max_new_tokens=3, custom_params=promised)
    sampling.normalize(None)
    req = Req(rid, "", array("q", [1, 2, 3]), sampling, stream=stream, vocab_size=100, bootstrap_room=7)
    req.time_stats = SimpleNamespace(flowprefill_received_s=received_s, **times_s)
    return req


def decode_streamer(monkeypatch: pytest.MonkeyPatch, sent: list[Any], node_rank: int = 0) -> DecodeStreamer:
    """One on this node that hands messages for clients to ``sent``."""
    serving = SimpleNamespace(stream_interval=1, weight_version="default")
    monkeypatch.setattr(output_streamer, "get_serving", lambda: serving)
    monkeypatch.setattr(output_streamer, "get_parallel", lambda: SimpleNamespace(dp_rank=None, attn_tp_rank=1))
    monkeypatch.setattr(decode_scheduler, "get_parallel", lambda: SimpleNamespace(node_rank=node_rank))
    nothing: Any = None
    return DecodeStreamer(
        send_to_detokenizer=SimpleNamespace(send_output=sent.append),
        tree_cache=nothing,
        server_args=nothing,
        is_generation=True,
        spec_algorithm=SpeculativeAlgorithm.NONE,
        disaggregation_mode=DisaggregationMode.DECODE,
        enable_hicache_storage=lambda: False,
    )
