"""A prompt of token ids is checked in one go.

Target: ``decode_TokenIds`` (sglang/api/v1/api_types.py), by which the HTTP server checks the
``input_ids`` of a ``/generate`` request before it answers. It looks at one id after the other in Python: 1.4 ms for
8,192 of them, at the prefill and at the decode server, which share one core on a small CPU machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from sgl_flowprefill.patches.base import expect

SEAM: Final = "token_ids"
TARGET: Final = "sglang.api.v1.api_types.decode_TokenIds"


def apply() -> None:
    """Register the seam in a process that serves HTTP. Raises SeamError."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    HookRegistry.register(TARGET, decode, HookType.AROUND)


def decode(one_by_one: Callable[[Any], list[int]], value: Any) -> list[int]:
    """What SGLang's own function returns for plain integers; that says what is wrong with anything else."""
    return list(value) if type(value) is list and set(map(type, value)) <= {int} else one_by_one(value)
