"""Two tensor-parallel ranks: a prefill that fails at both is dropped by both; one that fails at one ends the server."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.policy import Limits
from sgl_flowprefill.runtime import agreement
from tests.faults import ANOTHER_MARKER, MARKER, raise_in_marked_prompts
from tests.integration.conftest import PROMPTS, SHARED, TWO_HEADS
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks
from tests.reference import Comparison, Reference

FAILED_WAIT_S = 10.0
"""Shorter than the servers' own, which the tests would have to wait for."""
FAULT = "CUDA out of memory"
"""What both ranks log of a prefill that fails."""


def fail(scheduler: Any, rank: int, checkpoints: Mapping[int, Mapping[int, int]]) -> None:
    """In each rank's process: a task for each request, and prompts with a marker fail after so many preemption
    checkpoints at the ranks that ``checkpoints`` has for it.
    """
    agreement.FAILED_WAIT_S = FAILED_WAIT_S  # type: ignore[misc]
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    for marker, of_ranks in checkpoints.items():
        if rank in of_ranks:
            raise_in_marked_prompts(scheduler, "memory", of_ranks[rank], marker)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """One marker fails at both ranks, the other at rank 1 alone."""
    prepare = partial(fail, checkpoints={MARKER: {0: 3, 1: 3}, ANOTHER_MARKER: {1: 3}})
    path = str(embedded_model_path(TWO_HEADS))
    chaos = Chaos(seed=5, switch_probability=0.8)
    with Ranks(path, 2, tmp_path_factory.mktemp("failures"), chaos, prepare=prepare) as ranks:
        yield ranks


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.stress)])
def test_what_fails_at_both_ranks_is_dropped_and_the_others_get_the_answers_of_transformers(
    ranks: Ranks, two_heads: Reference, times: int
) -> None:
    said = ranks.log.read_text().count(FAULT)
    good = {f"{rid}-{times}-{i}": tokens for i in range(times) for rid, tokens in PROMPTS.items()}
    for name, tokens in good.items():
        ranks.submit(name, tokens)
        ranks.submit(f"bad-{name}", [*tokens, MARKER])
    ranks.finish([*good, *(f"bad-{name}" for name in good)])
    assert {ranks.reasons[f"bad-{name}"]["status_code"] for name in good} == {500}
    comparison = Comparison(two_heads)
    ranks.compare(comparison, good)
    print(comparison)
    assert comparison.counts["KV caches"] == 2 * len(good)
    assert ranks.preemptions() >= 20
    assert ranks.log.read_text().count(FAULT) - said == 2 * len(good)


def test_a_prefill_that_fails_at_rank_1_alone_ends_both_with_a_sentence(ranks: Ranks) -> None:
    assert_that_they_end(ranks, ANOTHER_MARKER, first=1)


@pytest.mark.stress
@pytest.mark.parametrize("checkpoints", [{0: 3}, {0: 2, 1: 3}], ids=["rank 0 alone", "at different operators"])
def test_ranks_that_do_not_fail_alike_end_with_a_sentence(checkpoints: dict[int, int], tmp_path: Path) -> None:
    prepare = partial(fail, checkpoints={MARKER: checkpoints})
    with Ranks(str(embedded_model_path(TWO_HEADS)), 2, tmp_path, prepare=prepare) as ranks:
        assert_that_they_end(ranks, MARKER, first=0)


def assert_that_they_end(ranks: Ranks, marker: int, first: int) -> None:
    """A prompt with ``marker``, which fails at ``first`` or there before elsewhere, ends both."""
    said = len(ranks.log.read_text())
    ranks.submit("good", prompt(1, 3000, SHARED))
    ranks.submit("bad", [*prompt(2, 2000), marker])
    deadline_s = time.monotonic() + 60.0
    while any(process.is_alive() for process in ranks.processes) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    log = ranks.log.read_text()[said:]
    assert not any(process.is_alive() for process in ranks.processes), log
    assert (
        f"a prefill has failed at tensor-parallel rank {first}" in log
        or f"after a prefill has failed at rank {first}" in log
    )
    assert FAULT in log
