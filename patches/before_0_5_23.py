"""SGLang 0.5.22 gets what SGLang 0.5.23 has, for the code that is written against that.

* ``Scheduler.send_abort_output`` is how a request ends that is not answered by the output streamer. In 0.5.22 these
  places call the sender of ``ipc_channels`` themselves, which ``init_ipc_channels`` makes; here its messages of that
  kind go through the method. Without it, aborted requests end in the event log late, and without their reason.
* ``get_model().shared_experts`` is a flag that a forward pass of 0.5.23 overrides. In 0.5.22 there is none, and here
  one that says nothing. Without it no forward pass can be suspended.

On 0.5.23 this does nothing.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "before_0_5_23"
SCHEDULER: Final = "sglang.srt.managers.scheduler.Scheduler"
TARGET: Final = "sglang.srt.managers.scheduler.Scheduler.init_ipc_channels"
METHOD: Final = "send_abort_output"


def apply() -> None:
    """Register the seam in a process that runs a scheduler, where it is needed. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    scheduler_class = resolve(SEAM, SCHEDULER)
    if hasattr(scheduler_class, METHOD):
        return
    expect(SEAM)
    setattr(scheduler_class, METHOD, _send_abort_output)
    HookRegistry.register(TARGET, _complete, HookType.AFTER)


def _send_abort_output(scheduler: Any, abort_req: Any, req: Any) -> None:
    from sglang.srt.managers.scheduler_components.output_sender import SenderWrapper

    SenderWrapper.send_output(scheduler.ipc_channels.send_to_tokenizer, abort_req, req)


def _complete(_result: None, scheduler: Any, *_args: Any) -> None:
    from sglang.srt.managers.io_struct import AbortReq
    from sglang.srt.runtime_context import get_model

    get_model()._set("shared_experts", None)
    sender = scheduler.ipc_channels.send_to_tokenizer
    send = sender.send_output

    def send_output(output: Any, recv_obj: Any = None) -> None:
        if isinstance(output, AbortReq) and recv_obj is not None:
            scheduler.send_abort_output(output, recv_obj)
        else:
            send(output, recv_obj)

    sender.send_output = send_output
