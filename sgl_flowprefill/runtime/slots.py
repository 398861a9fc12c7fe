"""Attention backends for tasks that live at the same time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

from sgl_flowprefill.runtime.draft_model import draft_backend_of, pair
from sgl_flowprefill.runtime.tiled_attention import tile_queries

logger = logging.getLogger(__name__)


class AttentionSlots:
    """Attention backends for tasks that live at the same time: a backend keeps the metadata of one batch.

    The first slot is the model runner's own backend, where that has nothing else to do; others are made when needed and
    reused. FlashInfer's backends have plans and integer workspaces of their own and share the large float workspace,
    which holds partial results within one attention kernel and the merge that follows it on the same stream: a task is
    never suspended between the two. To each belongs one of the draft model, if there is a draft.
    """

    def __init__(
        self,
        model_runner: Any,
        between_tiles: Callable[[], None] | None,
        tile_pairs: Callable[[], float] = lambda: math.inf,
        with_main: bool = True,
        draft_runner: Any = None,
    ) -> None:
        """Attention runs in tiles of ``tile_pairs()`` pairs, asked for when a slot is taken; None: whole.

        ``with_main``: whether the model runner's own backend is a slot. A server that decodes keeps it for that: its
        steps run while tasks are suspended. ``draft_runner``: the draft model's.
        """
        self._model_runner = model_runner
        self._draft_runner = draft_runner
        if draft_runner is not None:
            pair(model_runner.attn_backend, draft_runner.attn_backend)
        self._between_tiles = between_tiles
        self._tile_pairs = tile_pairs
        first = model_runner.attn_backend if with_main else self._new()
        self._free = [first]
        whole = self._tile(first)
        if whole is not None:
            self._between_tiles = None  # nor can its other slots: not asked again at every start
            logger.warning("FlowPrefill does not split long attention operators of %s", whole)

    def take(self) -> Any:
        backend = self._free.pop() if self._free else self._new()
        self._tile(backend)
        return backend

    def measure_bytes(self, allocated_bytes: Callable[[], int]) -> int:
        """Make a slot ahead of its use; device memory that it took, with what its tiles are planned in."""
        before_bytes = allocated_bytes()
        backend = self._new()
        self._tile(backend)
        self._free.append(backend)
        return allocated_bytes() - before_bytes

    def give_back(self, backend: Any) -> None:
        self._free.append(backend)

    def is_free(self, backend: Any) -> bool:
        """Whether ``backend`` is no task's."""
        return any(free is backend for free in self._free)

    def _new(self) -> Any:
        backend = _make_backend(self._model_runner)
        if self._draft_runner is not None:
            pair(backend, _make_backend(self._draft_runner))
        return backend

    def _tile(self, backend: Any) -> str | None:
        if self._between_tiles is None:
            return None
        draft = draft_backend_of(backend)
        if draft is not None:
            tile_queries(draft, self._between_tiles, self._tile_pairs())
        return tile_queries(backend, self._between_tiles, self._tile_pairs())


def _make_backend(model_runner: Any) -> Any:
    backend = model_runner._get_attention_backend(init_new_workspace=False)
    model_runner.kv_index_translator.bind_and_verify_backends([backend])
    return backend
