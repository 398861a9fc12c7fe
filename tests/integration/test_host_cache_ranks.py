"""Ranks whose prefixes come back from host memory, at each when chance lets it, under suspensions at random places.

Tensor-parallel ranks have the same prefixes and load the same; with data-parallel attention each has its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.data_parallel_ranks import DataParallelRanks, note_rests
from tests.host_cache import OPTIONS, WAVES, Noted, WrittenLoads
from tests.integration.conftest import OWN_HEADS
from tests.late_transfers import make_late
from tests.ranks import Chaos, Ranks
from tests.reference import TOKENS, Comparison, Reference
from tests.unified_asks import Ask
from tests.unified_ranks import UnifiedRanks

ALL = {rid: tokens for wave in WAVES for rid, tokens in wave.items()}


def late(rank: int) -> None:
    """Let the copies of this process's ``rank`` be late, each rank's by chances of its own."""
    make_late(seed=rank)


class LateRanks(Ranks):
    """Ranks of a prefill server whose copies between device and host memory are late."""

    settings: Mapping[str, Any] = {**Ranks.settings, **OPTIONS}

    @staticmethod
    def run_rank(*work: Any) -> None:
        late(work[2])
        Ranks.run_rank(*work)


class LateUnifiedRanks(UnifiedRanks):
    """Ranks of a server that decodes, too."""

    settings: Mapping[str, Any] = {**UnifiedRanks.settings, **OPTIONS}

    @staticmethod
    def run_rank(*work: Any) -> None:
        late(work[2])
        UnifiedRanks.run_rank(*work)


class LateJointRanks(DataParallelRanks):
    """Ranks with requests of their own, each of which has room for the prompts of one or two prefixes."""

    settings: Mapping[str, Any] = {**DataParallelRanks.settings, **OPTIONS, "max_total_tokens": 2500}

    @staticmethod
    def run_rank(*work: Any) -> None:
        late(work[2])
        DataParallelRanks.run_rank(*work)


def note_loads_and_rests(scheduler: Any, rank: int) -> None:
    WrittenLoads(scheduler, rank)
    note_rests(scheduler, rank)


@pytest.fixture
def each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task for each request."""
    monkeypatch.setenv("FLOWPREFILL_MAX_BATCH_TOKENS", "1")


@pytest.mark.usefixtures("each_alone")
def test_two_ranks_load_the_same_prefixes_and_suspended_prefills_wait_for_their_own(
    own_heads: Reference, tmp_path: Path
) -> None:
    comparison, chaos = Comparison(own_heads), Chaos(seed=1, switch_probability=0.9)
    model_path = str(embedded_model_path(OWN_HEADS))
    with LateRanks(model_path, 2, tmp_path, chaos, prepare=WrittenLoads) as ranks:
        for wave in WAVES:
            for rid, tokens in wave.items():
                ranks.submit(rid, tokens, ttft_slo_s=100.0)
            ranks.finish(list(wave))
        ranks.compare(comparison, ALL)
        suspensions = ranks.preemptions()
        first, second = (Noted.at(ranks, rank) for rank in range(2))
    print(f"{comparison}; {first}, {second}, {suspensions} suspensions")
    assert comparison.counts["answers"] == len(ALL)
    assert comparison.counts["KV caches"] == len(ALL), "each rank has a KV head of its own"
    assert first.tokens == second.tokens
    assert len(first.tokens) >= len(WAVES[0])
    assert min(first.beside_others, second.beside_others) > 0, "copies were not late"
    assert suspensions >= len(ALL)


@pytest.mark.stress
@pytest.mark.usefixtures("each_alone")
def test_two_ranks_load_the_same_prefixes_between_decode_steps(own_heads: Reference, tmp_path: Path) -> None:
    comparison, chaos = Comparison(own_heads), Chaos(seed=2, switch_probability=0.7)
    asked = {rid: Ask(tuple(tokens), TOKENS, (("ignore_eos", True),)) for rid, tokens in ALL.items()}
    model_path = str(embedded_model_path(OWN_HEADS))
    with LateUnifiedRanks(model_path, 2, tmp_path, chaos, prepare=WrittenLoads) as ranks:
        for wave in WAVES:
            for rid in wave:
                ranks.ask(rid, asked[rid])
            ranks.finish(list(wave))
        ranks.compare_answers(comparison, asked)
        suspensions = ranks.preemptions()
        first, second = (Noted.at(ranks, rank) for rank in range(2))
    print(f"{comparison}; {first}, {second}, {suspensions} suspensions")
    assert comparison.counts["tokens"] == TOKENS * len(asked)
    assert first.tokens == second.tokens
    assert len(first.tokens) >= len(WAVES[0])
    assert min(first.beside_others, second.beside_others) > 0, "copies were not late"
    assert suspensions >= 20


@pytest.mark.stress
def test_ranks_with_requests_of_their_own_load_their_own_prefixes(
    joint: Reference, joint_path: Path, tmp_path: Path
) -> None:
    comparison, chaos = Comparison(joint), Chaos(seed=3, switch_probability=0.9)
    with LateJointRanks(str(joint_path), 2, tmp_path, chaos, prepare=note_loads_and_rests) as ranks:
        for wave in WAVES:
            for number, (rid, tokens) in enumerate(wave.items()):
                ranks.submit(rid, tokens, ttft_slo_s=100.0, rank=number % 2)
            ranks.finish(list(wave))
        ranks.compare(comparison, ALL)
        suspensions = ranks.preemptions()
        noted = [Noted.at(ranks, rank) for rank in range(2)]
        ranks.assert_nothing_is_held(30.0)
    print(f"{comparison}; {noted}, {suspensions} suspensions")
    assert comparison.counts["answers"] == comparison.counts["KV caches"] == len(ALL)
    assert min(len(rank.tokens) for rank in noted) >= 4
    assert sum(rank.beside_others for rank in noted) > 0, "copies were not late"
    assert suspensions >= 12
