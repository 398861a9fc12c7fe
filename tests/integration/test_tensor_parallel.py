"""Two tensor-parallel scheduler processes: preemption changes nothing but the order, and none is left waiting."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.integration.conftest import OWN_HEADS, PROMPTS, SHARED, TWO_HEADS
from tests.prompts import prompt
from tests.rank_notes import ALONE, OFFER_TASKS, note_matches, offer_models
from tests.ranks import Chaos, Ranks
from tests.reference import Comparison, Reference


@pytest.fixture(scope="module")
def model_path() -> str:
    return str(embedded_model_path(OWN_HEADS))


@pytest.fixture(scope="session")
def reference(own_heads: Reference) -> Reference:
    return own_heads


def prepare(scheduler: Any, rank: int) -> None:
    note_matches(scheduler, rank)
    offer_models(scheduler, rank)


@pytest.fixture(scope="module")
def ranks(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    chaos = Chaos(seed=1, switch_probability=0.9)
    with Ranks(model_path, 2, tmp_path_factory.mktemp("two"), chaos, prepare=prepare) as two:
        yield two


def test_two_ranks_that_are_preempted_all_the_time_give_the_answers_and_kv_of_transformers(
    ranks: Ranks, comparison: Comparison
) -> None:
    ranks.submit("first", SHARED + prompt(5, 20))  # leaves the shared prefix in the radix cache
    ranks.finish(["first"])
    again = {f"{rid}-{i}": tokens for i in range(2) for rid, tokens in PROMPTS.items()}
    for name, tokens in again.items():
        ranks.submit(name, tokens, ttft_slo_s=100.0)
    ranks.finish(list(again))
    ranks.compare(comparison, again)
    assert comparison.counts["KV caches"] == len(again), "each rank has a KV head of its own"
    assert ranks.preemptions() >= 100


@pytest.mark.parametrize(
    ("pass_probabilities", "nodes"),
    [
        pytest.param((0.9, 0.02), 1, id="follower late, one node", marks=pytest.mark.stress),
        pytest.param((0.02, 0.9), 2, id="rank 0 late, two nodes"),
    ],
)
def test_results_that_come_at_different_times_are_processed_at_the_same(
    two_heads: Reference, tmp_path: Path, pass_probabilities: tuple[float, float], nodes: int
) -> None:
    """Each rank's device is late by itself: rank 0 says when a finished task is processed, the next one running."""
    model_path, chaos = str(embedded_model_path(TWO_HEADS)), Chaos(seed=3, switch_probability=0.9)
    comparison = Comparison(two_heads)
    with Ranks(model_path, 2, tmp_path, chaos, nodes=nodes, pass_probabilities=pass_probabilities) as ranks:
        for rid, tokens in PROMPTS.items():
            ranks.submit(rid, tokens, ttft_slo_s=100.0)
        ranks.finish(list(PROMPTS))
        ranks.compare(comparison, PROMPTS)
        assert comparison.counts["KV caches"] == 2 * len(PROMPTS), "each rank has a copy of the KV head"
        first, second = ranks.notes("finishes", 0), ranks.notes("finishes", 1)
    same = ("rids", "live")
    assert [[note[key] for key in same] for note in first] == [[note[key] for key in same] for note in second]
    assert all(note["arrived"] for note in first + second), "a result was processed before it had arrived"
    behind, waits = sum(note["behind"] > 0 for note in first), sum(note["waited"] for note in second)
    print(f"\n{len(first)} tasks: {behind} processed with others queued behind them, {waits} awaited at rank 1")
    if pass_probabilities[0] < pass_probabilities[1]:
        assert behind >= len(first) / 2, "the device was left without work at the end of a task"
    else:
        assert waits >= len(first) / 4, "rank 1 had every result as early as rank 0"


