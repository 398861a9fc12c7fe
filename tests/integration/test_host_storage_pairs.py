"""Prefixes that come back from storage on prefill servers with a draft model, and on servers with adapters.

A draft's KV cache is stored beside that of the model, or as further layers of it; a prefix is stored for each adapter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import pytest
import torch

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
from tests.drafts import Draft, DraftedPrefill, DraftedRounds
from tests.host_cache import POOL_TOKENS, PROMPTS
from tests.integration.test_host_cache_pairs import COPIED, FEW_PROMPTS, asks
from tests.prompts import prompt
from tests.remote import Remote
from tests.stored import POLICIES, Asleep, AsleepPrefill, keep_in, options, play
from tests.unified_rounds import Rounds as UnifiedRounds

STORED_TOKENS = 600
FAILURES = 0.02
"""The share of the calls of storage that fails."""


class StoredDrafted(AsleepPrefill, DraftedPrefill):
    """A server whose draft model's KV cache is stored, too."""

    def __init__(self, draft: Draft, path: str, folder: str) -> None:
        keep_in(folder, delay_s=0.01)
        self.watch()
        super().__init__(draft, path, **options(POOL_TOKENS))
        assert self.scheduler.draft_worker.hicache_draft_plan.mode.value == COPIED[draft.algorithm]


class StoredAdapted(AsleepPrefill, AdaptedPrefill):
    """A server with adapters."""

    def __init__(self, paths: Sequence[str], folder: str) -> None:
        keep_in(folder, delay_s=0.01)
        self.watch()
        super().__init__(paths, **options(POOL_TOKENS))


class StoredAdaptedUnified(Asleep, AdaptedUnified):
    """One that decodes, too."""

    def __init__(self, paths: Sequence[str], folder: str) -> None:
        keep_in(folder, delay_s=0.01)
        self.watch()
        super().__init__(paths, **options(POOL_TOKENS))
        process = self.scheduler.process_batch_result

        def counted(batch: Any, result: Any) -> None:
            if batch.forward_mode.is_extend():
                self.watched["tokens from storage"] += sum(int(req.cached_tokens_storage) for req in batch.reqs)
            process(batch, result)

        self.scheduler.process_batch_result = counted


class Played(NamedTuple):
    """What became of rounds."""

    text: str
    counts: Counter[str]
    """What was compared, what happened, and tokens from storage."""


def assert_read(counts: Counter[str], rounds: int) -> None:
    """In ``rounds`` there were suspensions, aborts, and reads under each policy beside tasks that went on."""
    assert counts["suspensions"] >= 3 * rounds
    assert counts["aborts"] >= rounds // 6
    assert counts["answers from storage"] >= rounds // 2
    assert counts["tokens from storage, wait_complete"] >= 50 * rounds
    assert all(counts[f"tokens from storage, {name}"] for name in POLICIES)
    assert counts["turns of those beside tasks"] >= rounds


# ---- draft models ----------------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["EAGLE3", *(pytest.param(name, marks=pytest.mark.stress) for name in ("NEXTN", "EAGLE"))]
)
def drafted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    draft, folder = Draft(request.param), tmp_path_factory.mktemp("drafts")
    (folder / "storage").mkdir()
    with closing(Remote(StoredDrafted, draft, str(draft.write(folder)), str(folder / "storage"))) as remote:
        yield remote


def draft_rows(engine: StoredDrafted) -> torch.Tensor:
    """The draft's KV cache in host memory, (2, layers, tokens, heads, dim)."""
    from sglang.srt.mem_cache.hicache_storage import PoolName

    group = engine.tree.cache_controller.mem_pool_host
    assert group.layout == "layer_first"
    if PoolName.DRAFT in group.entry_map:
        rows: torch.Tensor = group.entry_map[PoolName.DRAFT].host_pool.kv_buffer
        return rows
    anchor = group.anchor_entry.host_pool
    packed: torch.Tensor = anchor.kv_buffer[:, anchor.target_layer_num :]
    return packed


def ask_again(engine: StoredDrafted, seed: int, reads_drafts: bool) -> tuple[Counter[str], dict[str, list[str]], int]:
    """What is compared of a request whose prefix is in storage alone, what differs, and its tokens from there; where
    ``reads_drafts`` is false, what has been read of the draft is lost.
    """
    first = prompt(seed, STORED_TOKENS)
    again = prompt(seed + 1, 700, first)
    engine.store(first)
    controller, comparison = engine.tree.cache_controller, engine.comparison
    comparison.counts.clear()
    rounds = DraftedRounds(engine, comparison, [])
    read = controller._page_transfer_kv_batch

    def read_and_lose(operation: Any, hashes: Any, host_indices: torch.Tensor, *arguments: Any) -> int:
        pages = read(operation, hashes, host_indices, *arguments)
        if not reads_drafts:
            draft_rows(engine)[:, :, host_indices] = 0
        return int(pages)

    controller._page_transfer_kv_batch = read_and_lose
    engine.submit("again", again, logprobs=True)
    engine.run()
    del controller._page_transfer_kv_batch
    rounds.compare("again", again)
    rounds.close()
    counts, differences = Counter(comparison.counts), dict(comparison.differences)
    comparison.counts.clear()
    comparison.differences.clear()
    tokens = engine.from_storage("again")
    engine.assert_clean()
    return counts, differences, tokens


def test_a_prefix_comes_back_from_storage_with_its_drafts(drafted: Remote) -> None:
    counts, differences, tokens = drafted.call(ask_again, 1000, True)
    assert not differences
    assert counts["answers"] == counts["KV caches"] == counts["drafts"] == 1
    assert counts["draft KV tensors"] == 2
    # A draft's KV cache of a token is that of the next one, too: the last one of a prompt belongs to no prefix.
    assert tokens == STORED_TOKENS - 1


