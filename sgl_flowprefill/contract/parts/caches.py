"""Rows of the contract: radix cache and grammars."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source

GRAMMARS: Final = "sglang.srt.constrained.grammar_manager:GrammarManager"

PART: Final = Part(
    "caches",
    "Radix cache and grammars",
    ("scheduler",),
    (
        *rows(
            "calls",
            "sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache",
            "evictable_size(self) protected_size(self)",
            "tells whether the radix cache has taken KV",
            "KV indices may be read before they are there",
        ),
        *rows(
            "calls",
            GRAMMARS,
            "has_waiting_grammars(self) get_ready_grammar_requests(self)",
            "gives the requests whose grammars are compiled",
            "requests with grammars are not started",
        ),
        *attributes(
            GRAMMARS,
            "grammar_queue SGLANG_GRAMMAR_MAX_POLL_ITERATIONS SGLANG_GRAMMAR_POLL_INTERVAL",
            "holds the requests whose grammars are being compiled, and says for how long",
            "a grammar that cannot be compiled is waited for, for ever",
        ),
        source(
            "assumes",
            f"{GRAMMARS}.get_ready_grammar_requests",
            ["grammar_wait_ct", "SGLANG_GRAMMAR_MAX_POLL_ITERATIONS"],
            "gives a grammar up by the number that is set here",
            "a grammar that cannot be compiled is waited for, for ever",
        ),
    ),
)
