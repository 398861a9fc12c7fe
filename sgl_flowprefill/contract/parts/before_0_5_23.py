"""Rows of the contract: what SGLang 0.5.22 lacks."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, Row, attributes, rows
from sgl_flowprefill.contract.symbols import CONTEXT, SCHEDULER

INIT_IPC_CHANNELS: Final = Row(
    f"{SCHEDULER}.init_ipc_channels",
    "hooks",
    "is when SGLang 0.5.22 gets what SGLang 0.5.23 has",
    "forward passes fail on SGLang 0.5.22",
    signature="(self, port_args)",
    holds=("self.ipc_channels = SchedulerIpcChannels.create(",),
)

PART: Final = Part(
    "before_0_5_23",
    "What SGLang 0.5.22 lacks",
    ("scheduler",),
    (
        INIT_IPC_CHANNELS,
        *attributes(
            "sglang.srt.managers.scheduler_components.ipc_channels:SchedulerIpcChannels",
            "send_to_tokenizer",
            "is what 0.5.22 ends requests by that the output streamer does not answer",
            "aborted requests do not end in the event log",
        ),
        *rows(
            "calls",
            "sglang.srt.managers.scheduler_components.output_sender:",
            "SenderWrapper SenderWrapper.send_output(self, output, recv_obj)",
            "is what 0.5.22 ends requests by that the output streamer does not answer",
            "aborted requests do not end in the event log",
        ),
        *rows(
            "reads",
            "sglang.srt.managers.io_struct:",
            "AbortReq",
            "says which requests end so",
            "aborted requests do not end in the event log",
        ),
        *rows(
            "calls",
            CONTEXT,
            "get_model() _ConfigBag._set(self, name, value)",
            "holds the flag that 0.5.22 has not",
            "forward passes fail on SGLang 0.5.22",
        ),
    ),
)
