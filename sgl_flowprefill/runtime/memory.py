"""Device memory that tasks take beside weights and KV pool: attention state of each, and activations.

What is needed at all is asked for at start, with one sentence if it is not there; what depends on the prompts bounds
which tasks may be live at the same time, as the KV pool does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS
from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.swa_memory_pool import SWAKVPool

from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.runtime.tiles import SHORT

logger = logging.getLogger(__name__)

MIB: Final = 1 << 20
IN_PIECES: Final = 0.05
"""Share of free memory that is left alone: what is freed comes back in pieces, and images are encoded in some of it."""
STEP_BYTES: Final = 12
"""Bytes that a decode step takes for each stream and token of the vocabulary: logits, those by temperature, and log
probabilities in float32 (SGLang's ``Sampler``)."""
LIVE_BESIDE_SUSPENDED: Final = 2
"""Tasks that hold attention state without being suspended: the one that runs, and one whose result is on its way."""


PLAIN_POOLS: Final = (MHATokenToKVPool, MLATokenToKVPool, SWAKVPool)
"""KV pools in which a forward pass writes a token's keys and values to its slot, and nothing else."""


def writes_kv_alone(model_runner: Any) -> bool:
    """Whether a decode step writes KV cache alone. Then one that did not get to its end can run again, and writes the
    same, and one can run for a stream that has ended, of which nobody reads what it writes. Layers that keep a state of
    a whole sequence (Mamba, linear attention) would advance it once more, and so would watermarks. Pools of other
    classes are not known to keep nothing else.
    """
    return (
        type(model_runner.req_to_token_pool) is ReqToTokenPool
        and type(model_runner.token_to_kv_pool) in PLAIN_POOLS
        and getattr(model_runner, "watermark_state", None) is None
    )


def sliding_window_limit(allocator: Any) -> float:
    """The fewest tokens of a prompt that never fits into the KV pool of ``allocator``, as layers with a sliding window
    have a smaller pool of their own, through which SGLang would take it in chunks (``SWAPrefillBudget``); infinity
    where they have none, or one that keeps no more than the window.
    """
    pool_tokens = getattr(allocator, "size_swa", None)
    if pool_tokens is None or getattr(allocator, "swa_req_ring", False):
        return math.inf
    return int(pool_tokens) - 2 * int(allocator.page_size) + 1  # its last page, and one that SGLang keeps free


@dataclass(frozen=True)
class EmptyPool:
    """SGLang's KV pool while nobody holds any of it, as its admission counts (``PrefillAdder``)."""

    tokens: float
    """Infinity where admission does not count the tokens of one pool."""
    page_tokens: int

    @classmethod
    def of(cls, allocator: Any) -> EmptyPool:
        """The pool of ``allocator``, of which nothing is taken."""
        counts_tokens = type(allocator).create_prefill_budget is BaseTokenToKVPoolAllocator.create_prefill_budget
        return cls(allocator.available_size() if counts_tokens else math.inf, allocator.page_size)

    def takes(self, prompt_tokens: int, answer_tokens: int, is_fixed: bool) -> bool:
        """Whether a prompt is admitted, with an answer of up to ``answer_tokens``. ``is_fixed``: the answer is of so
        many tokens for certain, and no prefixes are cached; SGLang keeps a token more free for those.
        """
        if not is_fixed:
            needed_tokens: int = prompt_tokens + min(answer_tokens, CLIP_MAX_NEW_TOKENS) + self.page_tokens
            return needed_tokens < self.tokens
        prompt_tokens = -(-prompt_tokens // self.page_tokens) * self.page_tokens
        left_tokens = self.tokens - prompt_tokens - self.page_tokens
        return left_tokens > answer_tokens + 1 if answer_tokens else left_tokens >= 0


@dataclass(frozen=True)
class Activations:
    """Bytes that a forward pass holds, from the shape of the model."""

    hidden: int
    """Bytes of one token's hidden state."""
    attention: int
    """Bytes of one token's queries, keys, values and attention output."""
    mlp: int
    """Bytes of one token's gate, up projection and their product; with a mixture of experts, in each that it visits."""
    mlp_tile_tokens: Callable[[], int] | None
    """Rows of an MLP tile, as it is now; None: the whole batch at once."""
    has_experts: bool = False
    """Whether there are mixtures of experts, which run whole beside MLPs in tiles."""
    between_linears: int = 0
    """Bytes of one token's gate and up projection, which a task keeps that is suspended before their product."""
    is_interrupted_inside: bool = True
    """Whether tasks are suspended inside operators, and not behind them only."""
    logits: int = 0
    """Bytes of one token's logits where log probabilities of the prompt are computed: of a rank, gathered, and scored
    (``LogprobProcessor._can_borrow_logprob_memory`` counts three matrices, too)."""
    logits_chunk_tokens: int | None = None
    """Rows that SGLang computes logits of at once; None: of the whole batch."""
    for_draft: int = 0
    """Bytes of one token's hidden states that are kept for the draft model, if there is one."""

    @classmethod
    def of(
        cls,
        model_config: Any,
        dtype_bytes: int,
        mlp_tile_tokens: Callable[[], int] | None,
        kept_hidden_states: int = 0,
        gathered: int = 1,
        shared: int = 1,
        is_interrupted_inside: bool = True,
        has_dense_mlps: bool = True,
    ) -> Activations:
        """Activations of a rank. So many hidden states of each token are kept for a draft model, and those of so many
        ranks are ``gathered``. The heads of attention and the weights of dense MLPs are ``shared`` by so many ranks; a
        model with experts may have MLPs that are not, and a rank experts that all tokens visit.
        ``has_dense_mlps``: whether tasks are suspended within MLPs, too.
        """
        text = model_config.hf_text_config
        heads = -(-model_config.num_attention_heads // shared) + -(-model_config.get_total_num_kv_heads() // shared)
        dense = int(getattr(text, "intermediate_size", None) or 4 * model_config.hidden_size)
        expert = int(getattr(text, "moe_intermediate_size", None) or 0)
        experts = int(getattr(text, "num_experts_per_tok", None) or 0)
        dense = dense if experts else -(-dense // shared)
        return cls(
            hidden=model_config.hidden_size * dtype_bytes * gathered,
            attention=2 * heads * model_config.head_dim * dtype_bytes,
            mlp=max(3 * dense, experts * (3 * expert + model_config.hidden_size)) * dtype_bytes,
            mlp_tile_tokens=mlp_tile_tokens,
            has_experts=experts > 0,
            between_linears=2 * dense * dtype_bytes if has_dense_mlps else 0,
            is_interrupted_inside=is_interrupted_inside,
            logits=3 * int(model_config.vocab_size) * torch.float32.itemsize,
            logits_chunk_tokens=(
                envs.SGLANG_LOGPROB_CHUNK_SIZE.get() if envs.SGLANG_ENABLE_LOGPROB_CHUNK.get() else None
            ),
            for_draft=kept_hidden_states * model_config.hidden_size * dtype_bytes,
        )

    def checkpoint_bytes(self, tokens: int) -> int:
        """A task at a preemption checkpoint: input of the layer, input and output of the operator that it stopped
        after, residual. Norms that work in place (on a GPU) save the first.
        """
        return tokens * (4 * self.hidden + self.for_draft)

    def suspended_bytes(self, tokens: int) -> int:
        """The most that a suspended task holds: at a preemption checkpoint; in a tile of an MLP, between its linear
        layers; or behind the last linear layer of attention, whose input and tensors are still there.
        """
        held = self.checkpoint_bytes(tokens)
        if not self.is_interrupted_inside:
            return held
        in_attention = tokens * max(0, self.attention - self.hidden)  # of four hidden states there are three
        return held + max(in_attention, self._rows_between_linears(tokens) * self.between_linears)

    def running_bytes(self, tokens: int) -> int:
        """The most that a task holds: within attention, or within the MLP. The draft is given one tensor of all that is
        kept for it.
        """
        rows = tokens if self.has_experts else self._tile_rows(tokens)
        held = self.checkpoint_bytes(tokens) + tokens * self.for_draft
        return held + max(tokens * self.attention, rows * self.mlp)

    def logits_bytes(self, rows: int) -> int:
        """What a task holds at its end, beside its hidden states, for log probabilities of ``rows`` prompt tokens. A
        prefill is not suspended there.
        """
        return min(rows, self.logits_chunk_tokens or rows) * self.logits

    def _tile_rows(self, tokens: int) -> int:
        """The last tile may be longer than the others."""
        return tokens if self.mlp_tile_tokens is None else min(tokens, int((1 + SHORT) * self.mlp_tile_tokens()))

    def _rows_between_linears(self, tokens: int) -> int:
        """A prompt that is SHORT passes no interruption point within an MLP."""
        if self.mlp_tile_tokens is not None and tokens <= SHORT * self.mlp_tile_tokens():
            return 0
        return self._tile_rows(tokens)


@dataclass(frozen=True)
class TaskMemory:
    """Which tasks may be live at the same time."""

    activations: Activations
    budget_bytes: float
    """For the activations of all live tasks; infinite where the device's memory is the host's."""

    @classmethod
    def plan(
        cls,
        model_runner: Any,
        slots: AttentionSlots,
        max_suspended: int,
        mlp_tile_tokens: Callable[[], int] | None,
        kept_hidden_states: int = 0,
        gathered: int = 1,
        streams: int = 0,
        shared: int = 1,
        is_interrupted_inside: bool = True,
        has_dense_mlps: bool = True,
    ) -> TaskMemory:
        """Measure what is free and what a task needs, beside decode steps over up to so many ``streams``. Raises
        SystemExit with one line when that does not fit.
        """
        config, dtype_bytes = model_runner.model_config, model_runner.dtype.itemsize
        activations = Activations.of(
            config,
            dtype_bytes,
            mlp_tile_tokens,
            kept_hidden_states,
            gathered,
            shared,
            is_interrupted_inside,
            has_dense_mlps,
        )
        if model_runner.device != "cuda":
            return cls(activations, float("inf"))
        tasks = max_suspended + LIVE_BESIDE_SUSPENDED
        slot_bytes = slots.measure_bytes(torch.cuda.memory_allocated)
        slots_bytes = slot_bytes * (tasks - 2)  # the first one is there, and the one just measured
        longest_tokens = min(config.context_len, model_runner.max_total_num_tokens)
        budget_bytes = budget(
            free_bytes=free_device_bytes(),
            slots_bytes=slots_bytes,
            longest_bytes=activations.running_bytes(longest_tokens),
            tasks=tasks,
            steps_bytes=streams * config.vocab_size * STEP_BYTES,
        )
        logger.info(
            "FlowPrefill: %d tasks need %d MiB of attention state, %d of them as they come; %d MiB are left for "
            "activations, those of %d tokens at preemption checkpoints",
            tasks,
            slot_bytes * tasks // MIB,
            slots_bytes // MIB,
            budget_bytes // MIB,
            budget_bytes // activations.checkpoint_bytes(1),
        )
        return cls(activations, budget_bytes)

    def admits(self, live_tokens: Sequence[int], new_tokens: int, logprob_rows: int = 0) -> bool:
        """Whether a task of ``new_tokens`` may start beside live ones: all of them suspended, but one, whichever takes
        most, running, or the one with the most ``logprob_rows``, at its end. Alone it always may.
        """
        if not live_tokens:
            return True
        activations, tasks = self.activations, (*live_tokens, new_tokens)
        suspended = [activations.suspended_bytes(tokens) for tokens in tasks]
        more = max(activations.running_bytes(tokens) - held for tokens, held in zip(tasks, suspended, strict=True))
        return sum(suspended) + max(more, activations.logits_bytes(logprob_rows)) <= self.budget_bytes


def budget(free_bytes: int, slots_bytes: int, longest_bytes: int, tasks: int, steps_bytes: int = 0) -> int:
    """What is left for activations, without what decode steps take and what is lost to pieces, but at least what the
    longest prompt takes alone. Raises SystemExit when there is not even that.
    """
    left_bytes = free_bytes - slots_bytes
    if left_bytes < longest_bytes:
        raise SystemExit(
            f"sgl-flowprefill: {tasks} tasks need {-(-(slots_bytes + longest_bytes) // MIB)} MiB beside the KV pool "
            f"({slots_bytes // MIB} for attention, {longest_bytes // MIB} for the activations of the longest prompt) "
            f"and {free_bytes // MIB} MiB are free: lower --mem-fraction-static or --flowprefill-max-suspended, or set "
            "--context-length"
        )
    return max(longest_bytes, left_bytes - steps_bytes - int(IN_PIECES * free_bytes))


def free_device_bytes() -> int:
    """What the device has free, once PyTorch has given back what it keeps of what is no longer used. What it keeps then
    belongs to CUDA graphs, or to the stream of the start, and cannot be had on the stream on which the server serves.
    """
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info()
    return int(free_bytes)
