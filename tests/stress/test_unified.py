"""Ten thousand interleavings of steps, suspensions, aborts and retractions, in each of four sizes of the KV pool. In
two of them also with results that come late.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.remote import Remote
from tests.unified_asks import asks, without_penalties
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_mutants import MUTANTS
from tests.unified_rounds import Rounds

pytestmark = [pytest.mark.stress, pytest.mark.timeout(7200)]

MOST_ROUNDS = 160
INTERLEAVINGS, ABORTS, ANSWERS = 10_000, 20, 60
POOLS = {
    "ample": ({}, 60_000),
    "ample, results late": ({}, 60_000),
    "small": ({}, 6000),
    "barely enough": ({}, 3500),
    "barely enough, results late": ({}, 3500),
    "retracted": ({"SGLANG_TEST_RETRACT": "1"}, 8000),
}


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    with closing(Remote(StockEngine, str(embedded_model_path()))) as remote:
        yield Stock(remote)


@pytest.mark.parametrize("name", POOLS)
def test_random_interleavings_change_no_answer_and_leave_nothing_behind(stock: Stock, name: str) -> None:
    environment, pool_tokens = POOLS[name]
    is_warm = not environment  # SGLang reads it when it is imported
    requests = asks(150, seed=11, longest_tokens=2000, longest_answer_tokens=60)
    if pool_tokens < 60_000:
        requests = without_penalties(requests)
    comparison = StockComparison(stock)
    with closing(
        Remote(UnifiedEngine, str(embedded_model_path()), environment, is_warm=is_warm, max_total_tokens=pool_tokens)
    ) as remote:
        rounds = Rounds(remote, comparison, requests, late=name.endswith("late"))
        for first in range(0, MOST_ROUNDS, 5):
            rounds.run(5, first)
            print(f"{name}, {first + 5} rounds: {rounds}", flush=True)
            counts = comparison.counts
            interleavings = rounds.seen["steps inside prefills"] + rounds.seen["suspensions"]
            if interleavings >= INTERLEAVINGS and counts["aborts"] >= ABORTS and counts["answers"] >= ANSWERS:
                break
    assert interleavings >= INTERLEAVINGS
    assert counts["aborts"] >= ABORTS
    assert counts["answers"] >= ANSWERS
    assert (rounds.seen["retractions"] > 0) >= (name == "retracted")


@pytest.mark.parametrize("name", ["nothing", *MUTANTS])
def test_a_planted_defect_is_caught(name: str) -> None:
    command = [sys.executable, "-m", "tests.unified_mutants", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
