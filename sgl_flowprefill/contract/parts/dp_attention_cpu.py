"""Rows of the contract: data-parallel attention without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

ATTENTION: Final = "sglang.srt.layers.dp_attention:"
BATCH: Final = "sglang.srt.model_executor.forward_batch_info:"
RANKS: Final = "sglang.srt.distributed.parallel_state:"
RUNS: Final = "servers with data-parallel attention run nothing without an accelerator"

PART: Final = Part(
    "dp_attention_cpu",
    "Data-parallel attention without an accelerator",
    ("scheduler",),
    (
        *rows(
            "hooks",
            ATTENTION,
            "memcpy(dst, src, dim, offset, sz, offset_src)",
            "copies a rank's rows into the batch of all and back",
            RUNS,
        ),
        *rows("calls", ATTENTION, "memcpy_cpu(dst, src, dim, offset, sz, offset_src)", "does so in PyTorch", RUNS),
        source("assumes", f"{ATTENTION}_dp_gather_via_all_reduce", ["memcpy("], "copies rows by that", RUNS),
        source("assumes", f"{ATTENTION}dp_scatter", ["memcpy("], "copies rows by that", RUNS),
        *rows("hooks", BATCH, "ForwardBatch", "is in the module that asks for pinned memory", RUNS),
        source(
            "assumes",
            f"{BATCH}ForwardBatch.prepare_mlp_sync_batch",
            ["torch.tensor(", "pin_memory=self.use_pin_memory"],
            "asks for pinned memory",
            RUNS,
        ),
        *rows(
            "hooks",
            RANKS,
            "reg_all_gather_into_tensor(output, input, group_name)",
            "gathers the rows of all ranks in a decode step",
            RUNS,
        ),
        *rows("hooks", RANKS, "reg_reduce_scatter_tensor(output, input, group_name)", "scatters sums of them", RUNS),
        source(
            "assumes",
            f"{RANKS}GroupCoordinator.all_gather_into_tensor",
            ["reg_all_gather_into_tensor(output, input, group_name=self.unique_name)"],
            "gathers by that",
            RUNS,
        ),
        source(
            "assumes",
            f"{RANKS}GroupCoordinator.reduce_scatter_tensor",
            ["reg_reduce_scatter_tensor(output, input, group_name=self.unique_name)"],
            "scatters by that",
            RUNS,
        ),
    ),
)
