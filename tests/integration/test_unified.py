"""A server that prefills and decodes gives the answers of SGLang's own scheduler, whatever runs between what."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.prompts import prompt
from tests.unified_engine import (
    Ask,
    Play,
    Remote,
    Stock,
    StockComparison,
    StockEngine,
    UnifiedEngine,
    asks,
    play_and_flush,
)

ASKS = asks(60, seed=3)


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    remote = Remote(StockEngine, str(embedded_model_path()))
    yield Stock(remote)
    remote.close()


@pytest.fixture(scope="module")
def unified() -> Iterator[Remote]:
    remote = Remote(UnifiedEngine, str(embedded_model_path()))
    yield remote
    remote.close()


@pytest.fixture
def comparison(stock: Stock) -> Iterator[StockComparison]:
    comparison = StockComparison(stock)
    yield comparison
    print(f"\n{comparison}")


def serve(engine: UnifiedEngine, asked: Mapping[str, Ask]) -> Play:
    """Submit all of ``asked`` at once, and let the policy decide."""
    engine.forget()
    engine.seen.clear()
    for rid, ask in asked.items():
        engine.submit(rid, ask)
    engine.run()
    engine.assert_clean()
    return Play(dict(engine.answers), set(), Counter(engine.seen))


def test_the_policy_serves_requests_of_all_kinds(unified: Remote, comparison: StockComparison) -> None:
    asked = {f"p{i}": ask for i, ask in enumerate(ASKS[:24])}
    played = unified.call(serve, asked)
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    assert comparison.counts["answers"] == len(asked)


@pytest.mark.parametrize("seed", range(6))
def test_steps_and_suspensions_at_random_points_change_no_answer(
    unified: Remote, comparison: StockComparison, seed: int
) -> None:
    rng = random.Random(seed)
    asked = {f"c{i}": rng.choice(ASKS) for i in range(12)}
    played = unified.call(play_and_flush, asked, set(), seed, rng.choice([0.1, 0.4, 0.9]))
    comparison.compare(asked, played.answers)
    comparison.assert_same()
    print(dict(played.seen))
    assert played.seen["steps inside prefills"] >= 10
    assert played.seen["suspensions"] >= 5