def test_both_ranks_match_the_prompt_of_a_winner_again_when_more_of_it_has_been_cached(
    ranks: Ranks, comparison: Comparison
) -> None:
    shared = prompt(97, 192)
    prompts = {f"{ALONE}-{i}": shared + prompt(200 + i, 300) for i in range(10)}
    for rid, tokens in prompts.items():
        ranks.submit(rid, tokens)
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts)
    first, second = ranks.notes("matches", 0), ranks.notes("matches", 1)
    assert first == second
    about_to_start = [note["match"] for note in first if note.get("about to start")]
    print(f"\n{sum('match' in note for note in first)} matches, {len(about_to_start)} of them of winners")
    assert about_to_start


def test_both_ranks_adopt_a_model_at_the_same_operator_of_the_same_task(ranks: Ranks, comparison: Comparison) -> None:
    before = len(ranks.notes("adoptions", 0))
    prompts = {f"adopt-{rid}": tokens for rid, tokens in PROMPTS.items()}
    for rid, tokens in prompts.items():
        ranks.submit(rid, tokens, ttft_slo_s=100.0)
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts)
    first, second = ranks.notes("adoptions", 0), ranks.notes("adoptions", 1)
    assert first == second
    # A round may see several tasks started, and offers come one by one.
    assert len(first) > before
    assert all(note["started"] >= OFFER_TASKS for note in first)
    assert len({note["predicts_s"] for note in first}) == len(first), "models that differ were adopted"
    print(f"\n{len(first)} adoptions")
    assert all(any(passed for _, passed in note["live"]) for note in first), "each beside a suspended prefill"


@pytest.mark.parametrize("times", [2, pytest.param(5, marks=pytest.mark.stress)])
def test_clients_that_leave_are_dropped_by_both_ranks(ranks: Ranks, comparison: Comparison, times: int) -> None:
    rng = random.Random(7)
    kept: dict[str, list[int]] = {}
    for i in range(times):
        for rid, tokens in PROMPTS.items():
            name = f"a{times}-{i}-{rid}"
            ranks.submit(name, tokens)
            time.sleep(rng.random() * 0.02)
            if rng.random() < 0.3:
                ranks.abort(name)
            else:
                kept[name] = tokens
    ranks.finish(list(kept))
    ranks.compare(comparison, kept)
    assert comparison.counts["answers"] == len(kept)


def test_both_ranks_compile_the_grammars_of_requests(ranks: Ranks, comparison: Comparison) -> None:
    patterns = {f"g{i}": f"[a-z]{{1,{4 + i % 3}}}" for i in range(6)}
    prompts: dict[str, list[int]] = {}
    for i, (name, pattern) in enumerate(patterns.items()):
        prompts |= {name: prompt(70 + i, 200), f"beside-{name}": prompt(80 + i, 500)}
        ranks.submit(name, prompts[name], pattern=pattern)
        ranks.submit(f"beside-{name}", prompts[f"beside-{name}"])
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts, patterns)


def test_a_pause_lets_started_prefills_finish_on_both_ranks(ranks: Ranks, comparison: Comparison) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    prompts = {f"p{i}": prompt(50 + i, 1500) for i in range(4)}
    for name, tokens in prompts.items():
        ranks.submit(name, tokens)
    time.sleep(0.1)
    ranks.send(PauseGenerationReqInput(mode="in_place"))
    time.sleep(1.0)
    prompts["late"] = prompt(60, 100)
    ranks.submit("late", prompts["late"])
    ranks.take(1.0)
    assert "late" not in ranks.tokens
    ranks.send(ContinueGenerationReqInput())
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts)


def test_the_end_of_a_rank_ends_the_other_with_its_name(ranks: Ranks) -> None:
    first, second = ranks.processes
    for i in range(8):
        ranks.submit(f"k{i}", prompt(i, 3000))
    second.kill()
    first.join(30.0)
    assert not first.is_alive()
    assert f"tensor-parallel rank 1 (process {second.pid}) has ended" in Path(ranks.log).read_text()
