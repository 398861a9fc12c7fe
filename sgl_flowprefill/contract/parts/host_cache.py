"""Rows of the contract: the hierarchical cache below several prefills at once."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import SCHEDULER

TREE: Final = "sglang.srt.mem_cache.unified_radix_cache:UnifiedRadixCache"
CONTROLLER: Final = "sglang.srt.managers.cache_controller:HiCacheController"
COUNTER: Final = "sglang.srt.managers.cache_controller:LayerDoneCounter"
NOT_LOADED: Final = "a prefill reads a prefix that has not been loaded yet"
STILL_COUNTED: Final = "a prompt is taken for a short one whose prefix is gone, and delays what starts with it"

PART: Final = Part(
    "host_cache",
    "The hierarchical cache below several prefills at once",
    ("scheduler",),
    (
        *attributes(
            SCHEDULER,
            "enable_hierarchical_cache",
            "says whether there is one",
            NOT_LOADED,
        ),
        *rows(
            "calls",
            TREE,
            "check_hicache_events(self)",
            "processes transfers that have ended",
            "KV cache that has been copied is never freed",
        ),
        *attributes(
            TREE,
            "ongoing_write_through ongoing_load_back cache_controller",
            "holds the transfers that are under way",
            "KV cache that has been copied is freed late",
        ),
        *attributes(
            CONTROLLER,
            "ack_load_queue ack_write_queue layer_done_counter",
            "holds the events of transfers",
            NOT_LOADED,
        ),
        source(
            "assumes",
            f"{CONTROLLER}.start_loading",
            ["producer_id = self.layer_done_counter.update_producer()", "self.ack_load_queue.append("],
            "queues the loads of a batch, with the event of its own at the end",
            NOT_LOADED,
        ),
        source(
            "assumes",
            f"{COUNTER}.update_producer",
            ["(self.producer_index + 1) % self.num_counters", "finish_event.query()"],
            "takes the next counter, which must be free",
            "the server ends when many loads are under way",
        ),
        source(
            "assumes",
            f"{COUNTER}.wait_until",
            ["self.events[self.consumer_index].wait("],
            "makes a layer wait for the load of the forward pass that set the consumer last",
            NOT_LOADED,
        ),
        *rows("calls", COUNTER, "set_consumer(self, index)", "says which load the layers wait for", NOT_LOADED),
        *attributes(
            COUNTER, "events producer_index consumer_index num_counters", "holds the events of the layers", NOT_LOADED
        ),
        *attributes(
            "sglang.srt.managers.cache_controller:LayerLoadingEvent",
            "finish_event",
            "is the end of a load",
            "the server ends when many loads are under way",
        ),
        *attributes(
            "sglang.srt.managers.tp_worker:TpModelWorker",
            "hicache_layer_transfer_counter",
            "is the counter of layers that have been loaded",
            NOT_LOADED,
        ),
        *attributes(
            "sglang.srt.managers.schedule_batch:ScheduleBatch",
            "hicache_consumer_index",
            "says whether a batch loads prefixes",
            NOT_LOADED,
        ),
        *attributes(
            "sglang.srt.managers.schedule_batch:Req",
            "host_hit_length",
            "counts the tokens of a prompt that are in host memory alone",
            "prefixes in host memory are predicted as if they were computed",
        ),
        *rows("hooks", TREE, "evict_host(self, num_tokens, ...)", "gives up prefixes in host memory", STILL_COUNTED),
        source(
            "assumes",
            f"{TREE}._execute_kv_backup",
            ["self.evict_host("],
            "gives up prefixes in host memory where a copy of others lacks some",
            STILL_COUNTED,
        ),
    ),
)
