"""What a prefill server knows of a request goes to the decode server with its KV cache, for the client's answer.

SGLang sends a row of 16 integers along, of which it uses seven, for numbers of cached tokens; the others are ours
(``carried.py``). The prefill server's scheduler writes them before it sends (``write``).

Target: ``DecodeTransferQueue._commit_transfer_to_req`` (disaggregation/decode.py), in which a decode server reads what
has come; then another request gets the row. Without this seam, a decode server's answers say no more than whether the
first token came in time.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.carried import WORDS, Carried, decode, encode
from sgl_flowprefill.patches.base import expect

SEAM: Final = "carried_report"
TARGET: Final = "sglang.srt.disaggregation.decode.DecodeTransferQueue._commit_transfer_to_req"
CARRIED: Final = "flowprefill_carried"
"""Attribute of SGLang's Req at a decode server: what came with its KV cache, or None."""
OURS: Final = slice(7, 7 + WORDS)
"""Those of a row that SGLang does not use."""
NOTHING: Final = (0,) * WORDS


def apply() -> None:
    """Register the seam in a process that may run a decode scheduler. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, read, HookType.AFTER)


def write(buffers: Any, req: Any, carried: Carried | None) -> None:
    """Have SGLang's metadata ``buffers`` say this of ``req``, whose KV cache is about to be sent. None: nothing, and
    what the request before left in its row is cleared.
    """
    if _has_room(buffers):
        room = req.bootstrap_room
        words = NOTHING if carried is None or room is None else encode(carried, room)
        buffers.cached_tokens[req.metadata_buffer_index, OURS] = buffers.cached_tokens.new_tensor(words)


def read(_result: None, queue: Any, decode_req: Any) -> None:
    """The hook: keep what has come with the KV cache of a request. Of a stream that was handed back to the prefill
    server, what came at first counts, as its first token does.
    """
    req, buffers = decode_req.req, queue.metadata_buffers
    if hasattr(req, CARRIED):
        return
    found = None
    if _has_room(buffers) and req.bootstrap_room is not None:
        found = decode(buffers.cached_tokens[decode_req.metadata_buffer_index, OURS].tolist(), req.bootstrap_room)
    setattr(req, CARRIED, found)


def of(req: Any) -> Carried | None:
    """What the prefill server knew of ``req``, at its decode server; None if nothing came."""
    carried: Carried | None = getattr(req, CARRIED, None)
    return carried


def _has_room(buffers: Any) -> bool:
    return bool(buffers.cached_tokens.shape[1] >= OURS.stop)
