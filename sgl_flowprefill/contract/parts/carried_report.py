"""Rows of the contract: what a prefill server tells its decode server of requests."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import REQ, SCHEDULER

BUFFERS: Final = "sglang.srt.disaggregation.utils:MetadataBuffers"
TRANSFERS: Final = "sglang.srt.disaggregation.decode:DecodeTransferQueue"
OVERWRITTEN: Final = (
    "numbers of SGLang's and of reports overwrite each other, unless the server is started with "
    "--flowprefill-answer-report false"
)
BREAKS: Final = "answers of a pair say no more than whether the first token came in time"

PART: Final = Part(
    "carried_report",
    "What a prefill server tells its decode server of requests",
    ("scheduler",),
    (
        *rows(
            "hooks",
            TRANSFERS,
            "_commit_transfer_to_req(self, decode_req)",
            "reads at a decode server what has come with the KV cache of a request",
            BREAKS,
        ),
        *attributes(
            TRANSFERS,
            "metadata_buffers",
            "is where that comes to",
            BREAKS,
        ),
        *attributes(
            "sglang.srt.disaggregation.decode:DecodeRequest",
            "req metadata_buffer_index",
            "says which row is of which request at a decode server",
            BREAKS,
        ),
        *attributes(
            SCHEDULER,
            "disagg_metadata_buffers",
            "is what a prefill server sends with KV caches",
            BREAKS,
        ),
        *attributes(
            REQ,
            "metadata_buffer_index",
            "says which row is of which request at a prefill server",
            BREAKS,
        ),
        *attributes(
            BUFFERS,
            "cached_tokens",
            "has rows of which SGLang does not use all",
            BREAKS,
        ),
        source(
            "assumes",
            f"{BUFFERS}.set_buf",
            ["self.cached_tokens[req.metadata_buffer_index][6] = video_t"],
            "leaves the end of a row of cached_tokens to others",
            OVERWRITTEN,
            lacks=["self.cached_tokens[req.metadata_buffer_index][7]"],
        ),
        source(
            "assumes",
            f"{TRANSFERS}._commit_transfer_to_req",
            ["cached_tokens[6].item()"],
            "reads nothing from there",
            OVERWRITTEN,
            lacks=["cached_tokens[7]"],
        ),
        source(
            "assumes",
            f"{BUFFERS}.get_buf_infos",
            ["self.cached_tokens,", "item_lens = [buf[0].nbytes for buf in bufs]"],
            "has whole rows sent",
            BREAKS,
        ),
    ),
)
