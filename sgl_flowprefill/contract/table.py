"""Every symbol of SGLang that this project overrides, hooks, calls or reads, by the part of the project that needs it.

``tests/unit/test_contract_complete.py`` compares the table with the code: what the code uses is here, and what is here
the code uses.
"""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.compat import (
    OWN_SETTINGS,
    OWN_SETTINGS_OF_UNIFIED_SERVERS,
    READ_SETTINGS,
    REFUSED_ABOVE_ONE,
    REFUSED_ENVIRONMENT,
    REFUSED_ON_PREFILL_SERVERS,
    REFUSED_ON_UNIFIED_SERVERS,
    REFUSED_WHEN_SET,
)
from sgl_flowprefill.contract.row import Part, Row, attributes, rows, source
from sgl_flowprefill.contract.unified import UNIFIED

SCHEDULER: Final = "sglang.srt.managers.scheduler:Scheduler"
REQ: Final = "sglang.srt.managers.schedule_batch:Req"
SCHEDULE_BATCH: Final = "sglang.srt.managers.schedule_batch:ScheduleBatch"
RESULT: Final = "sglang.srt.managers.utils:GenerationBatchResult"
FORWARD_BATCH: Final = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
FORWARD_MODE: Final = "sglang.srt.model_executor.forward_batch_info:ForwardMode"
MODEL_RUNNER: Final = "sglang.srt.model_executor.model_runner:ModelRunner"
MODEL_CONFIG: Final = "sglang.srt.configs.model_config:ModelConfig"
BACKENDS: Final = "sglang.srt.layers.attention"
BACKEND: Final = f"{BACKENDS}.base_attn_backend:AttentionBackend"
FLASHINFER: Final = f"{BACKENDS}.flashinfer_backend:FlashInferAttnBackend"
FLASHINFER_INDICES: Final = f"{BACKENDS}.flashinfer_backend:FlashInferIndicesUpdaterPrefill"
FA3: Final = f"{BACKENDS}.flashattention_backend:FlashAttentionBackend"
FA3_METADATA: Final = f"{BACKENDS}.flashattention_backend:FlashAttentionMetadata"
LAYER: Final = "sglang.srt.layers.radix_attention:RadixAttention"
HTTP: Final = "sglang.srt.entrypoints.http_server:"
TIMES: Final = "sglang.srt.observability.req_time_stats:"
CONTEXT: Final = "sglang.srt.runtime_context:"
OPTIONS: Final = "sglang.srt.arg_groups.fields:*"
"""Fields of ``ServerArgs``, which SGLang assembles from the classes of these modules."""
GRAMMARS: Final = "sglang.srt.constrained.grammar_manager:GrammarManager"
PLATFORM: Final = "sglang.srt.platforms.interface:SRTPlatform"
DECODE_QUEUE: Final = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
ENDPOINT: Final = "sglang.lang.backend.runtime_endpoint:RuntimeEndpoint"

LOOP_CALLS: Final = (
    "self.ingest_requests()",
    "self.disagg_prefill_bootstrap_queue.pop_bootstrapped()",
    "self.waiting_queue.extend(",
    "self.get_next_disagg_prefill_batch_to_run(",
    "self.ngram_embedding_manager.prepare_for_forward(",
    "self.maybe_prefetch_staging_for_batch(batch)",
    "self.run_batch(batch)",
    "self.process_batch_result(batch, result)",
    "self.on_idle()",
    "self.process_disagg_prefill_inflight_queue()",
)
"""What SGLang's loop calls. The loop of the hub does all of it too, in an order of its own."""

INIT_IPC_CHANNELS: Final = Row(
    f"{SCHEDULER}.init_ipc_channels",
    "hooks",
    "is when SGLang 0.5.22 gets what SGLang 0.5.23 has",
    "forward passes fail on SGLang 0.5.22",
    signature="(self, port_args)",
    holds=("self.ipc_channels = SchedulerIpcChannels.create(",),
)

