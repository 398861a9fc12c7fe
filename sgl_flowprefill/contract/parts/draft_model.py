"""Rows of the contract: the draft model of speculative decoding."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import CONTEXT, SCHEDULER

WORKERS: Final = "sglang.srt.speculative"
WORKER: Final = f"{WORKERS}.eagle_worker_v2:EAGLEWorkerV2"
DRAFT_WORKER: Final = f"{WORKERS}.eagle_worker_v2:EagleDraftWorker"
MOE: Final = "sglang.srt.layers.moe.utils"
WRONG_STATE: Final = "a resumed prefill computes its draft's KV cache with another one's state"
WRONG_DRAFTS: Final = "decode servers draft from another prefill's state"

PART: Final = Part(
    "draft_model",
    "The draft model of speculative decoding",
    ("scheduler",),
    (
        *attributes(SCHEDULER, "draft_worker", "holds the draft model", WRONG_STATE),
        *attributes(DRAFT_WORKER, "draft_runner", "is the model runner of the draft", WRONG_STATE),
        *attributes(
            "sglang.srt.model_executor.model_runner:ModelRunner",
            "spec_aux_config",
            "says which hidden states are kept for the draft",
            "tasks take more device memory than is counted",
        ),
        *attributes(
            "sglang.srt.model_executor.model_runner_components.spec_aux_hidden_state:SpecAuxHiddenStateConfig",
            "eagle_use_aux_hidden_state eagle_aux_hidden_state_layer_ids",
            "says which hidden states are kept for the draft",
            "tasks take more device memory than is counted",
        ),
        source(
            "assumes",
            f"{WORKER}._forward_prefill_batch",
            ["self.target_worker.forward_batch_generation(", "self.draft_worker._draft_extend_for_prefill("],
            "runs the target's forward pass over a batch, and then the draft's",
            WRONG_STATE,
        ),
        source(
            "assumes",
            f"{DRAFT_WORKER}._draft_extend_for_prefill",
            ["self.draft_runner.forward(forward_batch)", "return EagleDraftInput("],
            "keeps what a draft's prefill needs and what it is for in the batch and its result",
            WRONG_STATE,
        ),
        *rows("calls", CONTEXT, "get_flags()", "holds the flags for experts", WRONG_STATE),
        source(
            "assumes",
            f"{MOE}:speculative_moe_backend_context",
            ["moe.runner_backend = get_speculative_moe_runner_backend()"],
            "is all that is set around the draft's forward pass, with the next",
            WRONG_STATE,
        ),
        source(
            "assumes",
            f"{MOE}:speculative_moe_a2a_backend_context",
            [
                "moe.a2a_backend = get_speculative_moe_a2a_backend()",
                "moe.disable_fp4_allgather = True",
                "moe.speculative_context = True",
            ],
            "is all that is set around the draft's forward pass, with the one before",
            WRONG_STATE,
        ),
        source(
            "assumes",
            f"{WORKERS}.spec_utils:draft_tp_context",
            ["if layout.tp_group is None:", "return contextlib.nullcontext()"],
            "changes no group of ranks but with attention that is split by data",
            WRONG_STATE,
        ),
        source(
            "assumes",
            f"{SCHEDULER}.run_batch",
            ["batch.spec_info = (", "batch_result.next_draft_input"],
            "leaves what the draft has computed in the result",
            WRONG_DRAFTS,
        ),
        *attributes(
            "sglang.srt.managers.utils:GenerationBatchResult",
            "next_draft_input",
            "is what the decode server begins to draft with",
            WRONG_DRAFTS,
        ),
        *attributes(
            f"{WORKERS}.eagle_info:EagleDraftInput",
            "hidden_states",
            "is what the decode server begins to draft with",
            WRONG_DRAFTS,
        ),
    ),
)
