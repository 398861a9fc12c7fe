"""SGLang's statistics of experts, under suspensions at random places: each forward pass is counted, once and apart.

What is counted of each is compared with where transformers routes the tokens that it computed.
"""

from __future__ import annotations

import json
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import pytest
import torch

from tests.chaos import Rounds, calm
from tests.experts import (
    CountingPrefill,
    CountingStock,
    CountingUnified,
    Judge,
    Pass,
    checkpoint,
    dump,
    environment,
    options,
    read,
    tell,
    watch,
)
from tests.prompts import population, prompt
from tests.rank_notes import noting
from tests.ranks import Chaos, Ranks
from tests.remote import Remote
from tests.unified_asks import Ask
from tests.unified_rounds import play
from tests.waiting import until

PROMPTS = population(40, longest_tokens=1500)
ASKS = {
    f"a{i}": Ask(tuple(prompt(100 + i, tokens)), answer_tokens, (("ignore_eos", True),))
    for i, (tokens, answer_tokens) in enumerate(
        [(40, 20), (500, 7), (900, 1), (350, 24), (1100, 12), (310, 2), (7, 30), (700, 9), (120, 16), (64, 5)]
    )
}
"""No two of them begin alike."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("counted")


@pytest.fixture(scope="module")
def prefill(folder: Path) -> Iterator[Remote]:
    with closing(Remote(CountingPrefill, folder, "per_pass")) as remote:
        yield remote


@pytest.fixture(scope="module")
def unified(folder: Path) -> Iterator[Remote]:
    with closing(Remote(CountingUnified, folder, "stat")) as remote:
        yield remote


# ---- prefill servers -------------------------------------------------------------------------------------------------


@dataclass
class Played:
    """What became of some rounds."""

    text: str
    counts: Counter[str]
    """What was compared of answers."""
    counted: Counter[str]
    """What was compared of the record."""
    seen: Counter[str]


def play_rounds(engine: CountingPrefill, rounds: int, first: int = 0) -> Played:
    """Rounds of prompts, some of which are aborted, all of which is recorded."""
    judge = engine.judge
    judge.counts.clear()
    judge.comparison.counts.clear()
    tell(engine, "START")
    engine.passes.clear()
    chance = Rounds(engine, judge.comparison, PROMPTS)
    for number in range(first, first + rounds):
        chance.play(random.Random(number))
        judge.comparison.assert_same()
    chance.close()
    engine.assert_clean()
    judge.compare(dump(engine), engine.passes)
    return Played(f"{chance}; {judge}", Counter(judge.comparison.counts), Counter(judge.counts), Counter(chance.seen))


def assert_played(played: Played, answers: int) -> None:
    print(played.text)
    assert played.counts["answers"] >= answers
    assert played.seen["suspensions"] >= 2 * answers
    assert played.seen["aborts of started tasks"] >= answers // 20
    counted = played.counted
    assert counted["passes"] == counted["reported"] >= answers // 2
    assert counted["tokens"] >= 100 * answers
    assert counted["ties"] <= 0.01 * counted["tokens"]
    assert counted["decided by rounding"] <= 0.05 * counted["passes"] + 1


def recorded(engine: CountingPrefill) -> int:
    """How many passes the record has that began when the server did."""
    return len(dump(engine))


def test_what_a_server_measures_when_it_starts_is_not_counted(prefill: Remote) -> None:
    assert prefill.call(recorded) == 0


def test_each_prefill_is_counted_once_and_apart_from_those_that_it_is_suspended_beside(prefill: Remote) -> None:
    assert_played(prefill.call(play_rounds, 4), answers=14)


@pytest.mark.stress
def test_many_rounds_of_prefills_are_counted_once_and_apart(prefill: Remote) -> None:
    assert_played(prefill.call(play_rounds, 60, 1000), answers=280)


def suspend(engine: CountingPrefill, rid: str, tokens: Sequence[int]) -> None:
    """Begin a prefill of ``tokens``, and leave it suspended."""
    executor = engine.hub.executor
    usual, executor.interrupted = executor.interrupted, lambda: True
    engine.submit(rid, tokens)
    while not any(task.points_passed for task in engine.hub.work.tasks.live):
        engine.turn()
    executor.interrupted = usual


def record_beside_suspended_prefills(engine: CountingPrefill) -> tuple[list[str], int]:
    """Suspended prefills when a record begins, and when it ends. Who has run by then, and how many are recorded."""
    engine.assert_clean()
    tell(engine, "STOP")
    engine.passes.clear()
    suspend(engine, "before", prompt(8, 300))
    tell(engine, "START")
    suspend(engine, "within", prompt(9, 300))
    tell(engine, "STOP")
    suspend(engine, "after", prompt(10, 300))
    ended = [part.rid for one in engine.passes for part in one.parts]
    engine.run()
    counts = dump(engine)
    engine.judge.compare(counts, engine.passes[1:2])
    tell(engine, "START")
    engine.assert_clean()
    return ended, len(counts)


def test_a_record_begins_and_ends_between_prefills(prefill: Remote) -> None:
    ended, passes = prefill.call(record_beside_suspended_prefills)
    assert ended == ["before", "within"]
    assert passes == 1


def explore(engine: CountingPrefill) -> tuple[int, int]:
    """How many forward passes nobody asked for, and how many of them are recorded."""
    from tests.exploring import explore, explorer_of

    engine.assert_clean()
    tell(engine, "START")
    engine.passes.clear()
    assert explore(engine, explorer_of(engine))
    engine.assert_clean()
    return len(engine.passes), len(dump(engine))


def test_what_a_server_explores_is_not_counted(prefill: Remote) -> None:
    ran, counted = prefill.call(explore)
    assert ran >= 2
    assert counted == 0


# ---- servers that decode, too ----------------------------------------------------------------------------------------


def count_all(engine: CountingUnified, asked: Mapping[str, Ask], dropped: set[str], seed: int) -> Any:
    """The answers, what was counted for them, what was compared, and what happened."""
    engine.assert_clean()
    engine.judge.counts.clear()
    tell(engine, "START")
    engine.passes.clear()
    played = play(engine, asked, dropped, seed, 0.5)
    engine.assert_clean()
    counts = dump(engine)
    engine.judge.compare(counts, engine.passes)
    print(engine.judge)
    answers = {rid: answer.tokens for rid, answer in played.answers.items() if rid not in played.left}
    return answers, counts.sum(0), Counter(engine.judge.counts), played.seen


def count_one_by_one(engine: CountingStock, asked: Mapping[str, Ask]) -> Any:
    """The answers of SGLang's own scheduler, what it has counted, and what was compared of it."""
    tell(engine, "START")
    engine.passes.clear()
    answers = {rid: engine.answer(ask).tokens for rid, ask in asked.items()}
    counts = dump(engine)
    engine.judge.compare(counts, engine.passes)
    return answers, counts.sum(0), Counter(engine.judge.counts)


