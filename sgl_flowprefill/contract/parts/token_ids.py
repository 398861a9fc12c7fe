"""Rows of the contract: prompts of token ids."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, source

PART: Final = Part(
    "token_ids",
    "Prompts of token ids",
    ("HTTP server",),
    (
        source(
            "hooks",
            "sglang.api.v1.api_types:decode_TokenIds",
            ['return [_expect_int(e, expected="i64") for e in _expect_seq(value, '],
            "checks token ids one after the other, and here in one go",
            "8,192 token ids take 1.4 ms of the HTTP server",
            "(value)",
        ),
    ),
)
