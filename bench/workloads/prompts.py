"""Prompts as token ids, from a seed: equal hash ids become equal tokens, everything else is unique.

Two runs with the same seed send byte-identical prompts, so both systems of a comparison see the same cache hits.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from sgl_flowprefill.bench.workloads.trace import TraceRequest

UNIQUE_BLOCKS_FROM: Final = 1 << 40
"""First block id of prompts without hash ids; ids in trace files are far smaller."""
BLOCKS_PER_UNIQUE_PROMPT: Final = 1 << 20


@dataclass(frozen=True)
class PromptBuilder:
    """Builds prompts of exactly the wanted length out of token ids in [first_token_id, end_token_id)."""

    seed: int
    first_token_id: int = 1000
    end_token_id: int = 4000
    """By default ordinary tokens of the embedded model, and of any model with a larger vocabulary."""
    first_index: int = 0
    """Index in the whole trace of the first request of the part that is built for."""

    def beginning_at(self, first_index: int) -> PromptBuilder:
        """The builder of the prompts of a part of the trace, the same as in the whole."""
        return dataclasses.replace(self, first_index=first_index)

    def build(self, request: TraceRequest, index: int) -> list[int]:
        """Token ids of the prompt of ``request``, the ``index``-th of its trace.

        What its hash ids do not cover is unique.
        """
        return self._tokens(request.hash_ids, request.block_tokens, request.prompt_tokens, self.first_index + index)

    def unique(self, prompt_tokens: int, index: int) -> list[int]:
        """A prompt that shares no prefix with those of another ``index``."""
        return self._tokens((), 16, prompt_tokens, index)

    def _tokens(self, hash_ids: tuple[int, ...], block_tokens: int, prompt_tokens: int, index: int) -> list[int]:
        wanted = -(-prompt_tokens // block_tokens)
        missing = max(0, wanted - len(hash_ids))
        first = UNIQUE_BLOCKS_FROM + index * BLOCKS_PER_UNIQUE_PROMPT
        blocks = np.array([*hash_ids[:wanted], *range(first, first + missing)], dtype=np.uint64)
        places = blocks[:, None] * np.uint64(block_tokens) + np.arange(block_tokens, dtype=np.uint64)
        mixed = _splitmix64(places.ravel()[:prompt_tokens] ^ _splitmix64(np.uint64(self.seed)))
        span = np.uint64(self.end_token_id - self.first_token_id)
        return (mixed % span + np.uint64(self.first_token_id)).tolist()  # type: ignore[no-any-return]


def _splitmix64(value: NDArray[np.uint64] | np.uint64) -> NDArray[np.uint64]:
    """The output function of the SplitMix64 generator: a well-mixed 64-bit value for each input."""
    with np.errstate(over="ignore"):
        z = np.asarray(value + np.uint64(0x9E3779B97F4A7C15))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))