PARTS: Final = (
    Part(
        "hooks",
        "SGLang's plugin interface",
        ("HTTP server", "scheduler"),
        (
            *rows(
                "calls",
                "sglang.srt.plugins.hook_registry:",
                "HookRegistry HookRegistry.register(cls, target, hook, hook_type, ...) HookType HookType.BEFORE "
                "HookType.AFTER HookType.AROUND HookType.REPLACE",
                "registers what this project puts in a target's place",
                "nothing of FlowPrefill is installed",
            ),
        ),
    ),
    # ---- the HTTP server ------------------------------------------------------------------------------------------
    Part(
        "options",
        "Options of a server",
        ("HTTP server",),
        (
            source(
                "hooks",
                "sglang.srt.server_args:ServerArgs.resolve_once",
                ["run_resolution_pipeline(self)", "_resolution_finished", "_resolution_failed"],
                "is where a prefill server gets the options that it needs, before SGLang derives others from them",
                "users have to set these options themselves",
                "(self)",
            ),
            *rows(
                "hooks",
                "sglang.srt.entrypoints.engine:",
                "Engine._launch_subprocesses(cls, server_args, ...)",
                "is where all servers and engines pass before they start processes",
                "a server that cannot work is refused late, or runs without FlowPrefill",
            ),
            *rows(
                "calls",
                "sglang.srt.arg_groups.overrides:",
                "resolving_view(server_args)",
                "shows the options that SGLang has resolved so far",
                "options that cannot work are not seen",
            ),
            *attributes(
                OPTIONS,
                " ".join([*OWN_SETTINGS, *OWN_SETTINGS_OF_UNIFIED_SERVERS]),
                "is set by FlowPrefill",
                "the server runs with SGLang's own value, which cannot work",
            ),
            *attributes(
                OPTIONS,
                " ".join(
                    sorted(
                        {
                            *REFUSED_WHEN_SET,
                            *REFUSED_ON_PREFILL_SERVERS,
                            *REFUSED_ON_UNIFIED_SERVERS,
                            *REFUSED_ABOVE_ONE,
                        }
                    )
                ),
                "is refused with a reason",
                "the option is not refused, under whatever name it has now",
            ),
            *attributes(
                OPTIONS,
                " ".join(READ_SETTINGS),
                "says what kind of server this is, and whether FlowPrefill can work with it",
                "a server that cannot work is not refused",
            ),
            *attributes(
                "sglang.srt.environ:Envs",
                " ".join(REFUSED_ENVIRONMENT),
                "is refused with a reason",
                "the variable is not refused, under whatever name it has now",
            ),
        ),
    ),
    Part(
        "request_slo",
        "Objectives of requests",
        ("HTTP server",),
        (
            *rows(
                "hooks",
                "sglang.srt.entrypoints.api_contract:",
                "generate_contract_error(body)",
                "checks the objective of a /generate request",
                "an invalid objective is an error event under status 200",
            ),
            *rows(
                "hooks",
                HTTP,
                "serve_generate_request(obj, request)",
                "is where an objective beside the sampling parameters becomes one of them",
                "an objective at the top of a /generate body is ignored",
            ),
            *rows(
                "hooks",
                "sglang.srt.entrypoints.openai.serving_completions:",
                "OpenAIServingCompletion._validate_request(self, request)",
                "checks the objective of a /v1/completions request",
                "an invalid objective is an error event under status 200",
            ),
            *rows(
                "hooks",
                "sglang.srt.entrypoints.openai.serving_chat:",
                "OpenAIServingChat._validate_request(self, request)",
                "checks the objective of a /v1/chat/completions request",
                "an invalid objective is an error event under status 200",
            ),
            *attributes(
                "sglang.srt.entrypoints.openai.protocol:CompletionRequest",
                "custom_params",
                "is where the objective of an OpenAI request is",
                "OpenAI requests cannot name an objective",
            ),
            *attributes(
                "sglang.srt.entrypoints.openai.protocol:ChatCompletionRequest",
                "custom_params",
                "is where the objective of an OpenAI request is",
                "OpenAI requests cannot name an objective",
            ),
            *attributes(
                "sglang.srt.managers.io_struct:GenerateReqInput",
                "sampling_params",
                "is where the objective of a /generate request belongs",
                "an objective at the top of a /generate body is ignored",
            ),
        ),
    ),
    Part(
        "health",
        "Health checks",
        ("HTTP server",),
        (
            source(
                "calls",
                f"{HTTP}health_generate",
                ["last_receive_tstamp > tic", "HEALTH_CHECK_TIMEOUT", "await asyncio.sleep(1)"],
                "sends the probe in the background of our route",
                "/health shows the handler's sleep, and follows steps of the wall clock",
                "(request)",
            ),
            *rows(
                "hooks",
                HTTP,
                "launch_server(server_args, ...)",
                "is when our routes are put before SGLang's",
                "/health shows the handler's sleep, and follows steps of the wall clock",
            ),
            *rows(
                "reads",
                HTTP,
                "app _global_state ServerStatus HEALTH_CHECK_TIMEOUT",
                "is what the health route works with",
                "/health cannot be answered",
            ),
            *attributes(
                "sglang.srt.managers.tokenizer_manager:ServerStatus",
                "Up UnHealthy",
                "is what the health route says",
                "/health cannot be answered",
            ),
            *attributes(
                "sglang.srt.managers.tokenizer_manager:TokenizerManager",
                "last_receive_tstamp server_status",
                "shows that the scheduler has answered",
                "/health cannot be answered",
            ),
            *attributes(
                f"{HTTP}_GlobalState",
                "tokenizer_manager",
                "shows that the scheduler has answered",
                "/health cannot be answered",
            ),
        ),
    ),
    Part(
        "request_times",
        "Times of requests",
        ("HTTP server", "scheduler"),
        (
            *rows(
                "hooks",
                TIMES,
                "ReqTimeStatsBase.__getstate__(self)",
                "adds to what travels with a request when it was received",
                "deadlines count from when the scheduler has read a request, and differ between ranks",
            ),
            source(
                "assumes",
                f"{TIMES}ReqTimeStatsBase.__setstate__",
                ['key.endswith("time")', "self.__dict__.update(state)"],
                "shifts times by the names that they have, and ours ends otherwise",
                "deadlines follow steps of the wall clock",
            ),
            source(
                "assumes",
                f"{TIMES}ReqTimeStatsBase.new_from_obj",
                ["if hasattr(new_obj, key):"],
                "copies what its own objects know of",
                "the time at which a request was received is lost",
            ),
            source(
                "assumes",
                f"{TIMES}APIServerReqTimeStats.__getstate__",
                ["super().__getstate__()"],
                "pickles what the base class adds",
                "the time at which a request was received is lost",
            ),
            source(
                "assumes",
                f"{TIMES}APIServerReqTimeStats.set_created_time",
                ["time.perf_counter()"],
                "takes the time at which a request was received from the monotonic clock",
                "deadlines follow steps of the wall clock",
            ),
            *attributes(
                f"{TIMES}APIServerReqTimeStats",
                "created_time api_server_dispatch_time",
                "is when the HTTP server received a request, and sent it on",
                "deadlines count from when the scheduler has read a request",
            ),
            *attributes(
                f"{TIMES}SchedulerReqTimeStats",
                "scheduler_recv_time",
                "is when a request came that no HTTP server has received",
                "such a request has no deadline",
            ),
            *attributes(
                REQ,
                "time_stats",
                "has the times of a request",
                "requests have no deadlines",
            ),
        ),
    ),
    Part(
        "token_ids",
        "Prompts of token ids",
        ("HTTP server",),
        (
            source(
                "hooks",
                "sglang.api.v1.api_types:decode_TokenIds",
                ['return [_expect_int(e, expected="i64") for e in _expect_seq(value, '],
                "checks token ids one after the other, and here in one go",
                "8,192 token ids take 1.4 ms of the HTTP server",
                "(value)",
            ),
        ),
    ),
    # ---- the scheduler process --------------------------------------------------------------------------------------
    Part(
        "loop",
        "The event loop and what SGLang's scheduler calls of ours",
        ("scheduler",),
        (
            *rows(
                "hooks",
                "sglang.srt.managers.scheduler:",
                "Scheduler",
                "is what FlowPrefill's scheduler is a subclass of, and takes the place of",
                "nothing of FlowPrefill runs",
            ),
            source(
                "overrides",
                f"{SCHEDULER}.event_loop_normal_disagg_prefill",
                LOOP_CALLS,
                "is the loop of a prefill server, and FlowPrefill's does all that it does",
                "requests are not scheduled, or something that SGLang's loop has come to do is left out",
                "(self)",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "event_loop_overlap_disagg_prefill(self)",
                "must not run in the place of our loop",
                "a server with overlap schedule runs without FlowPrefill",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "__init__(self, server_args, port_args)",
                "makes the scheduler, to which FlowPrefill adds its parts",
                "the server does not start",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "init_disaggregation(self)",
                "makes the metadata buffers, one for each outstanding request",
                "no more requests are known to the policy than may run at a time",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "get_output_streamer_class(self)",
                "chooses what answers are handed to, of which the event log hears",
                "requests do not end in the event log",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "process_input_requests(self, recv_reqs)",
                "sees messages as they arrive",
                "weights change under suspended prefills, and grammars wake nobody",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "_add_request_to_queue(self, req, is_retracted)",
                "sees requests as they arrive",
                "requests do not arrive in the event log",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "abort_request(self, recv_req)",
                "tells which requests are given up",
                "aborted requests keep their places in the policy",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "send_abort_output(self, abort_req, req)",
                "ends requests that the output streamer does not answer",
                "aborted requests do not end in the event log",
                otherwise=INIT_IPC_CHANNELS,
            ),
            *rows(
                "calls",
                SCHEDULER,
                "resolve_waiting_queue_bootstrap(self)",
                "drops waiting requests whose decode server is gone, here some at a time",
                "looking at thousands of waiting requests holds up a prefill",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "pause_generation(self, recv_req)",
                "must wait for the prefills that have started",
                "weights change under suspended prefills",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "is_fully_idle(self, for_health_check, ignore_waiting) _collect_inflight_batches(self)",
                "counts suspended prefills as work",
                "SGLang flushes caches, or takes KV for leaked, while prefills are suspended",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "checkpoint_disagg_prefill(self, req)",
                "gives the KV of a finished prefill to the radix cache",
                "KV indices may be read before they are there",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "send_kv_chunk(self, req, last_chunk, end_idx)",
                "sends the KV of a finished prefill",
                "sending waits for what the device computes next",
            ),
            *rows(
                "overrides",
                SCHEDULER,
                "get_internal_state(self, recv_req)",
                "is what /server_info shows",
                "/server_info does not show the state of the TTFT model",
            ),
        ),
    ),
    Part(
        "scheduler",
        "What the scheduler calls and reads of SGLang's",
        ("scheduler",),
        (
            *rows(
                "calls",
                SCHEDULER,
                "ingest_requests(self, ...) maybe_send_health_check_signal(self)",
                "takes messages, and answers health checks",
                "requests are not read",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "get_new_batch_prefill(self, running_batch) maybe_prefetch_staging_for_batch(self, batch)",
                "admits requests: prefix match, KV cache, staging",
                "no prefill can start",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "run_batch(self, batch, ...)",
                "is the forward pass",
                "no prefill can run",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "process_batch_result(self, batch, result) process_disagg_prefill_inflight_queue(self, ...)",
                "answers, sends the KV, and frees it when it has been sent",
                "prefills do not end",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "_retire_aborted_prefill_result(self, req) _maybe_clear_mm_inputs(self, batch)",
                "frees what an aborted request holds",
                "aborted prefills leak KV cache",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "on_idle(self)",
                "is SGLang's housekeeping",
                "leaks are not looked for, and metrics stand still",
            ),
            *attributes(
                SCHEDULER,
                "waiting_queue running_batch chunked_req cur_batch_for_debug forward_ct _sched_idled",
                "is the state that SGLang's admission, watchdog and metrics look at",
                "prefills are not admitted, or SGLang takes a busy scheduler for one that hangs",
            ),
            *attributes(
                SCHEDULER,
                "gracefully_exit _engine_paused",
                "stops or pauses the loop",
                "the server does not end, or runs on while it is paused",
            ),
            *attributes(
                SCHEDULER,
                "disaggregation_mode device max_running_requests max_total_num_tokens model_config tp_size",
                "says what kind of server this is, and how large",
                "the server does not start",
            ),
            *attributes(
                SCHEDULER,
                "tp_worker tp_group tp_cpu_group",
                "holds the model and the group of ranks",
                "the server does not start",
            ),
            *attributes(
                SCHEDULER,
                "ipc_channels",
                "holds the sockets on which requests arrive",
                "a sleeping scheduler does not notice requests",
            ),
            *attributes(
                SCHEDULER,
                "watchdog soft_watchdog",
                "looks for forward passes that hang",
                "a prefill that is suspended for long is taken for one that hangs",
            ),
            *attributes(
                SCHEDULER,
                "tree_cache grammar_manager output_streamer ngram_embedding_manager enable_staging "
                "disagg_prefill_bootstrap_queue",
                "is a part of SGLang's scheduler that the hub works with",
                "prefills do not start or end",
            ),
            *attributes(
                SCHEDULER,
                "metrics_collector metrics_collector_context",
                "labels metrics, and says whether there are any",
                "the server has no metrics of FlowPrefill",
            ),
            *attributes(
                "sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels",
                "recv_from_tokenizer recv_from_rpc",
                "is a socket on which messages arrive",
                "a sleeping scheduler does not notice requests",
            ),
            *attributes(
                "sglang.srt.utils.watchdog:WatchdogRaw",
                "get_counter",
                "is how a watchdog sees that work gets on",
                "a prefill that is suspended for long is taken for one that hangs",
            ),
            *attributes(
                "sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext",
                "enable_metrics",
                "says whether there are metrics",
                "the server has no metrics of FlowPrefill",
            ),
            *attributes(
                "sglang.srt.observability.metrics_collector:SchedulerMetricsCollector",
                "labels",
                "labels metrics",
                "the server has no metrics of FlowPrefill",
            ),
            *rows(
                "calls",
                "sglang.srt.distributed.parallel_state:GroupCoordinator",
                "broadcast_object(self, obj, ...)",
                "gives all ranks the options and the profile of the first",
                "ranks do different things, and wait for each other for ever",
            ),
            *attributes(
                "sglang.srt.distributed.parallel_state:GroupCoordinator",
                "rank_in_group world_size",
                "tells the first rank from the others",
                "ranks do different things, and wait for each other for ever",
            ),
            *attributes(
                "sglang.srt.managers.tp_worker:TpModelWorker",
                "model_runner",
                "holds the model",
                "the server does not start",
            ),
            *rows(
                "calls",
                "sglang.srt.model_executor.model_runner_components.ngram_embedding_manager:NgramEmbeddingManager",
                "prepare_for_forward(self, batch, chunked_req)",
                "is what SGLang's loop does with a new batch",
                "models with n-gram embeddings compute something else",
            ),
            *rows(
                "overrides",
                "sglang.srt.managers.scheduler_components.output_streamer:",
                "SchedulerOutputStreamer.stream_output(self, reqs, return_logprob, skip_req)",
                "hands answers to the client",
                "requests do not end in the event log",
            ),
            *rows(
                "calls",
                "sglang.srt.managers.scheduler_components.output_streamer:",
                "SchedulerOutputStreamer",
                "is what the event log's streamer is a subclass of",
                "the server does not start",
            ),
            *rows(
                "calls",
                "sglang.srt.managers.utils:",
                "is_health_check_generate_req(recv_req)",
                "tells health checks from requests",
                "health checks wait behind long prompts, and stand in the event log",
            ),
            *attributes(
                "sglang.srt.managers.io_struct:GetInternalStateReqOutput",
                "internal_state",
                "is what /server_info shows",
                "/server_info does not show the state of the TTFT model",
            ),
            *rows(
                "calls",
                "sglang.srt.arg_groups.overrides:",
                "resolving_view(server_args)",
                "shows the options that SGLang has resolved so far",
                "options that cannot work are not seen",
            ),
            *rows(
                "calls",
                CONTEXT,
                "get_disagg() get_parallel()",
                "says what kind of server this is, and which rank",
                "the server does not start",
            ),
            Row(
                CONTEXT,
                "reads",
                "knows the rank of this process",
                "ranks are bound to each other's CPUs",
                holds=('"tp_rank"',),
            ),
            *attributes(
                OPTIONS,
                "disaggregation_mode nnodes",
                "says what kind of server this is, and over how many machines",
                "the server does not start",
            ),
            *rows(
                "calls",
                "sglang.srt.utils.network:",
                "get_local_ip_auto(...)",
                "is where ranks of other machines reach the first",
                "ranks on other machines cannot wake the first",
            ),
        ),
    ),
    Part(
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
                "sampling_params bootstrap_room",
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
            *rows(
                "calls",
                f"{TIMES}SchedulerReqTimeStats",
                "set_completion_time(self, ...)",
                "is what SGLang expects of a request that ends",
                "an aborted request cannot be answered",
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
        ),
    ),
    Part(
        "disaggregation",
        "KV transfer",
        ("scheduler",),
        (
            *rows(
                "reads",
                "sglang.srt.disaggregation.utils:",
                "DisaggregationMode DisaggregationMode.DECODE",
                "tells prefill servers from decode servers",
                "the server does not start",
            ),
            *rows(
                "calls",
                "sglang.srt.disaggregation.utils:",
                "is_aborted(req)",
                "tells whether anybody still waits for a request",
                "prefills run on for clients that have gone",
            ),
            *rows(
                "calls",
                "sglang.srt.disaggregation.prefill:PrefillBootstrapQueue",
                "pop_bootstrapped(self, ...)",
                "gives the requests for which a decode server has room",
                "no prefill can start",
            ),
            *attributes(
                "sglang.srt.disaggregation.prefill:PrefillBootstrapQueue",
                "queue",
                "holds the requests that a decode server has no room for yet",
                "requests seem to be lost in the event log",
            ),
            *rows(
                "reads",
                "sglang.srt.disaggregation.base:",
                "KVPoll KVPoll.WaitingForInput KVPoll.Failed",
                "says how far the transfer of a request has come",
                "blocking times cannot be told",
            ),
        ),
    ),
    Part(
        "wakeups",
        "Wake-ups by KV transfers",
        ("scheduler",),
        (
            *rows(
                "hooks",
                "sglang.srt.disaggregation.common.conn:",
                "CommonKVManager.update_status(self, bootstrap_room, status)",
                "is what all transfer threads call when something has happened",
                "a sleeping scheduler notices it up to a second later",
            ),
        ),
    ),
    Part(
        "caches",
        "Radix cache and grammars",
        ("scheduler",),
        (
            *rows(
                "calls",
                "sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache",
                "evictable_size(self) protected_size(self)",
                "tells whether the radix cache has taken KV",
                "KV indices may be read before they are there",
            ),
            *rows(
                "calls",
                GRAMMARS,
                "has_waiting_grammars(self) get_ready_grammar_requests(self)",
                "gives the requests whose grammars are compiled",
                "requests with grammars are not started",
            ),
            *attributes(
                GRAMMARS,
                "grammar_queue SGLANG_GRAMMAR_MAX_POLL_ITERATIONS SGLANG_GRAMMAR_POLL_INTERVAL",
                "holds the requests whose grammars are being compiled, and says for how long",
                "a grammar that cannot be compiled is waited for, for ever",
            ),
            source(
                "assumes",
                f"{GRAMMARS}.get_ready_grammar_requests",
                ["grammar_wait_ct", "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS"],
                "gives a grammar up by the number that is set here",
                "a grammar that cannot be compiled is waited for, for ever",
            ),
        ),
    ),
    Part(
        "forward_state",
        "State of a forward pass, saved and restored",
        ("scheduler",),
        (
            *rows(
                "calls",
                "sglang.srt.model_executor.forward_context:",
                "set_forward_context(ctx)",
                "says which attention backend the layers find",
                "a resumed prefill reads another one's KV cache",
            ),
            *rows(
                "reads",
                "sglang.srt.model_executor.forward_context:",
                "_current",
                "says which attention backend the layers find",
                "a resumed prefill reads another one's KV cache",
            ),
            *rows(
                "calls",
                CONTEXT,
                "get_forward() get_model() _ConfigBag._set(self, name, value)",
                "holds flags of one forward pass",
                "a resumed prefill runs with another one's flags",
            ),
            *attributes(
                f"{CONTEXT}ForwardFlags",
                "_plain",
                "holds the flags that are no context variables",
                "a resumed prefill runs with another one's flags",
            ),
            source(
                "assumes",
                f"{MODEL_RUNNER}._forward_raw",
                ["ForwardContext(attn_backend=self.attn_backend)"],
                "opens the context of a forward pass with the model runner's backend, which is the task's",
                "a prefill plans in another one's attention state",
            ),
            *attributes(
                OPTIONS,
                "shared_experts",
                "is overridden around every forward pass",
                "a resumed prefill runs with another one's flags",
                otherwise=INIT_IPC_CHANNELS,
            ),
            *attributes(
                "sglang.srt.environ:Envs",
                "SGLANG_EAGER_INPUT_NO_COPY",
                "keeps the inputs of a batch out of buffers that the next forward overwrites",
                "a resumed prefill reads another one's tokens",
            ),
        ),
    ),
    Part(
        "model",
        "Model runner and model",
        ("scheduler",),
        (
            *attributes(
                MODEL_RUNNER,
                "attn_backend model model_config dtype device max_total_num_tokens prefill_attention_backend_str "
                "kv_index_translator req_to_token_pool token_to_kv_pool use_mla_backend",
                "holds the model, its attention backend and its KV cache",
                "the server does not start",
            ),
            source(
                "calls",
                f"{MODEL_RUNNER}._get_attention_backend",
                ["model_runner=self, init_new_workspace=init_new_workspace"],
                "makes an attention backend for another live task",
                "prefills cannot be suspended: their attention state is one and the same",
                "(self, init_new_workspace)",
            ),
            *rows(
                "calls",
                "sglang.srt.mem_cache.kv_index_translator:KVIndexTranslator",
                "bind_and_verify_backends(self, backends)",
                "is what SGLang does with a new attention backend",
                "backends of suspended prefills read wrong KV indices",
            ),
            *attributes(
                MODEL_CONFIG,
                "context_len head_dim hf_config hf_text_config hidden_size is_encoder_decoder model_path "
                "num_attention_heads vocab_size",
                "says how large the model is",
                "profiles do not belong to a model, and memory of tasks cannot be told",
            ),
            *rows(
                "calls",
                MODEL_CONFIG,
                "get_total_num_kv_heads(self)",
                "says how large the model is",
                "memory of tasks cannot be told",
            ),
            *rows(
                "reads",
                "sglang.srt.environ:",
                "envs Envs.SGLANG_ENABLE_LOGPROB_CHUNK Envs.SGLANG_LOGPROB_CHUNK_SIZE",
                "says how many rows of logits are computed at once",
                "memory of tasks cannot be told",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.radix_attention:",
                "RadixAttention",
                "is what a decoder layer is found by, by its name",
                "prefills cannot be suspended",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.logits_processor:",
                "LogitsProcessor",
                "is what a model that ends with a token is found by, by its name",
                "models are refused",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.radix_linear_attention:",
                "RadixLinearAttention",
                "is what linear attention is found by, by its name",
                "hybrid models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.attention.mamba.mamba:",
                "MambaMixer2",
                "is what attention of Mamba models is found by, by its name",
                "these models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.attention.mamba.mamba1:",
                "MambaMixer1",
                "is what attention of Mamba models is found by, by its name",
                "these models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.models.lfm2:",
                "Lfm2ShortConv",
                "is what attention of LFM2 models is found by, by its name",
                "these models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.models.lfm2_moe:",
                "Lfm2MoeShortConv",
                "is what attention of LFM2 models is found by, by its name",
                "these models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.models.jet_nemotron:",
                "JetBlock",
                "is what attention of Jet-Nemotron models is found by, by its name",
                "these models have fewer checkpoints",
            ),
            *rows(
                "reads",
                "sglang.srt.models.gemma3n_causal:",
                "Gemma3nAltUp",
                "is what helps a layer and is no MLP, by its name",
                "its matrices are taken for an MLP",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.hyperconnection:",
                "GatedResidual",
                "is what helps a layer and is no MLP, by its name",
                "its matrices are taken for an MLP",
            ),
        ),
    ),
    Part(
        "attention",
        "Attention backends for GPUs, in query tiles",
        ("scheduler",),
        (
            *rows(
                "reads",
                f"{BACKENDS}.hybrid_attn_backend:",
                "HybridAttnBackend",
                "hands attention of prefills on to another backend",
                "long attention operators run whole",
            ),
            *attributes(
                f"{BACKENDS}.hybrid_attn_backend:HybridAttnBackend",
                "prefill_backend",
                "is the backend of prefills",
                "long attention operators run whole",
            ),
            *rows(
                "reads",
                f"{BACKENDS}.hybrid_linear_attn_backend:",
                "HybridLinearAttnBackend",
                "hands attention of prefills on to another backend",
                "long attention operators run whole",
            ),
            *attributes(
                f"{BACKENDS}.hybrid_linear_attn_backend:HybridLinearAttnBackend",
                "full_attn_backend",
                "is the backend of prefills",
                "long attention operators run whole",
            ),
            *rows(
                "reads",
                f"{BACKENDS}.triton_backend:",
                "TritonAttnBackend",
                "is known to run whole",
                "nothing: the warning has another reason",
            ),
            *rows(
                "reads",
                f"{BACKENDS}.flashinfer_backend:",
                "FlashInferAttnBackend",
                "is tiled by its exact class",
                "long attention operators run whole",
            ),
            *rows(
                "hooks",
                FLASHINFER,
                "init_forward_metadata(self, forward_batch)",
                "plans a batch",
                "attention runs with the tiles of another batch",
            ),
            *attributes(
                FLASHINFER,
                "indices_updater_prefill prefill_wrapper_ragged prefill_wrappers_paged workspace_buffer is_dllm_model "
                "prefill_uses_dequant_workspace dispatch_reason",
                "holds the wrappers that are run in tiles",
                "long attention operators run whole, or FlashInfer servers do not start",
            ),
            *rows(
                "hooks",
                FLASHINFER_INDICES,
                "call_begin_forward(self, wrapper_ragged, wrapper_paged, req_pool_indices, paged_kernel_lens, "
                "paged_kernel_lens_sum, seq_lens, prefix_lens, kv_start_idx, kv_indptr, qo_indptr, use_ragged, "
                "spec_info, use_sliding_window_kv_pool, fixed_split_size, multi_item_params, "
                "cross_attention_custom_mask, seq_lens_cpu, custom_kv_indices, window_left, plan)",
                "plans the wrappers, and is told the lengths",
                "attention runs with the lengths of another batch",
            ),
            *attributes(
                FLASHINFER_INDICES,
                "num_qo_heads",
                "says how large the plan of a tile is",
                "FlashInfer servers do not start",
            ),
            *rows(
                "reads",
                f"{BACKENDS}.flashattention_backend:",
                "FlashAttentionBackend",
                "is tiled by its exact class",
                "long attention operators run whole",
            ),
            *rows(
                "hooks",
                FA3,
                "forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache, q_rope, k_rope, sinks, ...)",
                "is run once for each tile",
                "long attention operators run whole",
            ),
            *attributes(
                FA3,
                "use_mla fa_impl_ver fa_skip_kv_cache _kv_shard_pool forward_metadata",
                "says whether it can be tiled, and holds the metadata that tiles replace",
                "FlashAttention 3 servers fail at their first prefill",
            ),
            *attributes(
                FA3_METADATA,
                "cu_seqlens_q cache_seqlens_int32 max_seq_len_q local_attn_metadata image_token_ranges",
                "says which rows and keys a kernel computes",
                "FlashAttention 3 servers fail at their first prefill",
            ),
            *rows(
                "calls",
                f"{BACKENDS}.flashattention_backend:",
                "is_cp_active(forward_batch)",
                "tells batches that are not tiled",
                "FlashAttention 3 servers fail at their first prefill",
            ),
            *attributes(
                FORWARD_BATCH,
                "forward_mode extend_seq_lens_cpu extend_prefix_lens_cpu",
                "says which rows and keys a batch has",
                "prefills fail",
            ),
            *attributes(
                FORWARD_BATCH,
                "_attn_output",
                "is where attention is to write, for which it is not tiled",
                "FlashAttention 3 servers compute something else",
            ),
            *rows(
                "calls",
                FORWARD_MODE,
                "is_extend_without_speculative(self)",
                "tells prefills from other batches",
                "prefills fail",
            ),
            *attributes(
                LAYER,
                "attn_type is_cross_attention sliding_window_size tp_q_head_num",
                "says what a layer computes",
                "prefills fail",
            ),
            *rows(
                "reads",
                "sglang.srt.layers.radix_attention:",
                "AttentionType AttentionType.DECODER",
                "tells decoder layers from others",
                "prefills fail",
            ),
        ),
    ),
    Part(
        "decode_order",
        "Places of a decode server",
        ("scheduler",),
        (
            source(
                "hooks",
                f"{DECODE_QUEUE}.pop_preallocated",
                ["self._resolve_pending_reqs()", "for i, decode_req in enumerate(self.queue):"],
                "gives places and KV cache in the order of the queue",
                "urgent requests wait at the decode server behind those that the prefill server puts off",
                "(self, ...)",
            ),
            source(
                "assumes",
                f"{DECODE_QUEUE}._create_receiver_and_enqueue",
                ["self.queue.append(decode_req)"],
                "appends to the queue",
                "the order of places is made anew at each step",
            ),
            *attributes(
                DECODE_QUEUE,
                "queue",
                "holds the requests that wait for places",
                "urgent requests wait at the decode server behind those that the prefill server puts off",
            ),
            *attributes(
                "sglang.srt.disaggregation.decode:DecodeRequest",
                "req",
                "is the request that waits for a place",
                "urgent requests wait at the decode server behind those that the prefill server puts off",
            ),
        ),
    ),
    Part(
        "decode_idle",
        "Idle decode servers",
        ("scheduler",),
        (
            *rows(
                "hooks",
                SCHEDULER,
                "on_idle(self)",
                "is when a decode server sleeps",
                "an idle decode server takes most of a core",
            ),
            source(
                "assumes",
                f"{SCHEDULER}.event_loop_normal_disagg_decode",
                ["self.process_decode_queue()", "self.on_idle()"],
                "looks at what has happened before each sleep",
                "a decode server sleeps although there is work",
            ),
            source(
                "assumes",
                f"{SCHEDULER}.event_loop_overlap_disagg_decode",
                ["self.process_decode_queue()", "self.on_idle()"],
                "looks at what has happened before each sleep",
                "a decode server sleeps although there is work",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "is_fully_idle(self, ...)",
                "tells how long a decode server may sleep",
                "a decode server sleeps although there is work",
            ),
            *attributes(
                SCHEDULER,
                "disagg_decode_prealloc_queue disaggregation_mode forward_ct gracefully_exit ipc_channels",
                "tells whether there is work",
                "a decode server sleeps although there is work",
            ),
            *attributes(
                DECODE_QUEUE,
                "pending_reqs",
                "holds the requests whose prefill server is not known yet",
                "a decode server sleeps although there is work",
            ),
        ),
    ),
    Part(
        "affinity",
        "CPUs of the scheduler process",
        ("scheduler",),
        (
            *rows(
                "hooks",
                "sglang.srt.managers.scheduler:",
                "configure_scheduler_process(server_args, gpu_id, ...)",
                "is the first that a scheduler process calls",
                "schedulers and HTTP servers push each other off their cores",
            ),
            source(
                "assumes",
                "sglang.srt.managers.scheduler:run_scheduler_process",
                ["configure_scheduler_process(", "scheduler = Scheduler(server_args, port_args)"],
                "configures the process before it makes the scheduler",
                "threads of the scheduler run on other CPUs",
            ),
        ),
    ),
    Part(
        "before_0_5_23",
        "What SGLang 0.5.22 lacks",
        ("scheduler",),
        (
            INIT_IPC_CHANNELS,
            *attributes(
                "sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels",
                "send_to_tokenizer",
                "is what 0.5.22 ends requests by that the output streamer does not answer",
                "aborted requests do not end in the event log",
            ),
            *rows(
                "calls",
                "sglang.srt.managers.scheduler_components.output_sender:",
                "SenderWrapper SenderWrapper.send_output(self, output, recv_obj)",
                "is what 0.5.22 ends requests by that the output streamer does not answer",
                "aborted requests do not end in the event log",
            ),
            *rows(
                "reads",
                "sglang.srt.managers.io_struct:",
                "AbortReq",
                "says which requests end so",
                "aborted requests do not end in the event log",
            ),
            *rows(
                "calls",
                CONTEXT,
                "get_model() _ConfigBag._set(self, name, value)",
                "holds the flag that 0.5.22 has not",
                "forward passes fail on SGLang 0.5.22",
            ),
        ),
    ),
    # ---- the portable CPU platform --------------------------------------------------------------------------------
    Part(
        "platform",
        "The portable CPU platform",
        ("scheduler", "HTTP server"),
        (
            *rows(
                "calls",
                "sglang.srt.platforms:",
                "_is_cuda_available() _is_rocm_available() _is_npu_available() _is_xpu_available() "
                "_is_musa_available() _is_mps_available()",
                "tells whether SGLang has a device of its own",
                "the CPU platform is chosen beside an accelerator",
            ),
            *rows(
                "overrides",
                PLATFORM,
                "apply_server_args_defaults(self, server_args) "
                "get_default_attention_backend(self) get_dispatch_key_name(self) init_backend(self)",
                "chooses plain PyTorch kernels and our attention",
                "servers do not start without an accelerator",
            ),
            *rows(
                "overrides",
                "sglang.srt.platforms.cpu:CpuDeviceMixin",
                "get_device(self, device_id)",
                "chooses plain PyTorch kernels and our attention",
                "servers do not start without an accelerator",
            ),
            *attributes(
                "sglang.srt.platforms.cpu:CpuDeviceMixin",
                "_enum device_name device_type",
                "says what the platform is",
                "servers do not start without an accelerator",
            ),
            *attributes(
                PLATFORM,
                "capabilities",
                "says what the platform is",
                "servers do not start without an accelerator",
            ),
            *rows(
                "calls",
                "sglang.srt.platforms.interface:",
                "SRTPlatform PlatformCapabilities",
                "is what the platform is made of",
                "servers do not start without an accelerator",
            ),
            *rows(
                "calls",
                "sglang.srt.platforms.cpu:",
                "CpuDeviceMixin",
                "is what the platform is made of",
                "servers do not start without an accelerator",
            ),
            *rows(
                "calls",
                "sglang.srt.platforms.device_mixin:",
                "PlatformEnum PlatformEnum.OOT",
                "is what the platform is made of",
                "servers do not start without an accelerator",
            ),
            *attributes(
                OPTIONS,
                "device attention_backend sampling_backend disable_overlap_schedule disable_hybrid_swa_memory "
                "disable_cuda_graph disable_custom_all_reduce dtype mem_fraction_static tp_size max_total_tokens "
                "max_running_requests",
                "is set by the platform where it is not given",
                "servers without an accelerator do not start, or take all memory",
            ),
        ),
    ),
    Part(
        "cpu_attention",
        "Attention of the portable CPU platform",
        ("scheduler",),
        (
            *rows(
                "calls",
                f"{BACKENDS}.attention_registry:",
                "register_attention_backend(name)",
                "makes the backend known",
                "servers do not start without an accelerator",
            ),
            *rows(
                "overrides",
                BACKEND,
                "forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) "
                "forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache, **kwargs) "
                "init_forward_metadata(self, forward_batch) support_triton(self) "
                "get_cuda_graph_seq_len_fill_value(self)",
                "is how SGLang calls an attention backend",
                "prefills fail on the CPU",
            ),
            *rows(
                "calls",
                f"{BACKENDS}.base_attn_backend:",
                "AttentionBackend",
                "is what the backend is a subclass of",
                "servers do not start without an accelerator",
            ),
            *attributes(
                BACKEND,
                "forward_metadata",
                "is where SGLang's backends keep the state of a batch",
                "prefills fail on the CPU",
            ),
            *rows(
                "reads",
                "sglang.srt.mem_cache.swa_memory_pool:",
                "SWAKVPool",
                "is a KV cache that is not served",
                "models with sliding windows compute something else",
            ),
            *attributes(
                FORWARD_BATCH,
                "seq_lens_cpu req_pool_indices out_cache_loc",
                "says which rows and keys a batch has",
                "prefills fail on the CPU",
            ),
            *rows(
                "calls",
                FORWARD_MODE,
                "is_target_verify(self) is_draft_extend_v2(self) is_decode(self)",
                "tells batches that are not served",
                "batches of speculative decoding compute something else",
            ),
            *attributes(
                LAYER,
                "layer_id logit_cap logit_capping_method qk_head_dim scaling tp_k_head_num v_head_dim "
                "xai_temperature_len",
                "says what a layer computes",
                "prefills fail on the CPU",
            ),
            *attributes(
                "sglang.srt.mem_cache.memory_pool:ReqToTokenPool",
                "req_to_token",
                "says where the keys of a request are",
                "prefills fail on the CPU",
            ),
            *rows(
                "calls",
                "sglang.srt.mem_cache.memory_pool:KVCache",
                "get_key_buffer(self, layer_id) get_value_buffer(self, layer_id) "
                "set_kv_buffer(self, layer, loc, cache_k, cache_v, ...)",
                "holds keys and values",
                "prefills fail on the CPU",
            ),
            *rows(
                "calls",
                "sglang.srt.models.deepseek_common.attention_backend_handler:",
                "AttentionBackendRegistry AttentionBackendRegistry.register(cls, backend_name, handler_func)",
                "lets latent attention attend to latents",
                "models with latent attention do not run on the CPU",
            ),
            *rows(
                "reads",
                "sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods:",
                "AttnForwardMethod AttnForwardMethod.MLA",
                "lets latent attention attend to latents",
                "models with latent attention do not run on the CPU",
            ),
            *rows(
                "reads",
                "sglang.srt.model_executor.forward_batch_info:",
                "ForwardBatch",
                "is the batch that attention is computed of",
                "prefills fail on the CPU",
            ),
            *rows(
                "reads",
                "sglang.srt.model_executor.model_runner:",
                "ModelRunner",
                "is what a backend is made from",
                "prefills fail on the CPU",
            ),
        ),
    ),
    Part(
        "cpu_tp",
        "Tensor parallelism on the portable CPU platform",
        ("scheduler",),
        (
            *rows(
                "hooks",
                "sglang.srt.model_executor.model_runner:",
                "adjust_config_with_unaligned_cpu_tp(model_config, load_config, tp_size)",
                "pads heads for SGLang's own CPU engine",
                "some models do not load on several ranks",
            ),
            source(
                "assumes",
                f"{MODEL_RUNNER}.load_model",
                ['if self.device == "cpu":', "self.model_config = adjust_config_with_unaligned_cpu_tp("],
                "calls that for all CPUs",
                "some models do not load on several ranks",
            ),
        ),
    ),
    Part(
        "nixl_dram",
        "NIXL with KV cache in host memory",
        ("scheduler",),
        (
            source(
                "hooks",
                "sglang.srt.disaggregation.nixl.conn:NixlKVManager.register_buffer_to_engine",
                ["self.agent.register_memory(kv_addrs, mem_kind)"],
                "is the first user of the NIXL agent",
                "servers do not start without an accelerator",
                "(self)",
            ),
            source(
                "assumes",
                "nixl._api:nixl_agent.__init__",
                ["self.nixl_mems = {", '"DRAM": nixlBind.DRAM_SEG', '"VRAM": nixlBind.VRAM_SEG'],
                "translates the names of kinds of memory",
                "servers do not start without an accelerator",
            ),
            *attributes(
                "sglang.srt.disaggregation.nixl.conn:NixlKVManager",
                "agent",
                "is the NIXL agent",
                "servers do not start without an accelerator",
            ),
        ),
    ),
    Part(
        "nixl_sleep",
        "NIXL's progress thread",
        ("scheduler",),
        (
            *rows(
                "hooks",
                "nixl._bindings:",
                "nixlAgent",
                "is made with a progress thread that never sleeps",
                "NIXL takes a whole core of every server",
            ),
            source(
                "assumes",
                "nixl._api:nixl_agent.__init__",
                ["agent_config.pthrDelay = 0", "nixlBind.nixlAgent(agent_name, agent_config)"],
                "makes it, by that name",
                "NIXL takes a whole core of every server",
            ),
        ),
    ),
    # ---- without a server -----------------------------------------------------------------------------------------
    Part(
        "profile",
        "Profiles and the doctor's checks of a device",
        ("launcher",),
        (
            *rows(
                "calls",
                "sglang.srt.plugins:",
                "load_plugins()",
                "makes a process that measures one like a server's",
                "`launch.py profile` and `doctor` do not start",
            ),
            *rows(
                "calls",
                CONTEXT,
                "SpawnRanks publish(server_args, role, hf_config, ranks, ...) get_disagg()",
                "tells a process what it is",
                "`launch.py profile` and `doctor` do not start",
            ),
            *attributes(
                f"{CONTEXT}SpawnRanks",
                "world_rank dp_rank gpu_id",
                "tells a process what it is",
                "`launch.py profile` and `doctor` do not start",
            ),
            *rows(
                "calls",
                "sglang.srt.server_args:",
                "PortArgs PortArgs.init_new(server_args, ...) prepare_server_args(argv) ServerArgs.resolve_once(self)",
                "makes the options of a server",
                "`launch.py profile` and `doctor` do not start",
            ),
            *attributes(
                OPTIONS,
                "base_gpu_id",
                "is the GPU that is measured",
                "`launch.py profile` and `doctor` do not start",
            ),
            *rows(
                "calls",
                "sglang.srt.managers.schedule_batch:",
                "Req Req.__init__(self, rid, origin_input_text, origin_input_ids, sampling_params, ...)",
                "is a prompt that is measured",
                "no server has a TTFT model: nothing can be measured",
            ),
            *attributes(
                REQ,
                "start_send_idx",
                "keeps a cached prefix from being sent",
                "nothing can be measured",
            ),
            *rows(
                "calls",
                "sglang.srt.sampling.sampling_params:",
                "SamplingParams SamplingParams.normalize(self, tokenizer)",
                "is how a prompt is answered",
                "nothing can be measured",
            ),
            *attributes(
                "sglang.srt.sampling.sampling_params:SamplingParams",
                "temperature max_new_tokens",
                "is how a prompt is answered",
                "nothing can be measured",
            ),
            *rows(
                "calls",
                "sglang.srt.mem_cache.common:",
                "release_kv_cache(req, tree_cache, checkpoint)",
                "frees what has been measured, or leaves it as a cached prefix",
                "nothing can be measured",
            ),
            *rows(
                "calls",
                SCHEDULER,
                "flush_cache(self, ...)",
                "empties the radix cache before a prefix is cached",
                "`launch.py profile` cannot measure cached prefixes",
            ),
            *attributes(
                SCHEDULER,
                "device_module schedule_stream token_to_kv_pool_allocator",
                "is what a server runs on, and holds its KV cache",
                "`launch.py gpu-report`, `profile` and `doctor` measure nothing",
            ),
            *attributes(
                "sglang.srt.configs.model_config:ModelConfig",
                "num_hidden_layers",
                "tells how many layers a forward pass has",
                "`launch.py gpu-report` measures nothing",
            ),
        ),
    ),
    Part(
        "made_weights",
        "Weights made on the device",
        ("scheduler",),
        (
            Row(
                "sglang.srt.model_loader.loader:initialize_dummy_weights",
                "hooks",
                "makes the weights of `--load-format dummy`",
                "`launch.py gpu-report --shape` measures a model whose attention changes nothing",
                signature="(model, ...)",
            ),
        ),
    ),
    Part(
        "lone_prefill",
        "A prefill server without a decode server",
        ("scheduler",),
        (
            Row(
                "sglang.srt.managers.scheduler:Scheduler.init_disaggregation",
                "hooks",
                "makes the transfer library's manager",
                "`launch.py gpu-report` needs the transfer library",
                signature="(self)",
                holds=("self.transfer_backend = TransferBackend(", "disaggregation_transfer_backend"),
            ),
        ),
    ),
    Part(
        "launcher",
        "The launcher",
        ("launcher",),
        (
            Row(
                "sglang.launch_server:",
                "calls",
                "is the module that a server is started as",
                "no server starts",
                holds=('if __name__ == "__main__":',),
            ),
            *rows(
                "calls",
                "sglang.srt.server_args:",
                "ServerArgs ServerArgs.add_cli_args(parser)",
                "reads the options of a server before it starts",
                "options that cannot work are refused late",
            ),
            *rows(
                "calls",
                "sglang.srt.utils.server_args_config_parser:",
                "ConfigArgumentMerger ConfigArgumentMerger.merge_config_with_args(self, cli_args)",
                "reads a --config file",
                "options in a --config file are not seen",
            ),
        ),
    ),
    Part(
        "frontend",
        "SGLang's frontend programs",
        ("client",),
        (
            *rows(
                "overrides",
                ENDPOINT,
                "__init__(self, base_url, ...) generate(self, s, sampling_params) "
                "generate_stream(self, s, sampling_params) "
                "select(self, s, choices, temperature, choices_method) cache_prefix(self, prefix_str) "
                "commit_lazy_operations(self, s) fill_image(self, s) _generate_http_request(self, s, data)",
                "sends a program's requests",
                "frontend programs cannot name objectives",
            ),
            *rows(
                "calls",
                "sglang.lang.backend.runtime_endpoint:",
                "RuntimeEndpoint",
                "is what the endpoint is a subclass of",
                "frontend programs cannot name objectives",
            ),
            *rows(
                "overrides",
                "sglang.lang.choices:ChoicesSamplingMethod",
                "__call__(self, choices, normalized_prompt_logprobs, input_token_logprobs, output_token_logprobs, "
                "unconditional_token_logprobs) requires_unconditional_logprobs(self)",
                "chooses by log probabilities",
                "`sgl.select` chooses something else",
            ),
            *rows(
                "calls",
                "sglang.lang.choices:",
                "ChoicesSamplingMethod ChoicesDecision",
                "chooses by log probabilities",
                "`sgl.select` chooses something else",
            ),
            *rows(
                "overrides",
                "sglang.lang.ir:SglSamplingParams",
                "to_srt_kwargs(self)",
                "says what of its parameters a program sends",
                "frontend programs cannot name objectives",
            ),
            *rows(
                "calls",
                "sglang.lang.ir:",
                "SglSamplingParams",
                "holds a program's sampling parameters",
                "frontend programs cannot name objectives",
            ),
        ),
    ),
    UNIFIED,
)
