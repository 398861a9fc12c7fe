"""Rows of the contract: CPUs of the scheduler process."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, rows, source

PART: Final = Part(
    "affinity",
    "CPUs of the scheduler process",
    ("scheduler",),
    (
        *rows(
            "hooks",
            "sglang.srt.managers.scheduler:",
            "configure_scheduler_process(server_args, gpu_id, ...)",
            "is the first that a scheduler process calls",
            "schedulers and HTTP servers push each other off their cores",
        ),
        source(
            "assumes",
            "sglang.srt.managers.scheduler:run_scheduler_process",
            ["configure_scheduler_process(", "scheduler = Scheduler(server_args, port_args)"],
            "configures the process before it makes the scheduler",
            "threads of the scheduler run on other CPUs",
        ),
    ),
)
