"""Rows of the contract: requests and batches."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import REQ, TIMES

SCHEDULE_BATCH: Final = "sglang.srt.managers.schedule_batch:ScheduleBatch"
RESULT: Final = "sglang.srt.managers.utils:GenerationBatchResult"
UNKNOWN_WAITS: Final = "the event log of a decode server does not say where its requests waited"

PART: Final = Part(
    "requests",
    "Requests and batches",
    ("scheduler",),
    (
        *rows(
            "calls",
            REQ,
            "finished(self) init_next_round_input(self, tree_cache, cow_mamba, ...)",
            "matches a request's prefix, and tells whether it is over",
            "cached prefixes are unknown to the policy",
        ),
        *attributes(
            REQ,
            "rid origin_input_ids origin_input_ids_unpadded prefix_len return_logprob logprob_start_len "
            "sampling_params bootstrap_room priority",
            "says how much a request computes, and what it asks for",
            "prefill times and deadlines cannot be told",
        ),
        *attributes(
            REQ,
            "to_finish finished_reason",
            "is how a request ends otherwise than by its result",
            "requests of a prefill that has failed are not answered",
        ),
        *attributes(
            REQ,
            "grammar grammar_wait_ct",
            "is the grammar that a request waits for",
            "requests with grammars are not started",
        ),
        *attributes(
            REQ,
            "kv",
            "holds a request's KV cache",
            "KV indices may be read before they are there",
        ),
        *attributes(
            "sglang.srt.managers.schedule_batch:ReqKvInfo",
            "cache_protected_len",
            "says how much of a request's KV is the radix cache's",
            "KV indices may be read before they are there",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.schedule_batch:",
            "FINISH_ABORT FINISH_ABORT.__init__(self, message, status_code, err_type)",
            "answers a request with an error",
            "requests of a prefill that has failed are not answered",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.schedule_batch:",
            "FINISH_ABORT.to_json(self)",
            "says why a request has ended",
            "requests do not end in the event log",
        ),
        *attributes(
            f"{TIMES}SchedulerReqTimeStats",
            "trace_ctx",
            "is a request's trace, which ends when the request is refused",
            "an overloaded server cannot shed",
        ),
        *rows(
            "calls",
            f"{TIMES}SchedulerReqTimeStats",
            "set_completion_time(self, ...)",
            "is what SGLang expects of a request that ends",
            "an aborted request cannot be answered",
        ),
        *rows(
            "calls",
            f"{TIMES}SchedulerReqTimeStats",
            "set_wait_queue_entry_time(self, ...)",
            "is what SGLang expects of a request that waits again",
            "a started prefill cannot be given back, so streams are retracted or aborted in its place",
        ),
        *attributes(
            f"{TIMES}SchedulerReqTimeStats",
            "decode_prealloc_queue_entry_time decode_transfer_queue_entry_time wait_queue_entry_time",
            "is when a request began to wait at a decode server, had a place there, and had its KV cache",
            UNKNOWN_WAITS,
        ),
        source(
            "assumes",
            f"{TIMES}SchedulerReqTimeStats.set_decode_transfer_queue_entry_time",
            ["time.perf_counter()", "self.decode_transfer_queue_entry_time = ts"],
            "takes the time of a place at a decode server from the monotonic clock",
            UNKNOWN_WAITS,
        ),
        source(
            "assumes",
            f"{TIMES}SchedulerReqTimeStats.set_wait_queue_entry_time",
            ["time.perf_counter()", "self.wait_queue_entry_time = ts"],
            "takes the time at which KV cache had come, or a request was retracted, from the monotonic clock",
            UNKNOWN_WAITS,
        ),
        *attributes(
            "sglang.srt.sampling.sampling_params:SamplingParams",
            "custom_params",
            "is where a request's objective is",
            "all requests get the default objective",
        ),
        *attributes(
            SCHEDULE_BATCH,
            "reqs extend_lens prefix_lens batch_is_full return_logprob return_hidden_states",
            "says what a started batch computes",
            "prefill times cannot be told",
        ),
        *attributes(
            "sglang.srt.managers.schedule_batch:NextBatchPlan",
            "batch_to_run",
            "is the batch that SGLang has admitted",
            "no prefill can start",
        ),
        *rows(
            "calls",
            RESULT,
            "copy_to_cpu(self, return_logprob, return_hidden_states)",
            "copies a result to the host while the next prefill runs",
            "the host waits for each prefill",
        ),
        *attributes(
            RESULT,
            "copy_done next_token_ids",
            "tells when a result has arrived",
            "the host waits for each prefill",
        ),
        *attributes(
            "sglang.srt.managers.io_struct:AbortReq",
            "rid abort_all finished_reason",
            "says which requests are given up, and why",
            "aborted requests do not end in the event log",
        ),
        *rows(
            "reads",
            "sglang.srt.managers.io_struct:",
            "BeginWeightUpdateReqInput CheckWeightsReqInput EndWeightUpdateReqInput RpcReqInput "
            "ReleaseMemoryOccupationReqInput ResumeMemoryOccupationReqInput UpdateWeightFromDiskReqInput "
            "UpdateWeightsFromDistributedReqInput UpdateWeightsFromIPCReqInput UpdateWeightsFromTensorReqInput",
            "is a message that may put other weights where a prefill reads them",
            "weights change under suspended prefills",
        ),
        *rows(
            "reads",
            "sglang.srt.managers.io_struct:",
            "ExpertDistributionReq",
            "is a message that begins, ends or writes a record of experts",
            "records of experts have parts of prefills",
        ),
    ),
)
