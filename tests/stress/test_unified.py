"""Ten thousand interleavings of steps, suspensions, aborts and retractions, in each of four sizes of the KV pool, and
where prefills are given back. In three of these also with results that come late.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from sgl_flowprefill.model import embedded_model_path
from tests.remote import Remote
from tests.unified_asks import asks, outgrowing, without_penalties
from tests.unified_comparison import Stock, StockComparison
from tests.unified_engine import StockEngine, UnifiedEngine
from tests.unified_mutants import MUTANTS
from tests.unified_rounds import FEW, MANY, Rounds
from tests.unified_scenarios import kv_cache

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
    "given back": ({}, kv_cache.TIGHT_TOKENS),
    "given back, results late": ({}, kv_cache.TIGHT_TOKENS),
}
GIVE_BACKS = 20
"""At least so many prefills give their KV cache back in the pools that are named after it. A model of admission and of
the coin has one or two in a round of theirs, and half as many where prefills get on behind steps: 40 to 80 in all.
"""


@pytest.fixture(scope="module")
def stock() -> Iterator[Stock]:
    with closing(Remote(StockEngine, str(embedded_model_path()))) as remote:
        yield Stock(remote)


@pytest.mark.parametrize("name", POOLS)
def test_random_interleavings_change_no_answer_and_leave_nothing_behind(stock: Stock, name: str) -> None:
    environment, pool_tokens = POOLS[name]
    is_warm = not environment  # SGLang reads it when it is imported
    gives_back = name.startswith("given back")
    if gives_back:
        requests, least_give_backs = outgrowing(150, seed=11), GIVE_BACKS
        options = {"schedule_conservativeness": 0.0}
    else:
        requests, least_give_backs = asks(150, seed=11, longest_tokens=2000, longest_answer_tokens=60), 0
        options = {}
    if pool_tokens < 60_000:
        requests = without_penalties(requests)
    comparison = StockComparison(stock)
    with closing(
        Remote(
            UnifiedEngine,
            str(embedded_model_path()),
            environment,
            is_warm=is_warm,
            max_total_tokens=pool_tokens,
            **options,
        )
    ) as remote:
        late = name.endswith("late")
        rounds = Rounds(remote, comparison, requests, late=late, requests=MANY if gives_back else FEW)
        for first in range(0, MOST_ROUNDS, 5):
            rounds.run(5, first)
            print(f"{name}, {first + 5} rounds: {rounds}", flush=True)
            counts = comparison.counts
            interleavings = rounds.seen["steps inside prefills"] + rounds.seen["suspensions"]
            is_enough = counts["aborts"] >= ABORTS and counts["answers"] >= ANSWERS
            if is_enough and interleavings >= INTERLEAVINGS and rounds.seen["given back"] >= least_give_backs:
                break
    assert interleavings >= INTERLEAVINGS
    assert counts["aborts"] >= ABORTS
    assert counts["answers"] >= ANSWERS
    assert rounds.seen["given back"] >= least_give_backs
    assert (rounds.seen["retractions"] > 0) >= (name == "retracted")


@pytest.mark.parametrize("name", ["nothing", *MUTANTS])
def test_a_planted_defect_is_caught(name: str) -> None:
    command = [sys.executable, "-m", "tests.unified_mutants", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
