"""Rows of the contract: streams that a decode server hands back."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, source
from sgl_flowprefill.contract.symbols import REQ

PART: Final = Part(
    "handed_back",
    "Streams that a decode server hands back",
    ("scheduler",),
    (
        source(
            "hooks",
            f"{REQ}.build_rebootstrap_payload",
            ['"sampling_params": {', '"max_new_tokens": 1,'],
            "asks a prefill server to compute the KV cache of a stream again",
            "a stream that was retracted in a pause has the default objective when it is computed again",
            "(self)",
        ),
    ),
)
