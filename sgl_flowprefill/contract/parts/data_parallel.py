"""Rows of the contract: data-parallel attention."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import SCHEDULER, TIMES

GATHER: Final = "sglang.srt.layers.dp_attention:"
ADAPTER: Final = "sglang.srt.managers.scheduler_components.dp_attn:SchedulerDPAttnAdapter"
JOINT: Final = "the ranks of data-parallel attention wait for each other for ever"
TOKENS: Final = "a resumed prefill gathers another one's tokens"

PART: Final = Part(
    "data_parallel",
    "Data-parallel attention",
    ("scheduler",),
    (
        *rows(
            "calls",
            ADAPTER,
            "maybe_prepare_mlp_sync_batch(self, batch, ...)",
            "tells a batch how many tokens the other ranks have, and makes an idle one where this rank has none",
            JOINT,
        ),
        *attributes(SCHEDULER, "dp_attn_adapter", "does so", JOINT),
        *rows("calls", TIMES, "ReqTimeStatsBase", "is a request's that has no trace here", "servers do not trace"),
        *rows(
            "calls",
            GATHER,
            "set_dp_buffer_len(global_dp_buffer_len, local_dp_buffer_len, dp_max_padding, global_num_tokens, "
            "global_num_tokens_gpu)",
            "says how many tokens each rank has in the pass of all",
            TOKENS,
        ),
        *rows("reads", GATHER, "_DpGatheredBufferWrapper", "holds that", TOKENS),
        *attributes(
            f"{GATHER}_DpGatheredBufferWrapper",
            "_global_dp_buffer_len _local_dp_buffer_len _dp_max_padding _global_num_tokens _global_num_tokens_gpu",
            "holds how many tokens each rank has in the pass of all",
            TOKENS,
        ),
        source(
            "assumes",
            f"{SCHEDULER}.get_next_batch_to_run",
            ["ret = self.dp_attn_adapter.maybe_prepare_mlp_sync_batch(", "ret, need_sync=need_mlp_sync"],
            "makes an idle batch of a decode step at a rank that has no streams, and none where no rank has any",
            JOINT,
        ),
        source(
            "assumes",
            "sglang.srt.managers.scheduler_components.request_receiver:"
            "SchedulerRequestReceiver._broadcast_reqs_across_ranks",
            ["work_reqs = attn_cp_tp_broadcast_pyobj(work_reqs)", "src=tp_group.ranks[0]"],
            "leaves requests with their rank, and gives all other messages to all ranks in the same round",
            JOINT,
        ),
    ),
)
