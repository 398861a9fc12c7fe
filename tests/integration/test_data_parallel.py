"""Two scheduler processes with data-parallel attention: joint prefills that are suspended together, requests apart."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.events import Arrival, read_events
from tests.data_parallel_ranks import DataParallelRanks, lack_kv_cache_now_and_then, note_passes, note_rests
from tests.integration.conftest import PROMPTS
from tests.prompts import prompt
from tests.ranks import Chaos
from tests.reference import Comparison, Reference


@pytest.fixture(scope="session")
def reference(joint: Reference) -> Reference:
    return joint


def prepare(scheduler: Any, rank: int) -> None:
    note_rests(scheduler, rank)
    note_passes(scheduler, rank)
    lack_kv_cache_now_and_then(scheduler, rank)


@pytest.fixture(scope="module")
def ranks(joint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DataParallelRanks]:
    chaos = Chaos(seed=1, switch_probability=0.9)
    with DataParallelRanks(str(joint_path), 2, tmp_path_factory.mktemp("two"), chaos, prepare=prepare) as two:
        yield two


@pytest.mark.parametrize("times", [2, pytest.param(3, marks=pytest.mark.stress)])
def test_requests_that_come_at_random_to_both_ranks_get_the_answers_and_kv_of_transformers(
    ranks: DataParallelRanks, comparison: Comparison, times: int
) -> None:
    rng = random.Random(5)
    asked = {f"{rid}-{times}-{i}": tokens for i in range(times) for rid, tokens in PROMPTS.items()}
    for name, tokens in asked.items():
        ranks.submit(name, tokens, ttft_slo_s=100.0, rank=rng.randrange(2))
        time.sleep(rng.random() * 0.1)
    ranks.finish(list(asked))
    ranks.compare(comparison, asked)
    assert comparison.counts["KV caches"] == len(asked)
    suspensions = ranks.preemptions()
    first, second = ranks.notes("passes", 0), ranks.notes("passes", 1)
    same = ("task", "all", "checkpoints", "points")
    assert [[one[key] for key in same] for one in first] == [[one[key] for key in same] for one in second]
    idle = sum(not one["own"] for one in first + second)
    both = sum(bool(a["own"]) and bool(b["own"]) for a, b in zip(first, second, strict=True))
    print(f"\n{len(first)} joint passes with {suspensions} suspensions, {both} of requests of both ranks")
    print(f"{idle} times, a rank was idle in one")
    arrivals = {event.rid: event for event in read_events(ranks.event_log) if isinstance(event, Arrival)}
    rooms = [arrivals[name].bootstrap_room for name in asked]
    assert None not in rooms, "a request of the other rank has arrived without its bootstrap room"
    assert len(set(rooms)) == len(asked)
    assert suspensions >= 8 * times  # as many as arrivals leave tasks to suspend
    assert idle
    assert both


@pytest.mark.parametrize("times", [1, pytest.param(4, marks=pytest.mark.stress)])
def test_clients_that_leave_are_dropped_by_their_rank_and_nothing_stays_behind(
    ranks: DataParallelRanks, comparison: Comparison, times: int
) -> None:
    rng = random.Random(7)
    kept: dict[str, list[int]] = {}
    for i in range(times):
        for rid, tokens in PROMPTS.items():
            name = f"a{times}-{i}-{rid}"
            ranks.submit(name, tokens, rank=rng.randrange(2))
            time.sleep(rng.random() * 0.05)
            if rng.random() < 0.3:
                ranks.abort(name)
            else:
                kept[name] = tokens
    ranks.finish(list(kept))
    ranks.compare(comparison, kept)
    assert comparison.counts["answers"] == len(kept) < times * len(PROMPTS)
    ranks.assert_nothing_is_held(30.0)


def test_a_request_of_either_rank_ends_the_sleep_of_both(ranks: DataParallelRanks, comparison: Comparison) -> None:
    took_s = []
    asked = {f"s{i:02}": prompt(300 + i, 20) for i in range(8)}
    for i, (name, tokens) in enumerate(asked.items()):
        time.sleep(0.3)
        started_s = time.monotonic()
        ranks.submit(name, tokens, rank=i % 2)
        ranks.finish([name])
        took_s.append(time.monotonic() - started_s)
    ranks.compare(comparison, asked)
    print(f"\nanswered within {max(took_s):.3f} s, {sorted(took_s)[len(took_s) // 2]:.3f} s at the median")
    assert sorted(took_s)[len(took_s) // 2] < 0.5, "a rank slept through an arrival"


def test_each_rank_compiles_the_grammars_of_its_requests(ranks: DataParallelRanks, comparison: Comparison) -> None:
    patterns = {f"g{i}": f"[a-z]{{1,{4 + i % 3}}}" for i in range(6)}
    prompts: dict[str, list[int]] = {}
    for i, (name, pattern) in enumerate(patterns.items()):
        prompts |= {name: prompt(70 + i, 200), f"beside-{name}": prompt(80 + i, 500)}
        ranks.submit(name, prompts[name], rank=i % 2, pattern=pattern)
        ranks.submit(f"beside-{name}", prompts[f"beside-{name}"], rank=(i + 1) % 2)
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts, patterns)


def test_a_pause_lets_started_prefills_of_both_ranks_finish(ranks: DataParallelRanks, comparison: Comparison) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    prompts = {f"p{i}": prompt(50 + i, 1500) for i in range(4)}
    for i, (name, tokens) in enumerate(prompts.items()):
        ranks.submit(name, tokens, rank=i % 2)
    time.sleep(0.1)
    ranks.send(PauseGenerationReqInput(mode="in_place"))
    time.sleep(1.0)
    prompts["late"] = prompt(60, 100)
    ranks.submit("late", prompts["late"], rank=1)
    ranks.take(1.0)
    assert "late" not in ranks.tokens
    ranks.send(ContinueGenerationReqInput())
    ranks.finish(list(prompts))
    ranks.compare(comparison, prompts)


def test_the_end_of_a_rank_ends_the_other_with_its_name(ranks: DataParallelRanks) -> None:
    first, second = ranks.processes
    for i in range(8):
        ranks.submit(f"k{i}", prompt(i, 3000), rank=i % 2)
    second.kill()
    first.join(30.0)
    assert not first.is_alive()
    assert f"tensor-parallel rank 1 (process {second.pid}) has ended" in Path(ranks.log).read_text()