def test_a_prefix_without_its_drafts_is_noticed(drafted: Remote) -> None:
    counts, differences, tokens = drafted.call(ask_again, 1010, False)
    assert counts["drafts"] == 1
    assert tokens == STORED_TOKENS - 1
    assert "draft KV" in differences
    assert "KV" not in differences, "the model's own is as it was"


def play_drafts(engine: StoredDrafted, rounds: int) -> Played:
    comparison = engine.comparison
    chance = DraftedRounds(engine, comparison, PROMPTS)
    seen = play(engine, chance, range(2000, 2000 + rounds), FAILURES, comparison.assert_same)
    counts = seen + comparison.counts + engine.seen
    text = f"{chance}; {dict(seen)}"
    comparison.counts.clear()
    engine.seen.clear()
    return Played(text, counts)


@pytest.mark.stress
def test_suspended_prefills_hand_over_what_drafts_begin_with_behind_prefixes_of_storage(drafted: Remote) -> None:
    rounds = 24
    text, counts = drafted.call(play_drafts, rounds)
    print(text)
    assert counts["KV caches"] == counts["drafts"] >= 2 * rounds
    assert counts["draft KV tensors"] == 2 * counts["drafts"]
    assert_read(counts, rounds)
    assert counts["runs beside prefills that are suspended at their drafts"] >= rounds // 4
    assert not counts["flags of the other model"]


# ---- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def adapted(paths: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Remote]:
    with closing(Remote(StoredAdapted, paths, str(tmp_path_factory.mktemp("storage")))) as remote:
        yield remote


def adapted_rounds(engine: StoredAdapted, prompts: Sequence[Sequence[int]]) -> AdaptedRounds:
    chance = AdaptedRounds(engine, None, prompts)  # type: ignore[arg-type] - each request has its own comparison
    chance.comparison = chance.comparisons[None]
    return chance


def ask_with_each(engine: StoredAdapted, stored: str) -> tuple[dict[str | None, int], Counter[str]]:
    """Tokens from storage of a prompt with each adapter, by adapter, where its prefix was ``stored`` with one of them;
    and what was compared.
    """
    first = prompt(1000, STORED_TOKENS)
    again = prompt(1001, 700, first)
    engine.asked = {"stores0": stored}
    engine.store(first)
    chance = adapted_rounds(engine, [])
    engine.asked = {f"of {name}": name for name in NAMES}
    for rid in engine.asked:
        engine.submit(rid, again, logprobs=True)
    engine.run()
    for rid in engine.asked:
        chance.compare(rid, again)
    chance.close()
    assert_all_same(chance.comparisons)
    tokens = {name: engine.from_storage(rid) for rid, name in engine.asked.items()}
    engine.assert_clean()
    return tokens, total(chance.comparisons)


def test_a_prefix_in_storage_is_of_its_adapter_alone(adapted: Remote) -> None:
    tokens, counts = adapted.call(ask_with_each, "b")
    assert counts["answers"] == counts["KV caches"] == len(NAMES)
    assert tokens == dict.fromkeys(NAMES, 0) | {"b": STORED_TOKENS}


def play_adapters(engine: StoredAdapted, rounds: int) -> Played:
    chance = adapted_rounds(engine, FEW_PROMPTS)
    engine.slots.counts.clear()
    numbers = range(3000, 3000 + rounds)
    seen = play(engine, chance, numbers, FAILURES, lambda: assert_all_same(chance.comparisons))
    counts = seen + total(chance.comparisons) + engine.slots.counts
    return Played(", ".join(f"{count:,} {what}" for what, count in counts.items()), counts)


@pytest.mark.stress
def test_suspended_prefills_keep_their_adapters_behind_prefixes_of_storage(adapted: Remote) -> None:
    rounds = 36
    text, counts = adapted.call(play_adapters, rounds)
    print(text)
    assert counts["answers"] == counts["KV caches"] >= 2 * rounds
    assert_read(counts, rounds)
    assert counts["adapters loaded beside suspended prefills"] >= rounds // 8
    assert all(counts[f"of adapter {name}"] for name in NAMES)


def watched_and_slots(engine: StoredAdaptedUnified) -> tuple[Mapping[str, int], Counter[str]]:
    engine.assert_clean()
    return engine.watched, engine.slots.counts


@pytest.mark.stress
def test_streams_keep_their_adapters_behind_prefixes_of_storage(
    paths: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    rounds, folder = 40, str(tmp_path_factory.mktemp("storage"))
    with closing(Remote(StoredAdaptedUnified, paths, folder)) as unified:
        lora_ids = unified.call(ids_of)
        comparison = MergedComparison(lora_ids)
        chance = UnifiedRounds(unified, comparison, asks(lora_ids), flushes=True)  # type: ignore[arg-type]
        chance.run(rounds)
        watched, slots = unified.call(watched_and_slots)
    print(f"{chance}; {dict(watched)}; {', '.join(f'{count:,} {what}' for what, count in slots.items())}")
    assert comparison.counts["answers"] >= 3 * rounds
    assert watched["tokens from storage"] >= 100 * rounds
    assert watched["turns with requests that wait for storage"] >= rounds
    assert chance.seen["suspensions"] >= 2 * rounds
    assert chance.seen["steps inside prefills"] >= 3 * rounds
    assert slots["adapters loaded beside suspended prefills"] >= rounds // 5