def test_prefills_and_the_decode_steps_inside_them_are_counted_apart_and_as_by_sglang(
    unified: Remote, folder: Path
) -> None:
    with closing(Remote(CountingStock, folder, "stat")) as stock:
        expected_answers, expected_counts, compared_of_stock = stock.call(count_one_by_one, ASKS)
    print(compared_of_stock)
    seen: Counter[str] = Counter()
    passes = 0
    for seed in (1, *range(10, 20)):
        answers, counts, compared, happened = unified.call(count_all, ASKS, set(), seed)
        seen += happened
        print(compared, seen)
        assert answers == expected_answers
        assert compared["passes"] == compared["reported"]
        passes += compared["passes"]
        assert compared["tokens"] == compared_of_stock["tokens"]
        assert int((counts - expected_counts).abs().sum()) <= 2 * compared["ties"]
        # How many fit in depends on the machine's speed.
        if seen["suspensions"] >= 20 and seen["steps inside prefills"] >= 10:
            break
    assert seen["suspensions"] >= 20
    assert seen["steps inside prefills"] >= 10
    assert passes >= 50


def test_requests_that_leave_are_counted_as_far_as_whole_passes_go(unified: Remote) -> None:
    seen: Counter[str] = Counter()
    compared: Counter[str] = Counter()
    for seed in range(2, 6):
        _, _, counts, happened = unified.call(count_all, ASKS, set(list(ASKS)[seed % 2 :: 2]), seed)
        seen, compared = seen + happened, compared + counts
    print(compared, seen)
    assert seen["aborts: suspended"] + seen["aborts: running"] >= 2
    assert compared["passes"] == compared["reported"] >= 100


# ---- several ranks ---------------------------------------------------------------------------------------------------


