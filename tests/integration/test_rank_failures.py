"""Two tensor-parallel ranks: a prefill that fails at both is dropped by both; one that fails at one ends the server."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.policy import Limits
from tests.faults import MARKER, raise_in_marked_prompts
from tests.integration.test_tensor_parallel import PROMPTS, SHARED, TWO_HEADS
from tests.prompts import prompt
from tests.ranks import Chaos, Ranks
from tests.reference import Comparison, Reference


def fail(scheduler: Any, rank: int, fault: str, ranks: tuple[int, ...], checkpoints: tuple[int, ...]) -> None:
    """In each rank's process: a task for each request, and marked prompts fail at ``ranks``, at each after so many
    checkpoints.
    """
    scheduler.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)
    if rank in ranks:
        raise_in_marked_prompts(scheduler, fault, checkpoints[rank])


def test_what_fails_at_both_ranks_is_dropped_and_the_others_get_the_answers_of_transformers(
    tmp_path: Path,
) -> None:
    prepare = partial(fail, fault="memory", ranks=(0, 1), checkpoints=(3, 3))
    path = str(embedded_model_path(TWO_HEADS))
    with Ranks(path, 2, tmp_path, Chaos(seed=5, switch_probability=0.8), prepare=prepare) as ranks:
        good = {f"{rid}-{i}": tokens for i in range(2) for rid, tokens in PROMPTS.items()}
        for name, tokens in good.items():
            ranks.submit(name, tokens)
            ranks.submit(f"bad-{name}", [*tokens, MARKER])
        ranks.finish([*good, *(f"bad-{name}" for name in good)])
        assert {ranks.reasons[f"bad-{name}"]["status_code"] for name in good} == {500}
        comparison = Comparison(Reference(path))
        ranks.compare(comparison, good)
        print(comparison)
        assert comparison.counts["KV caches"] == 2 * len(good)
        assert ranks.preemptions() >= 20
        assert ranks.log.read_text().count("CUDA out of memory") == 2 * 2 * len(PROMPTS)


@pytest.mark.parametrize(
    ("ranks_that_fail", "checkpoints"),
    [
        pytest.param((0,), (3, 3), id="rank 0 alone", marks=pytest.mark.stress),
        pytest.param((1,), (3, 3), id="rank 1 alone"),
        pytest.param((0, 1), (2, 3), id="at different operators", marks=pytest.mark.stress),
    ],
)
def test_ranks_that_do_not_fail_alike_end_with_a_sentence(
    ranks_that_fail: tuple[int, ...], checkpoints: tuple[int, ...], tmp_path: Path
) -> None:
    prepare = partial(fail, fault="memory", ranks=ranks_that_fail, checkpoints=checkpoints)
    with Ranks(str(embedded_model_path(TWO_HEADS)), 2, tmp_path, prepare=prepare) as ranks:
        ranks.submit("good", prompt(1, 3000, SHARED))
        ranks.submit("bad", [*prompt(2, 2000), MARKER])
        deadline_s = time.monotonic() + 60.0
        while any(process.is_alive() for process in ranks.processes) and time.monotonic() < deadline_s:
            time.sleep(0.2)
        log = ranks.log.read_text()
        assert not any(process.is_alive() for process in ranks.processes), log
        first = ranks_that_fail[0]
        assert (
            f"a prefill has failed at tensor-parallel rank {first}" in log
            or f"after a prefill has failed at rank {first}" in log
        )
        assert "CUDA out of memory" in log
