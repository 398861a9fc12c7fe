"""Three times 3,400 preemptions of two tensor-parallel ranks, with aborts: `make stress`."""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests.mutants import wrong_kv_slot_after_a_resume
from tests.prompts import population
from tests.ranks import Chaos, Ranks
from tests.reference import Comparison, Reference

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

PREEMPTIONS = 3_400


@pytest.fixture(scope="module")
def reference(model_path: str) -> Reference:
    return Reference(model_path)


@pytest.fixture(scope="module")
def model_path() -> str:
    return str(embedded_model_path(EmbeddedModel(heads=2, layers=4, context_tokens=4608)))


def exchange_two_slots(scheduler: Any, rank: int) -> None:
    """At rank 1, two tokens of each task that is resumed have their KV slots exchanged, once."""
    engine: Any = SimpleNamespace(scheduler=scheduler)
    if rank == 1:
        wrong_kv_slot_after_a_resume(engine, lambda: None)


def test_a_defect_of_one_rank_is_caught(tmp_path: Path, model_path: str, reference: Reference) -> None:
    comparison = Comparison(reference)
    prompts = {f"d{i:02}": tokens for i, tokens in enumerate(population(12, longest_tokens=1500))}
    with Ranks(model_path, 2, tmp_path, Chaos(1, 0.9), prepare=exchange_two_slots) as ranks:
        for rid, tokens in prompts.items():
            ranks.submit(rid, tokens, ttft_slo_s=100.0)
        ranks.finish(list(prompts))
        with pytest.raises(AssertionError, match="not what transformers answers"):
            ranks.compare(comparison, prompts)
    assert any("of rank 1" in text for text in comparison.differences["KV"]), comparison.differences


@pytest.mark.parametrize(("seed", "switch_probability"), [(1, 0.9), (2, 0.9), (3, 0.6)])
def test_ten_thousand_preemptions_of_two_ranks_end_and_change_no_answer_and_no_kv(
    seed: int, switch_probability: float, tmp_path: Path, model_path: str, reference: Reference
) -> None:
    prompts = population(400)
    comparison = Comparison(reference)
    started_s = time.monotonic()
    with Ranks(model_path, 2, tmp_path, Chaos(seed, switch_probability)) as ranks:
        for round_number in itertools.count():
            rng = random.Random(1000 * seed + round_number)
            asked = {f"n{round_number:04}-{i:02}": rng.choice(prompts) for i in range(rng.randrange(4, 16))}
            dropped = set()
            for rid, tokens in asked.items():
                ranks.submit(rid, tokens)
                if rng.random() < 0.15:
                    time.sleep(rng.random() * 0.05)
                    ranks.abort(rid)
                    dropped.add(rid)
            kept = {rid: tokens for rid, tokens in asked.items() if rid not in dropped}
            ranks.finish(list(kept))
            answered = {rid: asked[rid] for rid in dropped if ranks.tokens.get(rid) is not None}  # before they left
            comparison.counts["aborts"] += len(dropped) - len(answered)
            ranks.compare(comparison, kept | answered)
            if round_number % 10 == 9:
                preemptions = ranks.preemptions()
                took_s = time.monotonic() - started_s
                print(
                    f"round {round_number + 1}, {took_s:.0f} s: {preemptions:,} preemptions; {comparison}", flush=True
                )
                if preemptions >= PREEMPTIONS:
                    break
    assert comparison.counts["KV caches"] == 2 * comparison.counts["answers"] >= 400
    assert comparison.counts["aborts"] >= 20
