"""Rows of the contract: experts without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source

EPLB: Final = "sglang.srt.eplb"
EXPERTS: Final = f"{EPLB}.expert_distribution:"
NATIVE: Final = "sglang.srt.layers.moe.fused_moe_native:moe_forward_native"
COUNTS: Final = "servers that count experts run nothing without an accelerator"
SPLITS: Final = "servers whose ranks have some of the experts each run nothing without an accelerator"
ASKS: Final = "is in a module that asks for what accelerators alone have"

PART: Final = Part(
    "experts_cpu",
    "Experts without an accelerator",
    ("scheduler",),
    (
        *rows("hooks", EXPERTS, "ExpertDistributionRecorder", ASKS, COUNTS),
        *rows("hooks", f"{EPLB}.eplb_manager:", "EPLBManager", ASKS, COUNTS),
        *rows("hooks", f"{EPLB}.expert_location_updater:", "ExpertLocationUpdater", ASKS, COUNTS),
        source(
            "assumes",
            f"{EXPERTS}_ExpertDistributionRecorderReal._on_hook",
            ["torch.get_device_module().is_current_stream_capturing()"],
            "asks whether a graph is being captured",
            COUNTS,
        ),
        source(
            "assumes",
            f"{EXPERTS}_StatAccumulator.dump",
            ["torch.get_device_module().empty_cache()"],
            "frees cached memory of the device",
            COUNTS,
        ),
        source(
            "hooks",
            NATIVE,
            ["topk_weights, topk_ids, _ = topk_output", "for i, num_tokens in enumerate(tokens_per_expert):"],
            "computes experts, those of a rank alone where -1 stands for one of another",
            SPLITS,
            "(layer, x, topk_output, moe_runner_config)",
        ),
        *attributes(
            "sglang.srt.layers.moe.fused_moe_triton.layer:FusedMoE",
            "moe_ep_size",
            "says over how many ranks experts are split",
            SPLITS,
        ),
        *attributes(
            "sglang.srt.layers.moe.topk:StandardTopKOutput",
            "topk_weights topk_ids",
            "says which experts a token goes to",
            SPLITS,
        ),
    ),
)
