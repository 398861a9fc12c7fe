"""Rows of the contract: statistics of experts without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

EXPERTS: Final = "sglang.srt.eplb.expert_distribution:"
RUNS: Final = "servers that count experts run nothing without an accelerator"

PART: Final = Part(
    "experts_cpu",
    "Statistics of experts without an accelerator",
    ("scheduler",),
    (
        *rows(
            "hooks",
            EXPERTS,
            "ExpertDistributionRecorder",
            "is in the module that asks for what accelerators alone have",
            RUNS,
        ),
        source(
            "assumes",
            f"{EXPERTS}_ExpertDistributionRecorderReal._on_hook",
            ["torch.get_device_module().is_current_stream_capturing()"],
            "asks whether a graph is being captured",
            RUNS,
        ),
        source(
            "assumes",
            f"{EXPERTS}_StatAccumulator.dump",
            ["torch.get_device_module().empty_cache()"],
            "frees cached memory of the device",
            RUNS,
        ),
    ),
)
