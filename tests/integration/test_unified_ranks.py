"""Two tensor-parallel ranks that prefill and decode: all decide alike, and answer as transformers does."""

from __future__ import annotations

from pathlib import Path

import pytest

from sgl_flowprefill.events import read_events
from sgl_flowprefill.model import embedded_model_path
from tests.integration.conftest import PROMPTS, TWO_HEADS
from tests.ranks import Chaos
from tests.reference import TOKENS, Comparison, Reference
from tests.unified_asks import Ask
from tests.unified_ranks import BEHIND, UnifiedRanks

ASKED = {rid: Ask(tuple(tokens), TOKENS, (("ignore_eos", True),)) for rid, tokens in PROMPTS.items()}


@pytest.fixture(scope="session")
def reference(two_heads: Reference) -> Reference:
    return two_heads


@pytest.mark.parametrize(
    ("pass_probabilities", "times"),
    [
        pytest.param(None, 2, id="in time"),
        pytest.param(None, 3, id="in time, more", marks=pytest.mark.stress),
        pytest.param((0.02, 0.9), 5, id="rank 0 late", marks=pytest.mark.stress),
        pytest.param((0.9, 0.02), 5, id="follower late", marks=pytest.mark.stress),
    ],
)
def test_two_ranks_with_steps_at_random_points_inside_suspended_prefills_give_the_answers_of_transformers(
    comparison: Comparison, tmp_path: Path, pass_probabilities: tuple[float, float] | None, times: int
) -> None:
    """Where each rank's device is late by itself, rank 0 says when the result of a step is processed, too. Tokens that
    come late make fewer steps, so there are more requests, until there have been BEHIND such steps.
    """
    model_path, chaos = str(embedded_model_path(TWO_HEADS)), Chaos(seed=2, switch_probability=0.7)
    with UnifiedRanks(model_path, 2, tmp_path, chaos, pass_probabilities=pass_probabilities) as ranks:
        first_asked = {f"{rid}-{i}": ask for i in range(times) for rid, ask in ASKED.items()}
        asked: dict[str, Ask] = {}
        for wave in [first_asked] if pass_probabilities is None else ranks.waves(first_asked):
            for rid, ask in wave.items():
                ranks.ask(rid, ask)
            ranks.finish(list(wave))
            asked |= wave
        ranks.compare_answers(comparison, asked)
        assert comparison.counts["tokens"] == TOKENS * len(asked)
        assert ranks.preemptions() >= 50
        events = list(read_events(ranks.event_log))
        live, inside = 0, 0
        for event in events:
            live += (event.kind == "start") - (event.kind in ("complete", "give_back"))
            inside += event.kind == "step" and live > 0
        print(f"{inside} of {sum(event.kind == 'step' for event in events)} steps inside prefills")
        assert inside >= 10  # how many is a matter of the machine's speed
        assert sum(event.kind == "give_back" for event in events) >= 1
        if pass_probabilities is not None:
            first, second = ranks.notes("finishes", 0), ranks.notes("finishes", 1)
            same = ("step", "rids", "live")
            assert [[note[key] for key in same] for note in first] == [[note[key] for key in same] for note in second]
            assert all(note["arrived"] for note in first + second), "a result was processed before it had arrived"
            behind, steps = ranks.steps_with_more_behind(), sum(note["step"] for note in first)
            print(f"{behind} of {steps} steps processed with operators queued behind them; {len(asked)} requests")
            assert behind >= BEHIND
