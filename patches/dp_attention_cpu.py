"""Data-parallel attention on the portable CPU platform: PyTorch copies and gathers rows, in host memory that is not
pinned.

Targets: ``memcpy`` of ``layers/dp_attention.py``, which moves each rank's rows into the batch of all ranks and
back, by a Triton kernel everywhere but on SGLang's own CPU engine; ``torch`` in the module of ``ForwardBatch``,
which asks it for a pinned tensor there; and ``reg_all_gather_into_tensor`` and ``reg_reduce_scatter_tensor``, by which
decode steps gather and scatter, which PyTorch knows as operators of accelerators alone. Without this seam a server with
``--enable-dp-attention`` fails at its first forward pass, and one that decodes at its first step. Taken before SGLang
makes its scheduler, where its ranks have attention of their own.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Final

from sgl_flowprefill.patches.base import expect, resolve
from sgl_flowprefill.patches.torch_on_host import UNPINNED, replace_in_modules

SEAM: Final = "dp_attention_cpu"
CONFIGURE: Final = "sglang.srt.managers.scheduler.configure_scheduler_process"
COPY: Final = "sglang.srt.layers.dp_attention.memcpy"
COPY_ON_CPU: Final = "sglang.srt.layers.dp_attention.memcpy_cpu"
BATCH: Final = "sglang.srt.model_executor.forward_batch_info.ForwardBatch"
OPERATORS: Final = (
    "sglang.srt.distributed.parallel_state.reg_all_gather_into_tensor",
    "sglang.srt.distributed.parallel_state.reg_reduce_scatter_tensor",
)


def apply() -> None:
    """Register the hook. Only for processes on the portable CPU platform."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(CONFIGURE, _take_where_it_is_on, HookType.BEFORE)


def _take_where_it_is_on(*_args: Any, **_kwargs: Any) -> None:
    from sglang.srt.runtime_context import get_parallel

    if get_parallel().attn_dp_size > 1:
        take()


def take() -> None:
    """Take the seam. Raises SeamError."""
    expect(SEAM)
    copy = resolve(SEAM, COPY)
    setattr(sys.modules[copy.__module__], copy.__name__, resolve(SEAM, COPY_ON_CPU))
    replace_in_modules(SEAM, [BATCH], UNPINNED)
    for target in OPERATORS:
        operator = resolve(SEAM, target)
        setattr(sys.modules[operator.__module__], operator.__name__, inspect.unwrap(operator))