def note_passes(folder: Path, scheduler: Any, rank: int) -> None:
    """Write each pass of a rank to a file."""
    file = passes_path(folder, rank).open("wb", buffering=0)
    watch(scheduler, lambda one: file.write(pickle.dumps(one)))


def passes_path(folder: Path, rank: int) -> Path:
    return folder / f"passes-{rank}"


def read_passes(folder: Path, rank: int) -> list[Pass]:
    found = []
    with passes_path(folder, rank).open("rb") as file:
        while file.peek(1):
            found.append(pickle.load(file))
    return found


def wait_for_record(folder: Path, timeout_s: float = 60.0) -> torch.Tensor:
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            [file] = folder.glob("*.pt")
            return read(file)
        except (ValueError, EOFError, RuntimeError):  # not there, or not whole yet
            assert time.monotonic() < deadline_s, "no record is written"
            time.sleep(0.1)


@pytest.mark.stress
def test_two_ranks_that_are_preempted_all_the_time_count_the_same_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import ExpertDistributionReq, ExpertDistributionReqType

    monkeypatch.setenv("FLOWPREFILL_MAX_BATCH_TOKENS", "1")  # a task for each request
    variables = environment(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lengths = (40, 500, 1300, 350, 900, 310, 7, 700, 330, 64)
    prompts = {f"r{i:02}": prompt(i, tokens) for i, tokens in enumerate(lengths)}
    path = checkpoint(tmp_path)
    two = Ranks(path, 2, tmp_path, Chaos(seed=1, switch_probability=0.9), prepare=partial(note_passes, tmp_path))
    two.settings = {**two.settings, **options("stat")}
    with two as ranks:
        ranks.send(ExpertDistributionReq(action=ExpertDistributionReqType.START_RECORD))
        for rid, tokens in prompts.items():
            ranks.submit(rid, tokens, ttft_slo_s=100.0)
        ranks.finish(list(prompts))
        ranks.send(ExpertDistributionReq(action=ExpertDistributionReqType.DUMP_RECORD))
        counts = wait_for_record(Path(next(iter(variables.values()))))
        first, second = read_passes(tmp_path, 0), read_passes(tmp_path, 1)
        preemptions = ranks.preemptions()
    judge = Judge(path)
    judge.compare(counts, first, ranks=2)
    for rid, tokens in prompts.items():
        token = ranks.tokens[rid]
        judge.comparison.answer(rid, tokens, [] if token is None else [token], [ranks.logprobs[rid]])
    judge.comparison.assert_same()
    print(f"{judge}; {judge.comparison}; {preemptions} suspensions")
    assert [one.parts for one in first] == [one.parts for one in second]
    assert judge.counts["passes"] == judge.counts["reported"] == len(prompts)
    assert judge.comparison.counts["answers"] == len(prompts)
    assert preemptions >= 30


REBALANCED: Final = {
    "ep_size": 2,
    "enable_eplb": True,
    "eplb_rebalance_num_iterations": 4,
    "ep_num_redundant_experts": 2,
}
"""Experts move between two ranks after every four passes, and two of them are at both."""


def note_moves(folder: Path, scheduler: Any, rank: int) -> None:
    """Write a line for each time that experts move, what has been counted for it, and each pass."""
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder
    from sglang.srt.eplb.expert_location import get_global_expert_location_metadata

    note_passes(folder, scheduler, rank)
    tasks, manager = scheduler.hub.work.tasks, scheduler.tp_worker.model_runner.eplb_manager
    recorder, notes = get_global_expert_distribution_recorder(), noting("moves", rank)
    dump_record, rebalance, note_pass = recorder.dump_record, manager.rebalance, manager.on_forward_pass_end
    counted: list[torch.Tensor] = []
    suspended: list[int] = []

    def noted_dump(output_mode: str = "file") -> Any:
        output = dump_record("object")
        counted.append(output["logical_count"].clone())
        torch.save(torch.cat(counted), counts_path(folder, rank))
        return output

    def noted_end() -> None:
        note_pass()
        suspended.append(sum(task.points_passed > 0 for task in tasks.live) - 1)

    def noted_rebalance() -> Iterator[None]:
        before = get_global_expert_location_metadata().physical_to_logical_map.clone()
        live, started = len(tasks.live), tasks.started
        yield from rebalance()
        moved = int((get_global_expert_location_metadata().physical_to_logical_map != before).sum())
        note = {"live": live, "started": started, "moved": moved, "suspended": list(suspended)}
        notes.write(json.dumps(note) + "\n")
        suspended.clear()

    recorder.dump_record, manager.rebalance, manager.on_forward_pass_end = noted_dump, noted_rebalance, noted_end


def counts_path(folder: Path, rank: int) -> Path:
    return folder / f"counts-{rank}"


@pytest.mark.stress
def test_experts_move_between_two_ranks_while_nothing_is_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sglang.srt.managers.io_struct import ExpertDistributionReq, ExpertDistributionReqType

    monkeypatch.setenv("FLOWPREFILL_MAX_BATCH_TOKENS", "1")  # a task for each request
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    prompts = {f"r{i:02}": prompt(i, 40 + 97 * i % 700) for i in range(24)}
    path = checkpoint(tmp_path)
    two = Ranks(path, 2, tmp_path, Chaos(seed=1, switch_probability=0.9), prepare=partial(note_moves, tmp_path))
    two.settings = {**two.settings, **options("stat"), **REBALANCED}
    with two as ranks:
        rids = list(prompts)
        for i in range(0, len(rids), 6):
            for rid in rids[i : i + 6]:
                ranks.submit(rid, prompts[rid], ttft_slo_s=100.0)
            ranks.finish(rids[: i + 6])
        preemptions = ranks.preemptions()
        seen = counts_path(tmp_path, 0).stat().st_mtime_ns
        ranks.send(ExpertDistributionReq(action=ExpertDistributionReqType.DUMP_RECORD))
        until(lambda: counts_path(tmp_path, 0).stat().st_mtime_ns != seen, 60, say=lambda: "no record is written")
        time.sleep(1)
    judge = Judge(path)
    judge.compare(torch.load(counts_path(tmp_path, 0)), read_passes(tmp_path, 0), ranks=2)
    for rid, tokens in prompts.items():
        token = ranks.tokens[rid]
        judge.comparison.answer(rid, tokens, [] if token is None else [token], [ranks.logprobs[rid]])
    judge.comparison.assert_same()
    first, second = (ranks.notes("moves", rank) for rank in range(2))
    print(f"{judge}; {judge.comparison}; {preemptions} suspensions; {first}")
    assert first == second
    assert len(first) >= 4
    assert {note["live"] for note in first} == {0}
    assert all(note["moved"] for note in first[:1])
    assert max(note["suspended"][-1] for note in first) == 0
    assert max(max(note["suspended"]) for note in first) >= 2
    assert judge.counts["passes"] == len(prompts)
    assert preemptions >= 30


# ---- defects ---------------------------------------------------------------------------------------------------------


def counts_are_not_saved(_: CountingPrefill) -> Any:
    """All prefills are counted in one place."""
    from sgl_flowprefill.runtime.experts import pass_state

    shared = "_single_pass_gatherers"
    return patch(
        "sgl_flowprefill.runtime.forward_state.pass_state",
        lambda: {name: value for name, value in pass_state().items() if name != shared},
    )


def prefills_that_are_given_up_are_counted(engine: CountingPrefill) -> Any:
    from sglang.srt.eplb.expert_distribution import get_global_expert_distribution_recorder

    recorder = get_global_expert_distribution_recorder()
    return patch.object(recorder, "with_forward_pass", recorder.with_forward_pass.args[1])


def plant(engine: CountingPrefill, defect: Callable[[CountingPrefill], Any]) -> None:
    vars(engine)["planted"] = defect(engine)
    vars(engine)["planted"].start()


def take_out(engine: CountingPrefill) -> None:
    """Let the engine be as it was before a defect was planted and caught."""
    vars(engine).pop("planted").stop()
    calm(engine)
    vars(engine.scheduler).pop("send_kv_chunk", None)
    engine.run()
    engine.assert_clean()
    dump(engine)


def play_until_caught(prefill: Remote) -> None:
    """Rounds, two by two: how soon a prefill that has started is given up is chance."""
    for first in range(500, 520, 2):
        prefill.call(play_rounds, 2, first)


@pytest.mark.parametrize("defect", [counts_are_not_saved, prefills_that_are_given_up_are_counted])
def test_a_defect_is_caught(prefill: Remote, defect: Callable[[CountingPrefill], Any]) -> None:
    prefill.call(plant, defect)
    with pytest.raises(AssertionError, match=r"not as transformers routes it|passes are counted") as caught:
        play_until_caught(prefill)
    print(str(caught.value)[:300])
    prefill.call(take_out)
