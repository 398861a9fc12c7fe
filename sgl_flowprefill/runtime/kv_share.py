"""How much of a GPU's memory becomes KV cache, where the user has not said it: all that tasks do not need beside it.

Target: ``KVCacheConfigurator.config_from_budget`` (SGLang 0.5.23), which is given what is free within
``--mem-fraction-static`` when the weights have been loaded, and makes a KV pool of it. A prompt is no longer than the
context, nor than the pool: on a card that the weights almost fill, a small pool needs little beside it.
``TaskMemory.plan`` measures later what is left, and bounds live tasks by it.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.distributed.parallel_state import get_world_group
from sglang.srt.utils.common import get_device_memory_capacity

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.contract import expect
from sgl_flowprefill.patches.static_memory import SEAM
from sgl_flowprefill.runtime.draft_model import kept_by
from sgl_flowprefill.runtime.memory import IN_PIECES, LIVE_BESIDE_SUSPENDED, MIB, STEP_BYTES, Activations

logger = logging.getLogger(__name__)

TARGET: Final = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator.config_from_budget"
SLOT_BYTES: Final = 40 * MIB
"""Of a FlashInfer slot: four integer workspaces, and plans of tiles. Other backends take next to nothing."""
SLIDING_SLOT_BYTES: Final = 64 * MIB
FASTEST_FLOPS: Final = ((160 << 10, 5e15), (60 << 10, 2e15), (0, 8e14))
"""FLOP/s that a card with so many MiB or more does not go beyond in the products of an MLP, in FP8 neither: a tile of
the MLP has as many rows as run in the time between two interruption points, of which there is one within the MLP."""


@dataclass(frozen=True)
class Needed:
    """Bytes that tasks need beside a KV pool."""

    fixed_bytes: int
    """Whatever the size of the pool: attention state of tasks, and what decode steps sample from."""
    activations: Activations
    context_tokens: int

    @classmethod
    def of(cls, configurator: Any, config: FlowPrefillConfig) -> Needed:
        """What tasks of a server need whose pool SGLang's ``configurator`` makes."""
        options, model_config = resolving_view(configurator.server_args), configurator.model_config
        backend = options.prefill_attention_backend or options.attention_backend
        slot_bytes = SLOT_BYTES if configurator.sliding_window_size is None else SLIDING_SLOT_BYTES
        slots = config.max_suspended + LIVE_BESIDE_SUSPENDED if backend == "flashinfer" else 0
        streams = options.cuda_graph_config.decode.max_bs or 0 if options.disaggregation_mode == "null" else 0
        is_joint = (options.attn_dp_size or 1) > 1
        kept = 0 if options.speculative_algorithm is None else kept_by(configurator.spec_aux_config)
        gathered, shared = (options.tp_size, 1) if is_joint else (1, options.tp_size)
        dtype_bytes = configurator.model_dtype.itemsize
        whole = Activations.of(model_config, dtype_bytes, None, kept, gathered, shared)
        has_adapters = bool(options.enable_lora or options.lora_paths)
        activations = whole
        if config.granularity == "operator" and not is_joint and not has_adapters:
            row_flop = 2 * (whole.mlp / dtype_bytes) * model_config.hidden_size  # two operations for each weight
            rows = int(config.max_blocking_ms / 1e3 * _fastest_flops(configurator.device) / row_flop)
            activations = Activations.of(model_config, dtype_bytes, lambda: rows, kept, gathered, shared)
        fixed_bytes = slots * slot_bytes + streams * int(model_config.vocab_size) * STEP_BYTES
        return cls(fixed_bytes, activations, int(model_config.context_len))

    def beside(self, pool_tokens: int) -> int:
        """What has to be free beside a pool of so many tokens, with what is lost to pieces: the longest prompt runs,
        and ends with log probabilities of its tokens. Others that are suspended beside it have what that leaves, and
        what shorter prompts leave.
        """
        longest = min(pool_tokens, self.context_tokens)
        running_bytes = self.activations.running_bytes(longest)
        ending_bytes = self.activations.checkpoint_bytes(longest) + self.activations.logits_bytes(longest)
        return self.fixed_bytes + int(max(running_bytes, ending_bytes) / (1 - IN_PIECES))


def apply() -> None:
    """Register the hook, in a process that may run a scheduler. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, leave_room, HookType.AROUND)


def leave_room(original: Callable[..., Any], configurator: Any, budget_bytes: int, *args: Any, **kwargs: Any) -> Any:
    """The hook: the KV pool leaves room for what tasks need beside it, unless the user has said its share."""
    chooses, has_nodes = _chooses(configurator), resolving_view(configurator.server_args).nnodes > 1
    if has_nodes:  # the command line and the environment of another node may differ
        chooses = get_world_group().broadcast_object(chooses)
    if not chooses:
        return original(configurator, budget_bytes, *args, **kwargs)
    needed = Needed.of(configurator, FlowPrefillConfig.from_env())

    def tokens_in(pool_bytes: int) -> int:
        return int(original(configurator, pool_bytes, *args, **kwargs).max_total_num_tokens)

    pool_bytes = share(budget_bytes, tokens_in, needed.beside)
    if has_nodes:
        pool_bytes = get_world_group().broadcast_object(pool_bytes)
    logger.info(
        "FlowPrefill: of %d MiB, %d become KV cache and %d stay free for attention state and activations, as "
        "--mem-fraction-static is not given",
        budget_bytes // MIB,
        pool_bytes // MIB,
        (budget_bytes - pool_bytes) // MIB,
    )
    return original(configurator, pool_bytes, *args, **kwargs)


def share(budget_bytes: int, tokens_in: Callable[[int], int], beside: Callable[[int], int]) -> int:
    """How much of ``budget_bytes`` a KV pool gets, so that there is what its tokens need ``beside`` it.

    ``tokens_in``: the tokens of a pool of so many bytes: in proportion to these, or fewer where something else bounds
    them. All goes to the pool where nothing fits beside one: the start will say so when it has measured.
    """
    tokens = tokens_in(budget_bytes) if budget_bytes > 0 else 0
    if tokens <= 0:
        return budget_bytes  # SGLang says why it cannot start
    token_bytes = budget_bytes / tokens
    fits = bisect_right(range(tokens + 1), budget_bytes, key=lambda some: int(some * token_bytes) + beside(some)) - 1
    pool_bytes = int(fits * token_bytes)
    if pool_bytes <= 0:
        return budget_bytes
    if tokens_in(pool_bytes) > 1.01 * fits:  # not in proportion: what as many need as there can be
        left_bytes = budget_bytes - beside(tokens)
        return left_bytes if left_bytes > 0 else pool_bytes
    return pool_bytes


def _chooses(configurator: Any) -> bool:
    """Whether the size of the pool is FlowPrefill's to choose."""
    options = configurator.server_args
    given = (getattr(options, "_raw_input", None) or {}).get("mem_fraction_static")
    is_gpu = configurator.device == "cuda"
    return is_gpu and given is None and resolving_view(options).disaggregation_mode != "decode"


def _fastest_flops(device: str) -> float:
    gpu_mib = get_device_memory_capacity(device) or 0
    return next(flops for least_mib, flops in FASTEST_FLOPS if gpu_mib >= least_mib)
