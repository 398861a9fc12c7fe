"""The share of a GPU's memory that weights and KV cache get, where the user has not said it.

Target: ``sglang.srt.arg_groups.memory_hook.handle_gpu_memory_settings`` (SGLang 0.5.23), which keeps 1.5 MiB free for
each token of a chunk, and of ``--max-prefill-tokens`` where prompts are not chunked: 24 GiB by default, all that some
cards have. What prompts that are prefilled whole need follows from the model and the size of the KV cache instead,
which are known when the weights have been loaded (``runtime.kv_share``). Here, what the server needs beside them stays
free.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

logger = logging.getLogger(__name__)

SEAM: Final = "static_memory"
TARGET: Final = "sglang.srt.arg_groups.memory_hook.handle_gpu_memory_settings"
SOURCE: Final = "flowprefill_static_memory"
"""Under which name SGLang notes what is decided here."""
FLOOR_MIB: Final = 2048
"""For workspaces of attention and of matrix products, for kernels that are loaded later, and for what CUDA graphs take
beyond SGLang's estimate: SGLang keeps 1,536 where it measures what graphs and activations take."""
RANKS_MIB: Final = 1024 / 8
"""For each rank, as SGLang does."""
A2A_MIB: Final = 2048
"""For exchanges of tokens between experts: SGLang counts them for CUDA graphs of decode steps alone."""


def apply() -> None:
    """Register the hook. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, without_activations, HookType.AROUND)


def without_activations(original: Callable[[Any], None], server_args: Any) -> None:
    """The hook: the share that SGLang chooses for a server that prefills on a GPU counts no activations."""
    from sglang.srt.arg_groups import memory_hook
    from sglang.srt.arg_groups.overrides import declare_resolution, model_config_of, resolving_view
    from sglang.srt.utils.common import get_device_memory_capacity

    view = resolving_view(server_args)
    is_given = view.mem_fraction_static is not None
    original(server_args)
    if is_given or view.device != "cuda" or view.disaggregation_mode == "decode":
        return
    gpu_mib = get_device_memory_capacity(view.device)
    if gpu_mib is None:
        return
    kept_mib = FLOOR_MIB + view.tp_size * view.pp_size * RANKS_MIB
    exchanges = view.moe_a2a_backend not in (None, "none")
    a2a_mib = max(A2A_MIB if exchanges else 0, memory_hook.reserve_for_deepep_a2a_mb(server_args))
    kept_mib += memory_hook.reserve_for_graph_mb(server_args) + a2a_mib
    share = 1 - kept_mib / gpu_mib
    model_config = model_config_of(server_args)
    if model_config.is_multimodal and not view.language_only and not view.language_model_only:
        share = memory_hook.adjust_mem_fraction_for_vlm(share, model_config, False, gpu_mib)
    declare_resolution(server_args, SOURCE, mem_fraction_static=round(share, 3))
    logger.info(
        "FlowPrefill: --mem-fraction-static is %.3f; of this share, what the activations of the longest prompt need "
        "will be no KV cache",
        share,
    )
