"""Rows of the contract: servers that prefill and decode, beside what all servers of FlowPrefill do."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row, attributes, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER

SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
REQ: Final = "sglang.srt.managers.schedule_batch:Req"
BATCH: Final = "sglang.srt.managers.schedule_batch:ScheduleBatch"
ADDER: Final = "sglang.srt.managers.schedule_policy:PrefillAdder"
CHECKER: Final = "sglang.srt.managers.scheduler_components.invariant_checker:SchedulerInvariantChecker"
PROCESSOR: Final = "sglang.srt.managers.scheduler_components.batch_result_processor:SchedulerBatchResultProcessor"
POOLS: Final = "sglang.srt.mem_cache"
ALLOCATOR: Final = "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator"

LOOP_CALLS: Final = (
    "self.ingest_requests()",
    "self._engine_paused",
    "self.get_next_batch_to_run(",
    "self.running_batch = plan.running_batch",
    "self.run_batch(batch)",
    "self.process_batch_result(batch, result)",
    "self.on_idle()",
    "self.last_batch = batch",
    "self.invariant_checker.self_check_during_busy()",
)
"""What SGLang's loop does. The loop of the hub does all of it too, in an order of its own, and keeps no last batch."""

STEP_CALLS: Final = (
    "last_batch.forward_mode.is_extend()",
    "running_batch.merge_batch(last_batch)",
    "running_batch.filter_batch()",
    "self.get_new_batch_prefill(running_batch)",
    "self.update_running_batch(running_batch)",
    "self.ngram_embedding_manager.prepare_for_forward(",
    "return NextBatchPlan(batch_to_run=ret, running_batch=running_batch)",
)
"""What makes a decode step of SGLang's function for the next batch: finished prefills join, and none is started."""

NO_STEP_AHEAD: Final = "steps that are queued behind those in flight give streams wrong tokens, or end them twice"
STEP_RUNS: Final = (
    "resolve_forward_inputs(batch, self.future_map)",
    "batch_result = self.model_worker.forward_batch_generation(",
    "batch, batch.req_pool_indices, batch_result",
    "batch.input_ids = None",
)
"""A step takes its input from the batch, and takes it away when its tokens are where the next one finds its input."""
WATERMARKS: Final = "is there where tokens that are sampled change what is sampled next, beside the KV cache"

