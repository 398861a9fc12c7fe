"""Rows of the contract: what the scheduler calls and reads of SGLang's."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row, attributes, rows
from sgl_flowprefill.contract.symbols import CONTEXT, OPTIONS, SCHEDULER

PART: Final = Part(
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
)
