"""The KV cache that a prefill server hands to the sender of a request."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.reference import Kv


def watch_kv(scheduler: Any, keep: Callable[[str, Kv], None]) -> None:
    """Call ``keep(rid, kv)`` with a copy of what is in the KV pool, at the places that ``scheduler`` gives to the
    sender, at the moment at which it does. A request has several parts in their order: SGLang sends a cached prefix
    when the prefill starts.
    """
    pool = scheduler.token_to_kv_pool_allocator.get_kvcache()
    watch_sends(scheduler, lambda req, slots: keep(req.rid, kv_at(pool, slots)))


def kv_at(pool: Any, slots: torch.Tensor) -> Kv:
    """A copy of what is in the KV ``pool`` at ``slots``."""
    buffers = (pool.get_key_buffer, pool.get_value_buffer)
    return Kv(*(torch.stack([of(i)[slots] for i in range(pool.layer_num)]) for of in buffers))


def watch_sends(scheduler: Any, sent: Callable[[Any, torch.Tensor], None]) -> None:
    """Call ``sent(req, slots)`` when ``scheduler`` gives the sender of ``req`` the KV cache at ``slots``."""
    send_chunk = scheduler.send_kv_chunk
    assert scheduler.token_to_kv_pool_allocator.page_size == 1

    def watched(req: Any, *arguments: Any, **options: Any) -> None:
        sender = req.disagg_kv_sender
        send, is_watched = sender.send, "send" in vars(sender)

        def noted(kv_indices: Any, *rest: Any, **named: Any) -> None:
            sent(req, torch.as_tensor(kv_indices, dtype=torch.long))
            send(kv_indices, *rest, **named)

        sender.send = noted
        try:
            send_chunk(req, *arguments, **options)
        finally:
            if is_watched:
                sender.send = send
            else:
                del sender.send

    scheduler.send_kv_chunk = watched
