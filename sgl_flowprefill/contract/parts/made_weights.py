"""Rows of the contract: weights made on the device."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row

PART: Final = Part(
    "made_weights",
    "Weights made on the device",
    ("scheduler",),
    (
        Row(
            "sglang.srt.model_loader.loader:initialize_dummy_weights",
            "hooks",
            "makes the weights of `--load-format dummy`",
            "`launch.py gpu-report --shape` measures a model whose attention changes nothing",
            signature="(model, ...)",
        ),
    ),
)
