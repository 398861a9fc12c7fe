"""Rows of the contract: adapters (LoRA) below several prefills at once."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER, SCHEDULER

LORA: Final = "sglang.srt.lora"
MANAGER: Final = f"{LORA}.lora_manager:LoRAManager"
BACKENDS: Final = f"{LORA}.backend"
POOL: Final = f"{LORA}.mem_pool:LoRAMemoryPool"
DRAINER: Final = f"{LORA}.lora_drainer:LoRADrainer"
OVERWRITTEN: Final = "a prefill computes with the adapter of another one"
ROUTED: Final = "a resumed prefill sends its rows through another one's adapters"
STARVES: Final = "requests wait for adapters without end"

PART: Final = Part(
    "adapters",
    "Adapters below several prefills at once",
    ("scheduler",),
    (
        *attributes(SCHEDULER, "enable_lora lora_drainer", "says whether there are adapters", OVERWRITTEN),
        *attributes(MODEL_RUNNER, "lora_manager", "holds the adapters", OVERWRITTEN),
        *attributes(
            "sglang.srt.managers.schedule_batch:Req", "lora_id", "says which adapter a request asks for", OVERWRITTEN
        ),
        *rows(
            "hooks",
            MANAGER,
            "fetch_new_loras(self, new_loras, running_loras)",
            "loads the adapters of a batch, and keeps those that are said to be running",
            OVERWRITTEN,
        ),
        source(
            "assumes",
            "sglang.srt.model_executor.forward_batch_info:ForwardBatch.init_new",
            [
                "model_runner.lora_manager.fetch_new_loras(set(ret.lora_ids))",
                "model_runner.lora_manager.prepare_lora_batch(ret)",
            ],
            "loads the adapters of a batch when its forward pass begins",
            OVERWRITTEN,
        ),
        source(
            "assumes",
            f"{POOL}.prepare_lora_batch",
            ["if uid in cur_uids:"],
            "takes no slot of an adapter that is said to be running",
            OVERWRITTEN,
        ),
        source(
            "assumes",
            f"{SCHEDULER}.can_schedule_lora_req",
            ["if self.lora_drainer and", "lora_manager.validate_lora_batch("],
            "lets in what has been found to fit",
            "prefills do not start",
        ),
        *rows(
            "calls",
            MANAGER,
            "validate_lora_batch(self, lora_ids)",
            "says whether the device can hold some adapters at once",
            OVERWRITTEN,
        ),
        *attributes(
            MANAGER,
            "max_loras_per_batch memory_pool lora_backend",
            "holds the adapters that are on the device",
            OVERWRITTEN,
        ),
        *attributes(POOL, "uid_to_buffer_id", "says which adapters are on the device", OVERWRITTEN),
        *attributes(
            f"{BACKENDS}.base_backend:BaseLoRABackend",
            "batch_info is_moe_lora",
            "says which rows of a batch go through which adapter",
            ROUTED,
        ),
        *attributes(
            f"{BACKENDS}.lmhead_mixing:LoRABackendLmHeadMixing",
            "lm_head_batch_info lm_head_pass_batch_infos _lm_head_pass_idx",
            "says which rows of a batch go through which adapter",
            ROUTED,
        ),
        *attributes(
            f"{BACKENDS}.triton_backend:TritonLoRABackend",
            "sgemm_batch_info",
            "says which rows of a batch go through which adapter",
            ROUTED,
        ),
        source(
            "assumes",
            f"{BACKENDS}.chunked_backend:ChunkedSgmvLoRABackend.prepare_lora_batch",
            ["batch_info = LoRABatchInfo(", "self.batch_info = batch_info"],
            "makes a new description of a batch for each prefill",
            ROUTED,
        ),
        source(
            "assumes",
            f"{BACKENDS}.triton_backend:TritonLoRABackend.prepare_lora_batch",
            ["batch_info = LoRABatchInfo(", "self.batch_info = batch_info"],
            "makes a new description of a batch for each prefill",
            ROUTED,
        ),
        *rows(
            "calls",
            DRAINER,
            "update_draining_state(self, waiting_queue, running_reqs) can_schedule(self, req)",
            "picks the adapter that takes no more requests where others wait for a slot",
            STARVES,
        ),
        *rows("reads", f"{LORA}.lora_drainer:", "LoRADrainer", "picks an adapter to make room for others", STARVES),
        *attributes(
            "sglang.srt.observability.req_time_stats:SchedulerReqTimeStats",
            "wait_queue_entry_time",
            "says since when a request waits",
            STARVES,
        ),
        *attributes(DRAINER, "max_wait_time_secs", "says how long requests wait for a slot", STARVES),
        source(
            "assumes",
            "sglang.srt.managers.tokenizer_control_mixin:TokenizerControlMixin._unload_lora_adapter_locked",
            ["await self.lora_registry.wait_for_unload("],
            "unloads an adapter when the requests that ask for it have been answered",
            "a prefill computes with an adapter that is gone",
        ),
        source(
            "assumes",
            f"{LORA}.layers:get_lora_layer",
            ["MergedColumnParallelLinearWithLoRA", "RowParallelLinearWithLoRA", "ReplicatedLinearWithLoRA"],
            "makes the layers with adapters, which are found by the end of their names",
            "prefills run in tiles whose rows go through the wrong adapters",
        ),
    ),
)
