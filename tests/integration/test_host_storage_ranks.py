"""Two ranks whose prefixes come back from storage, at each when its own threads have read them, under suspensions at
random places.

Tensor-parallel ranks read the same; with data-parallel attention each reads for its own requests, also what another has
written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.host_cache import PREFIXES, WAVES
from tests.integration.conftest import OWN_HEADS
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks
from tests.reference import TOKENS, Comparison, Reference
from tests.stored import POLICIES
from tests.stored_ranks import (
    UNREAD,
    StoredJointRanks,
    StoredRanks,
    StoredUnifiedRanks,
    leave_in_storage,
    note_reads,
)
from tests.unified_asks import Ask

NEW: Final = [{f"n{wave}-{i}": prompt(300 + 2 * wave + i, 900) for i in range(2)} for wave in range(len(WAVES))]
"""What runs while prefixes are read."""
ASKED: Final = [{**new, **wave} for new, wave in zip(NEW, WAVES, strict=True)]
ALL: Final = {rid: tokens for wave in ASKED for rid, tokens in wave.items()}
LEAST_TOKENS: Final = {"timeout": 1000, "wait_complete": 10_000, "best_effort": 0}
"""From storage, of some 17,000 that are there: all that is read in time; who need not wait may begin before."""


@pytest.fixture(autouse=True)
def each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task for each request."""
    monkeypatch.setenv("FLOWPREFILL_MAX_BATCH_TOKENS", "1")


def reads(ranks: Ranks) -> tuple[list[dict[str, Any]], int]:
    """What ``note_reads`` has noted, the same at both ranks, and how many tokens came from storage."""
    first, second = (ranks.notes("reads", rank) for rank in range(2))
    assert first == second
    return first, sum(note["tokens"] for note in first)


@pytest.mark.parametrize(
    "policy",
    ["timeout", *(pytest.param(name, marks=pytest.mark.stress) for name in ("wait_complete", "best_effort"))],
)
def test_two_ranks_read_the_same_prefixes_while_suspended_prefills_go_on(
    policy: str, own_heads: Reference, tmp_path: Path
) -> None:
    comparison, chaos = Comparison(own_heads), Chaos(seed=4, switch_probability=0.9)
    stored = StoredRanks(str(embedded_model_path(OWN_HEADS)), 2, tmp_path, chaos, prepare=note_reads)
    stored.settings = {**stored.settings, "hicache_storage_prefetch_policy": policy}
    with stored as ranks:
        for wave in ASKED:
            for rid, tokens in wave.items():
                ranks.submit(rid, tokens, ttft_slo_s=100.0)
            ranks.finish(list(wave))
            leave_in_storage(ranks)
        ranks.compare(comparison, ALL)
        suspensions = ranks.preemptions()
        notes, tokens_read = reads(ranks)
    print(f"{comparison}; {tokens_read} tokens from storage, {suspensions} suspensions")
    assert comparison.counts["answers"] == len(ALL)
    assert comparison.counts["KV caches"] == len(ALL), "each rank has a KV head of its own"
    assert len(notes) == len(ALL)
    assert tokens_read >= LEAST_TOKENS[policy]
    assert suspensions >= 20
    if policy != "best_effort":
        assert any(note["waiting"] for note in notes), "nothing ran while prefixes were read"
    if policy == "timeout":
        late = [note for note in notes if note["rid"].startswith(UNREAD)]
        assert len(late) == len(WAVES[1])
        assert not any(note["tokens"] for note in late), "their time was over at one rank, and so at both"


@pytest.mark.stress
def test_two_ranks_read_the_same_prefixes_between_decode_steps(own_heads: Reference, tmp_path: Path) -> None:
    comparison, chaos = Comparison(own_heads), Chaos(seed=5, switch_probability=0.7)
    asked = {rid: Ask(tuple(tokens), TOKENS, (("ignore_eos", True),)) for rid, tokens in ALL.items()}
    model_path = str(embedded_model_path(OWN_HEADS))
    with StoredUnifiedRanks(model_path, 2, tmp_path, chaos, prepare=note_reads) as ranks:
        for wave in ASKED:
            for rid in wave:
                ranks.ask(rid, asked[rid])
            ranks.finish(list(wave))
            leave_in_storage(ranks)
        ranks.compare_answers(comparison, asked)
        suspensions = ranks.preemptions()
        notes, tokens_read = reads(ranks)
    print(f"{comparison}; {tokens_read} tokens from storage, {suspensions} suspensions")
    assert comparison.counts["tokens"] == TOKENS * len(asked)
    assert {note["rid"] for note in notes} == set(asked)
    assert tokens_read >= 8000
    assert suspensions >= 20
    assert any(note["waiting"] for note in notes), "nothing ran while prefixes were read"


@pytest.mark.stress
@pytest.mark.parametrize("policy", POLICIES)
def test_ranks_with_requests_of_their_own_read_what_others_have_stored(
    policy: str, joint: Reference, joint_path: Path, tmp_path: Path
) -> None:
    comparison, chaos = Comparison(joint), Chaos(seed=6, switch_probability=0.9)
    stored = StoredJointRanks(str(joint_path), 2, tmp_path, chaos, prepare=note_reads)
    stored.settings = {**stored.settings, "hicache_storage_prefetch_policy": policy}
    with stored as ranks:
        for number, wave in enumerate(ASKED):
            for place, (rid, tokens) in enumerate(wave.items()):
                # Who asks for a prefix has not computed it in the wave before.
                ranks.submit(rid, tokens, ttft_slo_s=100.0, rank=(number + place) % 2)
            ranks.finish(list(wave))
            leave_in_storage(ranks)
        ranks.compare(comparison, ALL)
        suspensions = ranks.preemptions()
        first, second = (ranks.notes("reads", rank) for rank in range(2))
    tokens_read = [sum(note["tokens"] for note in notes) for notes in (first, second)]
    print(f"{comparison}; {tokens_read} tokens from storage, {suspensions} suspensions")
    assert comparison.counts["answers"] == comparison.counts["KV caches"] == len(ALL)
    assert sorted(note["rid"] for note in (*first, *second)) == sorted(ALL), "each at one rank"
    assert suspensions >= 12
    if policy == "best_effort":
        return
    least_tokens = min(map(len, PREFIXES))
    second_wave = [[note["tokens"] for note in notes if note["rid"].startswith(UNREAD)] for notes in (first, second)]
    assert sum(map(len, second_wave)) == len(WAVES[1])
    assert all(tokens >= least_tokens for tokens in second_wave[0]), "which the other rank has written"
    waits = [sum(note["waiting"] for note in notes) for notes in (first, second)]
    print(f"{waits} reads beside which something ran")
    if policy == "timeout":
        assert not any(second_wave[1]), "the time of a rank is over for its own requests alone"
    else:
        assert all(tokens >= least_tokens for tokens in second_wave[1])
