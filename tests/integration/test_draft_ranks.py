"""Two tensor-parallel ranks with a draft model hand over together what one would that computes each prompt alone."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.drafts import Draft, DraftComparison, Drafted, Handed, options
from tests.integration.conftest import OWN_HEADS
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks
from tests.reference import Kv

SHARED = prompt(99, 300)
PROMPTS = {
    f"r{i:02}": prompt(i, tokens, SHARED if i % 2 else None)
    for i, tokens in enumerate([40, 500, 2900, 350, 1300, 310, 7, 900, 330, 64])
}


class Writing(Handed):
    """Writes what has been handed over to a file for each request."""

    folder: Path
    rank: int

    def _sent(self, req: Any, slots: torch.Tensor) -> None:
        super()._sent(req, slots)
        path = drafted_path(self.folder, self.rank, req.rid)
        torch.save(self.drafted(req.rid), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)


def drafted_path(folder: Path, rank: int, rid: str) -> Path:
    return folder / f"draft-{rank}-{rid}.pt"


def write_drafts(folder: Path, scheduler: Any, rank: int) -> None:
    handed = Writing(scheduler)
    handed.folder, handed.rank = folder, rank
    handed.watch()


def read_draft(folder: Path, rank: int, rid: str, tokens: int, timeout_s: float = 30.0) -> Drafted:
    """What ``rank`` has handed over when all parts of the KV cache are there."""
    path, deadline_s = drafted_path(folder, rank, rid), time.monotonic() + timeout_s
    while True:
        drafted = torch.load(path, weights_only=False) if path.exists() else None
        if isinstance(drafted, Drafted) and drafted.kv.keys.shape[1] == tokens:
            return drafted
        assert time.monotonic() < deadline_s, f"rank {rank} has not handed over the draft of {rid}"
        time.sleep(0.01)


@pytest.mark.stress
@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3"])
def test_two_ranks_that_are_preempted_all_the_time_hand_over_what_drafts_begin_with(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_MAX_BATCH_TOKENS", "1")  # a task for each request
    draft = Draft(algorithm, OWN_HEADS)
    comparison = DraftComparison(draft)
    chaos = Chaos(seed=1, switch_probability=0.9)
    two = Ranks(draft.model_path, 2, tmp_path, chaos, prepare=partial(write_drafts, tmp_path))
    two.settings = {**two.settings, **options(draft, str(draft.write(tmp_path)))}
    with two as ranks:
        ranks.submit("first", SHARED + prompt(5, 20))  # leaves the shared prefix in the radix cache
        ranks.finish(["first"])
        for rid, tokens in PROMPTS.items():
            ranks.submit(rid, tokens, ttft_slo_s=100.0)
        ranks.finish(list(PROMPTS))
        ranks.compare(comparison, PROMPTS)
        for rid, tokens in PROMPTS.items():
            drafts = [read_draft(tmp_path, rank, rid, len(tokens)) for rank in range(2)]
            kv = Kv.of_heads([drafted.kv for drafted in drafts])
            for rank, drafted in enumerate(drafts):
                comparison.drafted(f"{rid} of rank {rank}", tokens, replace(drafted, kv=kv))
        comparison.assert_same()
        print(comparison)
        assert comparison.counts["KV caches"] == len(PROMPTS), "each rank has a KV head of its own"
        assert comparison.counts["drafts"] == 2 * len(PROMPTS)
        assert ranks.preemptions() >= 50
