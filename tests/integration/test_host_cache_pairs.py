"""Prefixes that come back from host memory on prefill servers with a draft model, and on servers with adapters.

Prefills are suspended at random places, and every copy is made as late as may be.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.adapters import (
    NAMES,
    AdaptedPrefill,
    AdaptedRounds,
    AdaptedUnified,
    MergedComparison,
    assert_all_same,
    ids_of,
    total,
    write_adapters,
)
from tests.chaos import Rounds
from tests.drafts import Draft, DraftedPrefill, DraftedRounds
from tests.engine import PrefillEngine
from tests.host_cache import OPTIONS, PROMPTS, Loads
from tests.late_transfers import make_late
from tests.remote import Remote
from tests.unified_asks import Ask
from tests.unified_rounds import Rounds as UnifiedRounds

SUSPENSIONS = 18
"""For each round that is asked for: three for each of about six answers."""
COPIED = {"EAGLE": "sidecar", "EAGLE3": "sidecar", "NEXTN": "packed"}
"""How SGLang has host memory keep a draft's KV cache: beside that of the model, or as further layers of it."""
FEW_PROMPTS = PROMPTS[:8]
"""Behind two prefixes, each of which has a KV cache for every adapter."""


class LateDrafted(DraftedPrefill):
    """A server whose draft model's KV cache is in host memory, too."""

    def __init__(self, draft: Draft, path: str) -> None:
        self.transfers = make_late(seed=1)
        super().__init__(draft, path, **OPTIONS)
        assert self.scheduler.draft_worker.hicache_draft_plan.mode.value == COPIED[draft.algorithm]


class LateAdapted(AdaptedPrefill):
    """A server with adapters."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.transfers = make_late(seed=1)
        super().__init__(paths, **OPTIONS)


class LateAdaptedUnified(AdaptedUnified):
    """One that decodes, too."""

    def __init__(self, paths: Sequence[str]) -> None:
        make_late(seed=1)
        super().__init__(paths, **OPTIONS)
        self.loads = Loads(self.scheduler)


@dataclass
class Played:
    """What became of some rounds."""

    text: str
    counts: Counter[str]
    seen: Counter[str]
    loads: Loads
    copies: int
    """That were made later than they were asked for."""

    def assert_late(self, loads: int) -> None:
        """There were so many ``loads`` at least, and prefills beside some that were under way."""
        assert len(self.loads.tokens) >= loads
        assert self.copies > 0
        assert self.loads.beside_others > 0


def play(engine: PrefillEngine, chance: Rounds, rounds: int, assert_same: Callable[[], None]) -> Loads:
    """Rounds of prompts that do not all fit on the device: what one evicts, another loads back. There are more of them
    where that takes more for their SUSPENSIONS: a fast machine's operators run whole, and leave fewer places.
    """
    loads = Loads(engine.scheduler)
    for number in range(3 * rounds):
        chance.play(random.Random(number))
        assert_same()
        engine.scheduler.on_idle()
        if number + 1 >= rounds and chance.seen["suspensions"] >= SUSPENSIONS * rounds:
            break
    chance.close()
    engine.assert_clean()
    return loads


def play_drafts(engine: LateDrafted, rounds: int) -> Played:
    comparison = engine.comparison
    chance = DraftedRounds(engine, comparison, PROMPTS)
    loads = play(engine, chance, rounds, comparison.assert_same)
    seen = chance.seen + engine.seen
    return Played(f"{chance}; {loads}", comparison.counts, seen, loads, engine.transfers.copies)


@pytest.mark.parametrize(
    ("algorithm", "rounds"),
    [
        ("EAGLE3", 6),
        ("NEXTN", 6),
        pytest.param("EAGLE3", 60, marks=pytest.mark.stress),
        pytest.param("NEXTN", 60, marks=pytest.mark.stress),
        pytest.param("EAGLE", 60, marks=pytest.mark.stress),
    ],
)
def test_suspended_prefills_hand_over_what_drafts_begin_with_behind_prefixes_of_host_memory(
    algorithm: str, rounds: int, tmp_path: Path
) -> None:
    draft = Draft(algorithm)
    with closing(Remote(LateDrafted, draft, str(draft.write(tmp_path)))) as remote:
        played = remote.call(play_drafts, rounds)
    print(played.text)
    counts, seen = played.counts, played.seen
    assert counts["KV caches"] == counts["drafts"] >= 2 * rounds
    assert counts["draft KV tensors"] == 2 * counts["drafts"]
    played.assert_late(rounds // 2)
    assert seen["suspensions"] >= SUSPENSIONS * rounds
    assert seen["runs beside prefills that are suspended at their drafts"] >= rounds // 2
    assert not seen["flags of the other model"]


def play_adapters(engine: LateAdapted, rounds: int) -> Played:
    chance = AdaptedRounds(engine, None, FEW_PROMPTS)  # type: ignore[arg-type] - each request has its own comparison
    chance.comparison = chance.comparisons[None]
    loads = play(engine, chance, rounds, lambda: assert_all_same(chance.comparisons))
    counts, seen = total(chance.comparisons), chance.seen + engine.slots.counts
    compared = ", ".join(f"{count:,} {what}" for what, count in (*counts.items(), *seen.items()))
    return Played(f"{compared}; {loads}", counts, seen, loads, engine.transfers.copies)


@pytest.mark.stress
def test_suspended_prefills_keep_their_adapters_behind_prefixes_of_host_memory(tmp_path: Path) -> None:
    rounds = 40
    with closing(Remote(LateAdapted, write_adapters(tmp_path))) as remote:
        played = remote.call(play_adapters, rounds)
    print(played.text)
    counts, seen = played.counts, played.seen
    assert counts["answers"] == counts["KV caches"] >= 2 * rounds
    played.assert_late(rounds // 2)
    assert seen["suspensions"] >= SUSPENSIONS * rounds
    assert seen["adapters loaded beside suspended prefills"] >= rounds // 5
    assert all(seen[f"of adapter {name}"] for name in NAMES)


def asks(lora_ids: Mapping[str | None, str | None]) -> list[Ask]:
    """Each prompt with each adapter."""
    rng = random.Random(5)
    return [
        Ask(tuple(tokens), rng.randrange(1, 20), (("ignore_eos", True),), lora_id=lora_ids[name])
        for tokens in FEW_PROMPTS
        for name in NAMES
    ]


def loads_and_slots(engine: LateAdaptedUnified) -> tuple[Loads, Counter[str]]:
    engine.assert_clean()
    return engine.loads, engine.slots.counts


@pytest.mark.stress
def test_streams_keep_their_adapters_behind_prefixes_of_host_memory(tmp_path: Path) -> None:
    rounds = 40
    with closing(Remote(LateAdaptedUnified, write_adapters(tmp_path))) as unified:
        lora_ids = unified.call(ids_of)
        comparison = MergedComparison(lora_ids)
        chance = UnifiedRounds(unified, comparison, asks(lora_ids), flushes=False)  # type: ignore[arg-type]
        chance.run(rounds)
        loads, slots = unified.call(loads_and_slots)
    print(f"{chance}; {loads}; {', '.join(f'{count:,} {what}' for what, count in slots.items())}")
    assert comparison.counts["answers"] >= 3 * rounds
    assert len(loads.tokens) >= rounds // 2
    assert loads.beside_others > 0, "copies were not late"
    assert chance.seen["suspensions"] >= 2 * rounds
    assert chance.seen["steps inside prefills"] >= 3 * rounds
    assert slots["adapters loaded beside suspended prefills"] >= rounds // 5
