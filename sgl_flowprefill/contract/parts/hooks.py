"""Rows of the contract: SGLang's plugin interface."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source
from sgl_flowprefill.contract.symbols import CONTEXT

NO_POLICY: Final = "a server that another process starts does not know what objectives clients ask for"

PART: Final = Part(
    "hooks",
    "SGLang's plugin interface",
    ("HTTP server", "scheduler"),
    (
        *rows(
            "calls",
            "sglang.srt.plugins.hook_registry:",
            "HookRegistry HookRegistry.register(cls, target, hook, hook_type, ...) HookRegistry.apply_hooks(cls) "
            "HookType HookType.BEFORE HookType.AFTER HookType.AROUND HookType.REPLACE",
            "registers what this project puts in a target's place",
            "nothing of FlowPrefill is installed",
        ),
        *rows(
            "hooks",
            CONTEXT,
            "publish(server_args, role, ...)",
            "says what a process is that is not the first of its program",
            NO_POLICY,
        ),
        source(
            "assumes",
            "sglang.srt.entrypoints.engine:Engine._launch_subprocesses",
            ["load_plugins()", 'publish(server_args, role="tokenizer")'],
            "loads plugins before it says so of the process that starts the others",
            NO_POLICY,
        ),
    ),
)
