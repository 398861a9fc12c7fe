"""Two tensor-parallel scheduler processes explore: they run the same shapes and give them up at the same points."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.integration.conftest import OWN_HEADS, PROMPTS
from tests.rank_notes import explore_often
from tests.ranks import Chaos, Ranks
from tests.reference import Comparison, Reference
from tests.waiting import until

WAIT_S = 120.0
BATCHES = 2
"""Batches that nobody asked for between two requests, at least."""


@pytest.fixture(scope="session")
def reference(own_heads: Reference) -> Reference:
    return own_heads


def test_two_ranks_explore_the_same_shapes_between_requests_and_answer_as_without(
    tmp_path: Path, comparison: Comparison
) -> None:
    chaos = Chaos(seed=5, switch_probability=0.03)  # a coin ends what is explored, as an arrival does
    with Ranks(str(embedded_model_path(OWN_HEADS)), 2, tmp_path, chaos, prepare=explore_often) as ranks:

        def explored(batches: int, shapes: int = 0) -> bool:
            notes = ranks.notes("explored", 0)
            return len(notes) >= batches and min(notes[-1]["explored"], notes[-1]["given_up"]) >= shapes

        for number, (rid, tokens) in enumerate(PROMPTS.items(), start=1):
            until(partial(explored, BATCHES * number), WAIT_S, say=ranks.log.read_text)
            ranks.submit(rid, tokens, ttft_slo_s=100.0)
            ranks.finish([rid])
        until(partial(explored, 1, shapes=5), WAIT_S, say=ranks.log.read_text)
        ranks.compare(comparison, PROMPTS)
        first, second = ranks.notes("explored", 0), ranks.notes("explored", 1)
    both = min(len(first), len(second))
    print(f"\n{both} batches: {first[-1]}")
    assert both >= BATCHES * len(PROMPTS)
    assert first[:both] == second[:both]
