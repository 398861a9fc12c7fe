"""Hundreds of random interleavings with aborts on one scheduler, and mutants that they catch: `make stress`."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.chaos import Rounds
from tests.engine import PrefillEngine
from tests.mutants import MUTANTS
from tests.prompts import population
from tests.reference import Comparison

pytestmark = [pytest.mark.stress, pytest.mark.timeout(3600)]

ROUNDS = 450


def test_twenty_thousand_suspensions_change_no_answer_and_no_kv_and_leave_nothing_behind(
    engine: PrefillEngine, comparison: Comparison
) -> None:
    rounds = Rounds(engine, comparison, population(500))
    rounds.run(ROUNDS)
    rounds.close()
    comparison.assert_same_with_logprobs()
    assert rounds.seen["suspensions"] >= 20_000
    assert comparison.counts["aborts"] >= 300
    assert comparison.counts["answers"] == comparison.counts["KV caches"] >= 2_000
    assert comparison.counts["tokens decoded from KV"] >= 7 * comparison.counts["KV caches"] - 50


@pytest.mark.parametrize("name", ["nothing", *MUTANTS])
def test_a_planted_defect_is_caught(name: str) -> None:
    done = subprocess.run([sys.executable, "-m", "tests.mutants", name], capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
