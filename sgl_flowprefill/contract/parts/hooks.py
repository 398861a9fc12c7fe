"""Rows of the contract: SGLang's plugin interface."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows

PART: Final = Part(
    "hooks",
    "SGLang's plugin interface",
    ("HTTP server", "scheduler"),
    (
        *rows(
            "calls",
            "sglang.srt.plugins.hook_registry:",
            "HookRegistry HookRegistry.register(cls, target, hook, hook_type, ...) HookType HookType.BEFORE "
            "HookType.AFTER HookType.AROUND HookType.REPLACE",
            "registers what this project puts in a target's place",
            "nothing of FlowPrefill is installed",
        ),
    ),
)
