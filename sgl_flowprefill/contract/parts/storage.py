"""Rows of the contract: the storage behind the hierarchical cache."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import REQ, SCHEDULER, TIMES

TREE: Final = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
CONTROLLER: Final = "sglang.srt.managers.cache_controller:HiCacheController"
ASLEEP: Final = "requests wait for what has been read long since, while the server sleeps"
STUCK: Final = "the hub chooses requests that SGLang does not start, and then waits for KV cache"
UNCOMPARED: Final = "a server gets a storage with which it would not have started"
UNREAD: Final = "prefixes that are in storage are computed again"
APART: Final = "ranks start different requests, and wait for each other for ever"

PART: Final = Part(
    "storage",
    "The storage behind the hierarchical cache",
    ("scheduler",),
    (
        *attributes(SCHEDULER, "enable_hicache_storage", "says whether there is one", ASLEEP),
        *rows(
            "overrides",
            SCHEDULER,
            "attach_hicache_storage_wrapped(self, recv_req)",
            "gives a running server a storage",
            ASLEEP,
        ),
        *attributes(
            "sglang.srt.managers.io_struct:AttachHiCacheStorageReqOutput", "success", "says whether it did", ASLEEP
        ),
        *attributes(
            "sglang.srt.managers.io_struct:AttachHiCacheStorageReqInput",
            "hicache_storage_backend",
            "says which one",
            UNCOMPARED,
        ),
        *attributes(SCHEDULER, "server_args", "says what else the server was asked for", UNCOMPARED),
        *attributes(
            CONTROLLER,
            "prefetch_hit_queue ack_prefetch_queue ack_backup_queue",
            "takes what the threads that read and write have to say",
            ASLEEP,
        ),
        source(
            "assumes",
            f"{CONTROLLER}.reset",
            ["self.prefetch_hit_queue.queue.clear()", "self.ack_prefetch_queue.queue.clear()"],
            "empties these queues and makes no others",
            ASLEEP,
        ),
        source(
            "assumes",
            f"{CONTROLLER}.prefetch_thread_func",
            ["self.prefetch_hit_queue.put(operation)"],
            "says what storage has of a prompt",
            ASLEEP,
        ),
        source(
            "assumes",
            f"{CONTROLLER}.prefetch_sync_thread_func",
            ["self.ack_prefetch_queue.put(ack)"],
            "says what has been read",
            ASLEEP,
        ),
        source(
            "assumes",
            f"{CONTROLLER}.backup_thread_func",
            ["self.ack_backup_queue.put(operation)"],
            "says what has been written",
            "host memory that has been written to storage is freed late",
        ),
        source(
            "assumes",
            f"{TREE}.check_hicache_events",
            ["self._drain_storage_control_queues_impl("],
            "takes what is in the queues, on all ranks as much",
            ASLEEP,
        ),
        source(
            "assumes",
            f"{CONTROLLER}._create_sync_groups",
            ["create_custom_parallel_group("],
            "lets the threads of all ranks agree on what has been read in groups of their own, beside the hub",
            APART,
        ),
        source(
            "assumes",
            f"{TREE}._can_terminate_prefetch",
            ["self._all_reduce(should_terminate_tensor, torch.distributed.ReduceOp.MAX)"],
            "lets all ranks end a read when its time is over at one of them",
            APART,
        ),
        source(
            "assumes",
            f"{SCHEDULER}._get_new_batch_prefill_raw",
            [
                "self.tree_cache.check_prefetch_progress(",
                "self._prefetch_after_device_hit_loss(req)",
                "buffer_pipeline.prepare_staged_prefetch(req)",
            ],
            "leaves requests out that have to wait for storage, for these reasons",
            STUCK,
        ),
        source(
            "assumes",
            "sglang.srt.layers.dp_attention:get_dp_tp_group",
            ["return parallel.attn_tp_group if parallel.attn_dp_enabled else parallel.tp_group"],
            "lets ranks that have all their attention read by themselves",
            APART,
        ),
        source(
            "assumes",
            "sglang.srt.mem_cache.utils:get_storage_hash_str",
            ["prior_hash = storage_namespace_seed("],
            "keeps the prefixes of adapters apart in storage",
            "prompts of one adapter begin with the KV cache of another",
        ),
        source(
            "assumes",
            f"{CONTROLLER}._page_transfer_kv_batch",
            ["return min([kv_hits, *sidecar_hits.values()])"],
            "takes a page that has been read for the model only with what has been read for its draft",
            "decode servers draft from KV cache that was never read",
        ),
        *rows("calls", TREE, "has_ongoing_prefetch(self, handle)", "says whether a prefix is being read", STUCK),
        *rows(
            "calls",
            TREE,
            "check_prefetch_progress(self, request)",
            "says whether a request may start, and ends the read if so",
            STUCK,
        ),
        *attributes(TREE, "prefetch_stop_policy", "says when a read may be ended", STUCK),
        *attributes(
            TREE, "_storage_prefetch_wait", "says since when a request waits, and how long it may", "it waits too long"
        ),
        *attributes(
            "sglang.srt.mem_cache.unified_radix_cache:_StoragePrefetchWait",
            "timer timeout_s",
            "says since when a request waits, and how long it may",
            "it waits too long",
        ),
        *rows(
            "calls",
            "sglang.srt.utils.poll_timer:PollTimer",
            "elapsed(self)",
            "says how long a request has waited",
            "it waits too long",
        ),
        *rows(
            "calls",
            SCHEDULER,
            "_prefetch_after_device_hit_loss(self, req)",
            "asks storage about a prefix that a request has lost while it waited",
            UNREAD,
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "_process_storage_prefetch_retries(self)",
            "asks storage again about requests that wait",
            UNREAD,
        ),
        *rows(
            "overrides",
            SCHEDULER,
            "_retry_storage_prefetch(self, req, storage_hit_end)",
            "asks storage again about a request",
            STUCK,
        ),
        *attributes(REQ, "cache_request_handle", "is what the cache knows a request by", STUCK),
        *rows(
            "calls",
            f"{TIMES}SchedulerReqTimeStats",
            "observe_storage_prefetch_ready(self, ready)",
            "counts how long a request waits for storage",
            "answers do not say how long they waited for storage",
        ),
    ),
)
