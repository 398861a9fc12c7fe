"""Two tensor-parallel ranks whose prefixes come back from storage, each from its own at its own pace: they agree."""

from __future__ import annotations

import json
import os
import random
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.integration.conftest import TWO_HEADS
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks, notes_at
from tests.reference import Comparison, Reference
from tests.stored import options

PREFIXES = [prompt(40 + i, 200 + 90 * i) for i in range(5)]
PROMPTS = [prompt(i, len(prefix) + 20 + 37 * (i % 7), prefix) for prefix in PREFIXES for i in range(100, 104)]
ROUNDS = 12

pytestmark = [pytest.mark.stress, pytest.mark.timeout(1800)]


class StoredRanks(Ranks):
    """Ranks of a prefill server with storage."""

    settings: Mapping[str, Any] = {
        **Ranks.settings,
        **{name: value for name, value in options(0).items() if name != "max_total_tokens"},
        "hicache_ratio": 1.2,
    }

    def notes(self, rank: int) -> list[list[Any]]:
        """What ``rank`` has started, and what it answered to flushes, in its order (``note_storage``)."""
        return [json.loads(line) for line in _notes_path(str(self.log), rank).read_text().splitlines()]

    def flush(self, timeout_s: float = 120.0) -> None:
        """Empty the caches on device and host when all that was computed is in storage."""
        from sglang.srt.managers.io_struct import FlushCacheReqInput

        before, deadline_s = len(self._flushes()), time.monotonic() + timeout_s
        while not any(self._flushes()[before:]):
            assert time.monotonic() < deadline_s, self.log.read_text()
            asked = len(self._flushes())
            self.send(FlushCacheReqInput())
            while len(self._flushes()) == asked and time.monotonic() < deadline_s:
                time.sleep(0.05)

    def _flushes(self) -> list[bool]:
        return [flushed for kind, flushed in self.notes(1) if kind == "flush"]


def note_storage(scheduler: Any, rank: int) -> None:
    """Write what starts with how much of storage, and which flushes are heard. What is computed is cached."""
    notes = notes_at(_notes_path(os.environ["FLOWPREFILL_EVENT_LOG"], rank))
    add, run_batch, flush_cache = scheduler._add_request_to_queue, scheduler.run_batch, scheduler.flush_cache

    def add_cached(req: Any, *arguments: Any, **named: Any) -> None:
        req.skip_radix_cache_insert = False
        add(req, *arguments, **named)

    def noted_run(batch: Any, *arguments: Any, **named: Any) -> Any:
        for req in batch.reqs:
            notes.write(json.dumps([req.rid, [req.cached_tokens, req.cached_tokens_storage]]) + "\n")
        return run_batch(batch, *arguments, **named)

    def noted_flush(*arguments: Any, **named: Any) -> Any:
        flushed = flush_cache(*arguments, **named)
        notes.write(json.dumps(["flush", bool(flushed)]) + "\n")
        return flushed

    scheduler._add_request_to_queue, scheduler.run_batch = add_cached, noted_run
    scheduler.flush_cache = noted_flush


def _notes_path(log: str, rank: int) -> Path:
    return Path(log).with_name(f"storage-{rank}.jsonl")


@pytest.fixture(scope="session")
def reference(two_heads: Reference) -> Reference:
    return two_heads


@pytest.mark.parametrize("policy_name", ["wait_complete", "timeout", "best_effort"])
def test_ranks_that_read_at_different_times_start_the_same_with_the_same_prefixes(
    policy_name: str, comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang's own checker sees that both ranks ask its cache the same in the same order."""
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "storage"))
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.05")
    monkeypatch.setenv("SGLANG_ENABLE_RANK_CONSENSUS_CHECKER", "1")
    extra = {"prefetch_threshold": 64, "prefetch_timeout_base": 0.05, "prefetch_timeout_per_ki_token": 0.0}
    StoredRanks.settings = {
        **StoredRanks.settings,
        "hicache_storage_prefetch_policy": policy_name,
        "hicache_storage_backend_extra_config": json.dumps(extra),
    }
    rng = random.Random(5)
    model_path = str(embedded_model_path(TWO_HEADS))
    with StoredRanks(model_path, 2, tmp_path, Chaos(1, 0.5), prepare=note_storage) as ranks:
        for number in range(ROUNDS):
            asked = {f"n{number:02}-{i:02}": rng.choice(PROMPTS) for i in range(8)}
            dropped = set()
            for rid, tokens in asked.items():
                ranks.submit(rid, tokens)
                if rng.random() < 0.15:
                    time.sleep(rng.random() * 0.05)
                    ranks.abort(rid)
                    dropped.add(rid)
            kept = {rid: tokens for rid, tokens in asked.items() if rid not in dropped}
            ranks.finish(list(kept))
            comparison.counts["aborts"] += len(dropped)
            ranks.compare(comparison, kept)
            ranks.flush()
        preemptions = ranks.preemptions()
        first, second = ranks.notes(0), ranks.notes(1)
    assert first == second
    stored = Counter(values[1] for kind, values in first if kind != "flush")
    tokens = sum(tokens * count for tokens, count in stored.items())
    print(f"\n{policy_name}: {preemptions} preemptions, {tokens} tokens from storage; {comparison}")
    assert comparison.counts["KV caches"] == 2 * comparison.counts["answers"] >= 2 * 6 * ROUNDS
    assert tokens >= 1000
