"""Rows of the contract: state of a forward pass, saved and restored."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.parts.before_0_5_23 import INIT_IPC_CHANNELS
from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import CONTEXT, MODEL_RUNNER, OPTIONS

PART: Final = Part(
    "forward_state",
    "State of a forward pass, saved and restored",
    ("scheduler",),
    (
        *rows(
            "calls",
            "sglang.srt.model_executor.forward_context:",
            "set_forward_context(ctx)",
            "says which attention backend the layers find",
            "a resumed prefill reads another one's KV cache",
        ),
        *rows(
            "reads",
            "sglang.srt.model_executor.forward_context:",
            "_current",
            "says which attention backend the layers find",
            "a resumed prefill reads another one's KV cache",
        ),
        *rows(
            "calls",
            CONTEXT,
            "get_forward() get_model() _ConfigBag._set(self, name, value)",
            "holds flags of one forward pass",
            "a resumed prefill runs with another one's flags",
        ),
        *attributes(
            f"{CONTEXT}ForwardFlags",
            "_plain",
            "holds the flags that are no context variables",
            "a resumed prefill runs with another one's flags",
        ),
        source(
            "assumes",
            f"{MODEL_RUNNER}._forward_raw",
            ["ForwardContext(attn_backend=self.attn_backend)"],
            "opens the context of a forward pass with the model runner's backend, which is the task's",
            "a prefill plans in another one's attention state",
        ),
        *attributes(
            OPTIONS,
            "shared_experts",
            "is overridden around every forward pass",
            "a resumed prefill runs with another one's flags",
            otherwise=INIT_IPC_CHANNELS,
        ),
        *attributes(
            "sglang.srt.environ:Envs",
            "SGLANG_EAGER_INPUT_NO_COPY",
            "keeps the inputs of a batch out of buffers that the next forward overwrites",
            "a resumed prefill reads another one's tokens",
        ),
    ),
)
