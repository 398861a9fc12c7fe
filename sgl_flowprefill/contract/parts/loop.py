"""Rows of the contract: the event loop and what SGLang's scheduler calls of ours."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.parts.before_0_5_23 import INIT_IPC_CHANNELS
from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import SCHEDULER

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
"""What SGLang's loop calls. The loop of the hub does all of it too, in an order of its own, but staging, which is
refused.
"""

PART: Final = Part(
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
            "calls",
            "sglang.srt.managers.io_struct:",
            "AttachHiCacheStorageReqOutput",
            "refuses a storage that is not as expected",
            "a server ends when somebody attaches one",
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "init_schedule_policy(self)",
            "makes what orders the requests of a batch",
            "the requests of a batch are sorted by their priorities, and a batch without priorities cannot be made",
        ),
        *attributes(
            SCHEDULER,
            "policy",
            "orders the requests of a batch",
            "the requests of a batch are sorted by their priorities, and a batch without priorities cannot be made",
        ),
        *attributes(
            "sglang.srt.managers.schedule_policy:SchedulePolicy",
            "enable_priority_scheduling",
            "says whether requests are sorted by their priorities",
            "the requests of a batch are sorted by their priorities, and a batch without priorities cannot be made",
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
)