PART: Final = Part(
    "unified",
    "Servers that prefill and decode",
    ("scheduler",),
    (
        source(
            "overrides",
            f"{SCHEDULER}.event_loop_normal",
            LOOP_CALLS,
            "is the loop of a server without disaggregation, and FlowPrefill's does all that it does",
            "requests are not scheduled, or something that SGLang's loop has come to do is left out",
            "(self)",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "event_loop_overlap(self)",
            "must not run in the place of our loop",
            "a server with overlap schedule runs without FlowPrefill",
        ),
        source(
            "calls",
            f"{SCHEDULER}.get_next_batch_to_run",
            STEP_CALLS,
            "is the decode step: what has been prefilled joins, KV cache is found, and the batch is prepared",
            "streams get no tokens, or wrong ones",
            "(self, running_batch, last_batch)",
        ),
        source(
            "assumes",
            f"{SCHEDULER}.update_running_batch",
            [
                "batch.check_decode_mem()",
                "batch.retract_decode()",
                "self._add_request_to_queue(req, is_retracted=True)",
            ],
            "retracts streams where KV cache is short, and prefills are given back before",
            "streams are retracted, or end in an error, while prefills hold the KV cache",
        ),
        source(
            "overrides",
            f"{SCHEDULER}.get_new_batch_prefill",
            ["_get_new_batch_prefill_raw("],
            "starts prefills, which the hub alone does",
            "prefills are started within decode steps, and the hub does not know of them",
            "(self, running_batch)",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "get_prefill_adder_class(self)",
            "chooses who reserves KV cache for answers",
            "no KV cache is reserved for the answers of started prefills: streams are retracted all the time",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "get_num_allocatable_reqs(self, running_bs, ...)",
            "bounds the requests that run at a time",
            "more requests run than --max-running-requests",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "init_invariant_checker(self) init_load_inquirer(self)",
            "makes what looks at the running requests",
            "started prefills are taken for leaks, or are no load",
        ),
        *rows(
            "calls",
            SCHEDULER,
            "retire_unadmitted_request(self, req) _release_aborted_request(self, req)",
            "ends requests that are refused or aborted",
            "aborted prefills leak what they hold",
        ),
        *attributes(
            SCHEDULER,
            "last_batch invariant_checker load_inquirer token_to_kv_pool_allocator req_to_token_pool spec_algorithm "
            "_prev_prefill_end_ts",
            "is a part of SGLang's scheduler, or of its state, that decode steps work with",
            "streams get no tokens",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.scheduler:",
            "NextBatchPlan",
            "says what runs next",
            "streams get no tokens",
        ),
        *rows(
            "calls",
            BATCH,
            "filter_batch(self, ...) merge_batch(self, other) is_empty(self) prepare_for_decode(self) "
            "new_tokens_required_next_decode(self, ...)",
            "is how requests join and leave the running batch",
            "streams get no tokens, or wrong ones",
        ),
        *attributes(
            BATCH,
            "launch_ts after_idle_gap",
            "is when a batch was launched, by which SGLang measures its load",
            "the load that routers see counts decode steps as prefills",
        ),
        *attributes(
            REQ,
            "is_retracted output_ids to_finish beam_group seqlen",
            "is what a request has got so far",
            "retracted requests start anew, or get wrong answers",
        ),
        *attributes(
            REQ,
            "retraction_count",
            "is how often a stream was retracted, which clients are told",
            "clients take a prefill that was given back for a stream that was retracted",
        ),
        *rows("calls", REQ, "update_finish_state(self, ...)", "ends an aborted request", "aborted requests do not end"),
        *rows(
            "calls",
            "sglang.srt.managers.schedule_batch:",
            "release_req(req, remaing_req_count, req_to_token_pool, token_to_kv_pool_allocator, tree_cache, "
            "hisparse_coordinator, offload_kv)",
            "takes the KV cache of a request that will start again",
            "no prefill can be given back: streams are retracted or aborted in its place",
        ),
        *rows(
            "calls",
            "sglang.srt.mem_cache.common:",
            "release_kv_cache(req, tree_cache, checkpoint)",
            "frees the KV cache of a request, and does not give it to the radix cache",
            "KV cache that was not computed becomes a cached prefix",
        ),
        source(
            "overrides",
            f"{ADDER}.__init__",
            ["self._get_running_request_total_token_offset(r)", "for r in running_batch.reqs"],
            "reserves KV cache for the answers of the running batch, and here of all other started requests, too",
            "no KV cache is reserved for the answers of started prefills: streams are retracted all the time",
        ),
        *rows(
            "calls",
            ADDER,
            "_get_running_request_total_token_offset(self, req)",
            "says how much KV cache the rest of an answer is taken to need",
            "no KV cache is reserved for the answers of started prefills: streams are retracted all the time",
        ),
        *attributes(
            ADDER,
            "memory_budget",
            "holds what is reserved",
            "no KV cache is reserved for the answers of started prefills: streams are retracted all the time",
        ),
        *rows(
            "calls",
            ALLOCATOR,
            "check_decode_capacity(self, num_tokens, tree_cache, requests, spec_algorithm) available_size(self)",
            "says whether the next decode step has KV cache",
            "streams are retracted while prefills could give theirs back",
        ),
        source(
            "assumes",
            f"{SCHEDULER}.run_batch",
            STEP_RUNS,
            "runs a step again for which the device had no memory, if its input is still there",
            "a step that runs again reads tokens that it has sampled itself",
        ),
        *attributes(
            BATCH,
            "input_ids",
            "is there while a step has not put its tokens where the next one finds them",
            "no step can run again for which the device had no memory",
        ),
        *rows(
            "calls",
            f"{POOLS}.memory_pool:",
            "MHATokenToKVPool MLATokenToKVPool ReqToTokenPool",
            "holds KV cache, and nothing that a second run of a step would change",
            "no step can run again for which the device had no memory",
        ),
        *rows(
            "calls",
            f"{POOLS}.swa_memory_pool:",
            "SWAKVPool",
            "holds KV cache, and nothing that a second run of a step would change",
            "no step can run again for which the device had no memory",
        ),
        *attributes(
            MODEL_RUNNER,
            "watermark_state",
            WATERMARKS,
            "a step that runs again counts twice for watermarks",
            otherwise=Row(MODEL_RUNNER, "reads", WATERMARKS, "a step that runs again counts twice for watermarks"),
        ),
        *attributes(
            "sglang.srt.managers.utils:GenerationBatchResult",
            "logits_output",
            "has the logits of a step",
            "the logits of two steps take device memory",
        ),
        *attributes(
            "sglang.srt.layers.logits_processor:LogitsProcessorOutput",
            "next_token_logits",
            "are the logits of a step, which nobody reads when its tokens are sampled",
            "the logits of two steps take device memory",
        ),
        *attributes(
            MODEL_RUNNER,
            "decode_cuda_graph_runner eager_runner",
            "says whether a step runs as a CUDA graph",
            "steps for which the host waits are queued ahead",
        ),
        *attributes(
            "sglang.srt.model_executor.runner.decode_cuda_graph_runner:DecodeCudaGraphRunner",
            "capture_bs",
            "says how many streams such a step may have",
            "steps for which the host waits are queued ahead",
        ),
        source(
            "assumes",
            "sglang.srt.managers.overlap_utils:resolve_forward_inputs",
            ["batch.input_ids = future_map.output_tokens_buf[batch.req_pool_indices]"],
            "takes the input of a step from where the device has put the tokens of the one before",
            NO_STEP_AHEAD,
        ),
        source(
            "assumes",
            f"{PROCESSOR}.process_batch_result_decode",
            ["if (self.enable_overlap or self.enable_overlap_mlx) and (", "req.finished() or req.is_retracted"],
            "passes over streams that have ended while a step over them was in flight",
            NO_STEP_AHEAD,
            "(self, batch, result)",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "init_batch_result_processor(self)",
            "makes what processes results",
            NO_STEP_AHEAD,
        ),
        *attributes(SCHEDULER, "batch_result_processor", "processes results", NO_STEP_AHEAD),
        *attributes(PROCESSOR, "enable_overlap", "lets streams that have ended be passed over", NO_STEP_AHEAD),
        *rows("calls", BATCH, "copy(self)", "keeps what a result is processed with", NO_STEP_AHEAD),
        *attributes(
            BATCH,
            "has_grammar sampling_info",
            "says whose next tokens depend on what the host does with the last ones",
            NO_STEP_AHEAD,
        ),
        *attributes(
            "sglang.srt.sampling.sampling_batch_info:SamplingBatchInfo",
            "penalizer_orchestrator has_custom_logit_processor",
            "says whose next tokens depend on what the host does with the last ones",
            NO_STEP_AHEAD,
        ),
        *attributes(
            "sglang.srt.sampling.penaltylib.orchestrator:BatchedPenalizerOrchestrator",
            "is_required",
            "says whose next tokens depend on what the host does with the last ones",
            NO_STEP_AHEAD,
        ),
        *rows(
            "calls",
            REQ,
            "next_output_finishes_by_length(self)",
            "says which streams end with the step in flight",
            "a step more than needed runs when the last stream ends",
        ),
        *attributes(
            REQ,
            "finished_output",
            "is set when the last of an answer has been sent",
            "the event log has ends of requests that have ended",
        ),
        *attributes(
            CHECKER,
            "get_last_batch",
            "shows SGLang's checks who owns KV cache beside the running batch",
            "started prefills are taken for leaks",
        ),
        *rows(
            "calls",
            CHECKER,
            "self_check_during_busy(self)",
            "is SGLang's check of its KV pool, where it is asked for",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY checks nothing",
        ),
        *attributes(
            "sglang.srt.managers.scheduler_components.load_inquirer:SchedulerLoadInquirer",
            "get_running_batch",
            "shows who is running",
            "started prefills are no load",
        ),
        source(
            "assumes",
            f"{SCHEDULER}.pause_generation",
            ["self.last_batch.forward_mode.is_extend()", "for r in self.last_batch.reqs", "self.last_batch = None"],
            "retracts what has run last, which here are the requests that were about to join",
            "requests that were about to join the running batch are left behind in a pause",
        ),
        *attributes(
            "sglang.srt.environ:Envs",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
            "asks for checks of the KV pool",
            "the checks cannot be asked for",
        ),
    ),
)
