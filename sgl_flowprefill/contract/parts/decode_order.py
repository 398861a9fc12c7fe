"""Rows of the contract: running slots of a decode server."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, source
from sgl_flowprefill.contract.symbols import DECODE_QUEUE

PART: Final = Part(
    "decode_order",
    "Running slots of a decode server",
    ("scheduler",),
    (
        source(
            "hooks",
            f"{DECODE_QUEUE}.pop_preallocated",
            ["self._resolve_pending_reqs()", "for i, decode_req in enumerate(self.queue):"],
            "gives places and KV cache in the order of the queue",
            "urgent requests wait at the decode server behind those that the prefill server puts off",
            "(self, ...)",
        ),
        source(
            "assumes",
            f"{DECODE_QUEUE}._create_receiver_and_enqueue",
            ["self.queue.append(decode_req)"],
            "appends to the queue",
            "the order of running slots is made anew at each step",
        ),
        *attributes(
            DECODE_QUEUE,
            "queue",
            "holds the requests that wait for places",
            "urgent requests wait at the decode server behind those that the prefill server puts off",
        ),
        *attributes(
            "sglang.srt.disaggregation.decode:DecodeRequest",
            "req",
            "is the request that waits for a place",
            "urgent requests wait at the decode server behind those that the prefill server puts off",
        ),
    ),
)
