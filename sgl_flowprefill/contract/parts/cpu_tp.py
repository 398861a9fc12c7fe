"""Rows of the contract: tensor parallelism on the portable CPU platform."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source
from sgl_flowprefill.contract.symbols import MODEL_RUNNER

PART: Final = Part(
    "cpu_tp",
    "Tensor parallelism on the portable CPU platform",
    ("scheduler",),
    (
        *rows(
            "hooks",
            "sglang.srt.model_executor.model_runner:",
            "adjust_config_with_unaligned_cpu_tp(model_config, load_config, tp_size)",
            "pads heads for SGLang's own CPU engine",
            "some models do not load on several ranks",
        ),
        source(
            "assumes",
            f"{MODEL_RUNNER}.load_model",
            ['if self.device == "cpu":', "self.model_config = adjust_config_with_unaligned_cpu_tp("],
            "calls that for all CPUs",
            "some models do not load on several ranks",
        ),
    ),
)
