"""Rows of the contract: adapters without an accelerator."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

LORA: Final = "sglang.srt.lora"
STARTS: Final = "servers with adapters do not start without an accelerator"

PART: Final = Part(
    "lora_cpu",
    "Adapters without an accelerator",
    ("scheduler",),
    (
        *rows("hooks", f"{LORA}.layers:", "BaseLayerWithLoRA", "is in the module that asks for pinned memory", STARTS),
        *rows(
            "hooks",
            f"{LORA}.backend.torch_backend:",
            "TorchNativeLoRABackend",
            "is in the module that asks for pinned memory",
            STARTS,
        ),
        source(
            "assumes",
            f"{LORA}.backend.torch_backend:TorchNativeLoRABackend.prepare_lora_batch",
            ["torch.tensor(", "torch.zeros(", ".pin_memory()"],
            "asks for pinned memory",
            STARTS,
        ),
    ),
)
