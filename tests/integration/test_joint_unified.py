"""Two scheduler processes that prefill and decode with data-parallel attention: joint steps inside joint prefills."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sgl_flowprefill.events import read_events
from tests.integration.conftest import PROMPTS
from tests.joint_unified_ranks import JointUnifiedRanks, note_all
from tests.prompts import prompt
from tests.ranks import Chaos
from tests.reference import TOKENS, Comparison, Reference
from tests.unified_asks import Ask
from tests.unified_ranks import BEHIND

ASKED = {rid: Ask(tuple(tokens), TOKENS, (("ignore_eos", True),)) for rid, tokens in PROMPTS.items()}


@pytest.fixture(scope="session")
def reference(joint: Reference) -> Reference:
    return joint


@pytest.fixture(scope="module")
def ranks(joint_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JointUnifiedRanks]:
    chaos = Chaos(seed=2, switch_probability=0.7)
    with JointUnifiedRanks(str(joint_path), 2, tmp_path_factory.mktemp("two"), chaos, prepare=note_all) as two:
        yield two


def ask_all(ranks: JointUnifiedRanks, asked: dict[str, Ask], rng: random.Random) -> None:
    """The first third of ``asked`` at the second rank alone, then at either."""
    for i, (rid, ask) in enumerate(asked.items()):
        ranks.ask(rid, ask, rank=1 if i < len(asked) // 3 else rng.randrange(2))
    ranks.finish(list(asked))


def assert_the_same_at_both_ranks(ranks: JointUnifiedRanks) -> None:
    all_passes, all_steps = ([ranks.notes(what, rank) for rank in range(2)] for what in ("passes", "steps"))
    passes = [[(one["task"], one["all"], one["checkpoints"]) for one in own] for own in all_passes]
    steps = [[(one["all"], one["live"]) for one in own] for own in all_steps]
    assert passes[0] == passes[1]
    assert steps[0] == steps[1], "a prefill was suspended elsewhere, or streams were counted otherwise"
    computed = [sum(one["own"] or 0 for one in pair) for pair in zip(*all_steps, strict=True)]
    assert [streams for streams, _ in steps[0]] == computed, "the policy knows of other streams than there are"


@pytest.mark.parametrize("times", [1, pytest.param(8, marks=pytest.mark.stress)])
def test_joint_steps_at_random_points_inside_joint_prefills_give_the_answers_of_transformers(
    ranks: JointUnifiedRanks, comparison: Comparison, times: int
) -> None:
    asked = {f"{rid}-{times}-{i}": ask for i in range(times) for rid, ask in ASKED.items()}
    ask_all(ranks, asked, random.Random(times))
    ranks.compare_answers(comparison, asked)
    assert comparison.counts["tokens"] == comparison.counts["log probabilities"] == TOKENS * len(asked)
    suspensions = ranks.preemptions()
    assert_the_same_at_both_ranks(ranks)
    first, second = ranks.notes("steps", 0), ranks.notes("steps", 1)
    idle = sum(not one["own"] for one in first + second)
    both = sum(bool(a["own"]) and bool(b["own"]) for a, b in zip(first, second, strict=True))
    inside = sum(any(passed for _, passed in one["live"]) for one in first)
    given_back = sum(event.kind == "give_back" for event in read_events(ranks.event_log))
    print(f"\n{suspensions} suspensions, {given_back} tasks gave their KV cache back")
    print(f"{len(first)} joint steps, {inside} of them inside prefills, {both} with streams at both ranks")
    print(f"{idle} times, a rank was idle in one")
    assert suspensions >= 10
    assert inside >= 5
    assert idle
    assert both
    assert given_back


@pytest.mark.parametrize("times", [1, pytest.param(3, marks=pytest.mark.stress)])
def test_clients_that_leave_are_dropped_by_their_rank_and_nothing_stays_behind(
    ranks: JointUnifiedRanks, comparison: Comparison, times: int
) -> None:
    rng = random.Random(7)
    kept: dict[str, Ask] = {}
    for i in range(times):
        for rid, ask in ASKED.items():
            name = f"a{times}-{i}-{rid}"
            ranks.ask(name, ask, rank=rng.randrange(2))
            time.sleep(rng.random() * 0.05)
            if rng.random() < 0.3:
                ranks.abort(name)
            else:
                kept[name] = ask
    ranks.finish(list(kept))
    ranks.compare_answers(comparison, kept)
    assert comparison.counts["answers"] == len(kept) < times * len(ASKED)
    ranks.assert_nothing_is_held(60.0)


@pytest.mark.stress
def test_a_pause_that_retracts_streams_of_both_ranks_has_their_answers_go_on(
    ranks: JointUnifiedRanks, comparison: Comparison
) -> None:
    from sglang.srt.managers.io_struct import ContinueGenerationReqInput, PauseGenerationReqInput

    long = {f"p{i}": Ask(tuple(prompt(50 + i, 200 + 90 * i)), 40, (("ignore_eos", True),)) for i in range(4)}
    for i, (rid, ask) in enumerate(long.items()):
        ranks.ask(rid, ask, rank=i % 2)
    deadline_s = time.monotonic() + 60.0
    while not any(ranks.answers[rid] for rid in long):
        assert time.monotonic() < deadline_s
        ranks.take(0.1)
    ranks.send(PauseGenerationReqInput(mode="retract"))
    time.sleep(1.0)
    ranks.take(0.1)
    assert not set(long) <= set(ranks.tokens), "they were answered before the pause"
    ranks.send(ContinueGenerationReqInput())
    ranks.finish(list(long))
    ranks.compare_answers(comparison, long)
    assert_the_same_at_both_ranks(ranks)
    ranks.assert_nothing_is_held(60.0)


@pytest.mark.stress
@pytest.mark.parametrize("pass_probabilities", [(0.02, 0.9), (0.9, 0.02)], ids=["rank 0 late", "follower late"])
def test_results_that_come_late_at_one_rank_are_processed_at_the_same_place_by_both(
    joint_path: Path, comparison: Comparison, tmp_path: Path, pass_probabilities: tuple[float, float]
) -> None:
    chaos = Chaos(seed=3, switch_probability=0.7)
    with JointUnifiedRanks(
        str(joint_path), 2, tmp_path, chaos, pass_probabilities=pass_probabilities, prepare=note_all
    ) as ranks:
        asked: dict[str, Ask] = {}
        for wave in ranks.waves({f"{rid}-{i}": ask for i in range(5) for rid, ask in ASKED.items()}):
            ask_all(ranks, wave, random.Random(1))
            asked |= wave
        ranks.compare_answers(comparison, asked)
        assert comparison.counts["tokens"] == TOKENS * len(asked)
        assert_the_same_at_both_ranks(ranks)
        first, second = ranks.notes("finishes", 0), ranks.notes("finishes", 1)
        same = ("step", "live")
        assert [[note[key] for key in same] for note in first] == [[note[key] for key in same] for note in second]
        assert all(note["arrived"] for note in first + second), "a result was processed before it had arrived"
        behind = ranks.steps_with_more_behind()
        print(f"\n{behind} steps processed with operators queued behind them; {len(asked)} requests")
        assert behind >= BEHIND
