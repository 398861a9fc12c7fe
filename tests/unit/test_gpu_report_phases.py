"""The phases of ``launch.py gpu-report`` on an engine of known times: each finds what is there, and what is wrong."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, Final

import pytest
import torch

pytest.importorskip("sglang")

from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi
from sgl_flowprefill.bench.systems.catalog import SYSTEMS
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.gpu_report.engine import Decoded, First, Held, Step
from sgl_flowprefill.gpu_report.phases import (
    UNIFIED_GOODPUT,
    blocking,
    checks,
    cost,
    goodput,
    lookahead,
    memory,
    steps,
    tiles,
    tokens,
)
from sgl_flowprefill.gpu_report.phases.base import Budget, Outcome, Request
from sgl_flowprefill.profiling import Profile, Row, Setting, write_profile
from sgl_flowprefill.runtime.selfcheck import Finding, Tasks
from sgl_flowprefill.runtime.tiles import WHOLE, Tiles
from sgl_flowprefill.ttft import PrefillShape
from tests.http_server import answering

OPERATOR_S = 2e-3
OPERATORS = 6
STEP_S = 4e-3
STEP_COSTS = {"fixed_s": 4e-3, "per_request_s": 1e-4, "per_token_s": 1e-8}


class KnownEngine:
    """Prefills that take as long as they are told to; arrivals are noticed between operators."""

    is_gpu = True
    layers = 2
    limit_tokens = 10_000
    default_lookahead = 2
    blocking_limit_s = 3 * 5e-3 + 1e-3
    setting = SimpleNamespace(attention_backend="known")

    def __init__(self) -> None:
        self.tiles = Tiles(64, 64, 64, 1e6)
        self.ahead = self.default_lookahead
        self.times_s: Callable[[KnownEngine, int, bool], float] = lambda engine, tokens, checkpoints: 0.01
        self.wrong_under_preemption = self.wrong_in_tiles = self.wrong_under_steps = 0.0
        self.wrong_tokens = 0
        """Tokens of streams that prefills beside them change."""
        self.step_s = STEP_S
        self.step_late_s = 0.0
        """By how much later a step begins for a prefill beside it."""
        self.step_spread_s = 0.0
        """By how much longer some steps take with nothing beside them."""
        self.decoded: list[tuple[int, int, int, float | None]] = []
        self._interrupted: Callable[[], bool] = lambda: False

    def describe(self) -> dict[str, Any]:
        return {"layers": self.layers}

    def checkpoint_s(self) -> float:
        return 1e-6

    def prompt(self, tokens: int) -> list[int]:
        return list(range(min(tokens, self.limit_tokens)))

    def points(self, prompt: Sequence[int]) -> int:
        return OPERATORS

    def forward_s(self, prompt: Sequence[int], *, checkpoints: bool = True) -> float:
        return self.times_s(self, len(prompt), checkpoints)

    def device_s(self, prompt: Sequence[int], behind_spin: bool = False) -> float:
        return self.times_s(self, len(prompt), not behind_spin)

    def waits(self, prompt: Sequence[int]) -> list[str]:
        return ["attention.py:7"]

    held_share = 1.0
    """Of what is counted for a suspended prefill in tiles, what it holds."""
    ooms = 0

    def held(self, prompt: Sequence[int]) -> Held:
        counted = 1000 * len(prompt)
        share = 1.0 if self.tiles == WHOLE else self.held_share
        return Held(OPERATORS, round(share * counted), counted, counted, 2 * counted)

    def tries(self) -> dict[str, int]:
        return {"num_alloc_retries": 0, "num_ooms": self.ooms}

    # ---- what is found ----

    def _first(self, prompt: Sequence[int], error: float = 0.0) -> First:
        logits = torch.randn(1000, generator=torch.Generator().manual_seed(len(prompt)))
        logits = logits + error * torch.randn(1000, generator=torch.Generator().manual_seed(1))
        return First(int(logits.argmax()), logits)

    def alone(self, prompt: Sequence[int]) -> First:
        assert self.tiles == WHOLE
        return self._first(prompt)

    def together(self, prompts: Sequence[Sequence[int]]) -> list[First]:
        return [self._first(prompt, 1e-3) for prompt in prompts]

    def nested(
        self, prompts: Sequence[Sequence[int]], rng: random.Random, probability: float
    ) -> tuple[list[First], int, int]:
        wrong = self.wrong_under_preemption if self.tiles == WHOLE else self.wrong_in_tiles
        return [self._first(prompt, wrong) for prompt in prompts], 10 * len(prompts), len(prompts)

    def findings(self) -> Iterator[Finding]:
        yield Finding("attention slots", True, "0 MiB")
        yield Finding("tokens under preemption", False, "7 of 8 the same")
        yield Finding("blocking", True, "1 ms")

    # ---- decode steps ----

    has_decode_graphs = True
    has_steps_ahead = False
    wrong_ahead = 0
    """Tokens of streams that are others where steps are queued ahead."""

    def step_costs(self) -> dict[str, float]:
        return STEP_COSTS

    def step_is_due(self) -> bool:
        return True

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        answer_tokens: int,
        beside: Sequence[int] = (),
        interrupted: Callable[[], bool] = lambda: False,
        tbt_slo_s: float | None = None,
        ahead: bool = False,
    ) -> Decoded:
        self.decoded.append((len(prompts), answer_tokens, len(beside), tbt_slo_s))
        found = Decoded([[stream + place for place in range(answer_tokens)] for stream in range(len(prompts))])
        if beside:
            found.firsts.append(self._first(beside, self.wrong_under_steps))
            for place in range(self.wrong_tokens):
                found.answers[0][-1 - place] = -1
        for place in range(self.wrong_ahead if ahead else 0):
            found.answers[0][-1 - place] = -1
        for number in range(1, answer_tokens):
            due_s = number * (tbt_slo_s or self.step_s) - self.step_s
            begin_s = due_s + (self.step_late_s if beside and number % 2 else 0.0)
            spread_s = self.step_spread_s if not beside and number % 10 == 0 else 0.0
            step_s = self.step_s / 2 if ahead else self.step_s + spread_s
            found.steps.append(Step(due_s, begin_s, begin_s + step_s))
        return found

    # ---- tasks that run ----

    blocking = Tasks.blocking

    def start(self, prompt: list[int]) -> SimpleNamespace:
        return SimpleNamespace(done=False, left=OPERATORS)

    def resume(self, task: SimpleNamespace) -> None:
        while task.left:
            time.sleep(OPERATOR_S * (4 if self.tiles == WHOLE else 1))
            task.left -= 1
            if task.left and self._interrupted():
                return
        task.done = True

    def finish(self, task: SimpleNamespace) -> int:
        return 0

    def synchronize(self) -> None:
        pass

    @contextmanager
    def interrupted_by(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        self._interrupted = interrupted
        yield

    # ---- settings ----

    @contextmanager
    def lookahead(self, operators: int) -> Iterator[None]:
        usual, self.ahead = self.ahead, operators
        yield
        self.ahead = usual

    @contextmanager
    def in_tiles(self, tiles: Tiles) -> Iterator[None]:
        usual, self.tiles = self.tiles, tiles
        yield
        self.tiles = usual

    def whole(self) -> Any:
        return self.in_tiles(WHOLE)

    def planned_tiles(self, max_blocking_s: float) -> Tiles:
        rows = int(max_blocking_s * 1e5)
        return Tiles(rows, rows, rows, 1e9 * max_blocking_s)


@pytest.fixture
def engine() -> KnownEngine:
    return KnownEngine()


def last(
    measure: Callable[..., Iterator[Outcome]], engine: KnownEngine, tmp_path: Path, budget_s: float = 0.0
) -> Outcome:
    """What a phase has found at its end."""
    *_, outcome = measure(engine, Request("phase", tmp_path, Budget(budget_s), ()))
    assert all(len(row) == len(outcome.columns) for row in outcome.rows)
    return outcome


def test_the_same_tokens_and_logits_pass(engine: KnownEngine, tmp_path: Path) -> None:
    found = last(tokens.measure, engine, tmp_path)
    assert found.state == "passed"
    assert found.figures["compared"] == found.figures["same"] == 2 * tokens.PROMPTS
    assert 0 < found.figures["rounding"] < 0.01


@pytest.mark.parametrize("where", ["wrong_under_preemption", "wrong_in_tiles"])
@pytest.mark.parametrize("error", [0.02, 1.0])
def test_logits_that_differ_by_more_than_rounding_fail(
    where: str, error: float, engine: KnownEngine, tmp_path: Path
) -> None:
    setattr(engine, where, error)
    assert last(tokens.measure, engine, tmp_path).state == "FAILED"


def test_logits_that_differ_by_rounding_pass(engine: KnownEngine, tmp_path: Path) -> None:
    engine.wrong_in_tiles = 2e-3
    found = last(tokens.measure, engine, tmp_path)
    assert found.state == "passed"
    assert found.figures["rows"][1]["difference"] > 1e-3


def test_the_costs_of_checkpoints_and_of_tiles_are_told_apart(engine: KnownEngine, tmp_path: Path) -> None:
    def times_s(engine: KnownEngine, length: int, checkpoints: bool) -> float:
        return 0.1 * (1.01 if checkpoints else 1.0) * (1.0 if engine.tiles == WHOLE else 1.05)

    engine.times_s = times_s
    found = last(cost.measure, engine, tmp_path, budget_s=60.0)
    assert found.state == "passed"
    assert [row["tokens"] for row in found.figures["rows"]] == [512, 2048, 8192]
    for row in found.figures["rows"]:
        assert row["checkpoints_cost"] == pytest.approx(0.01)
        assert row["tiles_cost"] == pytest.approx(1.01 * 1.05 - 1)
        assert row["rounds"] >= cost.LEAST_ROUNDS


@pytest.mark.parametrize(("slow_tokens", "state"), [(512, "passed"), (8192, "FAILED")])
def test_checkpoints_may_cost_more_of_the_shortest_prefills_only(
    slow_tokens: int, state: str, engine: KnownEngine, tmp_path: Path
) -> None:
    engine.times_s = lambda engine, length, checkpoints: 0.1 * (1.03 if checkpoints and length == slow_tokens else 1.0)
    assert last(cost.measure, engine, tmp_path, budget_s=60.0).state == state


def test_the_cost_of_prefills_for_which_the_budget_does_not_do_is_not_measured(
    engine: KnownEngine, tmp_path: Path
) -> None:
    found = last(cost.measure, engine, tmp_path)
    assert [row["tokens"] for row in found.figures["rows"]] == [512, 2048]
    assert "no time for 8,192" in found.line


def test_blocking_is_the_time_to_the_end_of_the_operator_and_tiles_bound_it(
    engine: KnownEngine, tmp_path: Path
) -> None:
    engine.times_s = lambda engine, length, checkpoints: OPERATORS * OPERATOR_S * (4 if engine.tiles == WHOLE else 1)
    found = last(blocking.measure, engine, tmp_path, budget_s=1.0)
    rows = found.figures["rows"]
    assert [(row["tokens"], row["tiles"]) for row in rows[:2]] == [(2048, False), (2048, True)]
    assert all(row["samples"] >= blocking.LEAST_SAMPLES for row in rows)
    whole, tiled = rows[:2]
    assert OPERATOR_S * 1e3 < whole["p50_ms"] < 4 * OPERATOR_S * 1e3 + 5
    assert tiled["p50_ms"] < whole["p50_ms"]
    assert found.figures["limit_ms"] == pytest.approx(16.0)


def test_lengths_for_which_the_budget_does_not_do_are_named(engine: KnownEngine, tmp_path: Path) -> None:
    engine.limit_tokens = 50_000
    found = last(blocking.measure, engine, tmp_path)
    assert found.figures["left_out_tokens"] == [8192, 32_768, 131_071]
    assert "; no time for 8,192, 32,768; this engine has context and KV cache for 50,000 tokens" in found.line


MEASURED: Final = pytest.mark.parametrize("phase", [blocking, cost, lookahead, memory])
"""Phases that measure prompts of given lengths."""


@MEASURED
def test_lengths_for_which_the_engine_has_no_kv_cache_are_named(
    phase: ModuleType, engine: KnownEngine, tmp_path: Path
) -> None:
    engine.limit_tokens = 5000
    found = last(phase.measure, engine, tmp_path, budget_s=0.5)
    too_long = [tokens for tokens in phase.TOKENS if tokens > 5000]
    assert {row["tokens"] for row in found.figures["rows"]} == set(phase.TOKENS) - set(too_long)
    assert found.figures["left_out_tokens"] == too_long
    named = ", ".join(f"{tokens:,}" for tokens in too_long)
    assert found.line.endswith(f"; this engine has context and KV cache for 5,000 tokens, so without {named}")


@MEASURED
def test_a_phase_of_which_no_length_fits_is_left_out(phase: ModuleType, engine: KnownEngine, tmp_path: Path) -> None:
    engine.limit_tokens = 100
    found = last(phase.measure, engine, tmp_path)
    assert (found.state, found.figures) == ("left out", {"left_out_tokens": list(phase.TOKENS)})
    assert found.line.startswith("this engine has context and KV cache for 100 tokens")


@pytest.mark.parametrize(("needed", "state"), [(1, "passed"), (2, "passed"), (4, "FAILED")])
def test_a_device_that_idles_with_the_default_look_ahead_fails(
    needed: int, state: str, engine: KnownEngine, tmp_path: Path
) -> None:
    def times_s(engine: KnownEngine, length: int, checkpoints: bool) -> float:
        return 0.1 * (1.25 if checkpoints and engine.ahead < needed else 1.0)

    engine.times_s = times_s
    found = last(lookahead.measure, engine, tmp_path)
    assert found.state == state
    for row in found.figures["rows"]:
        for ahead, idle in row["idle"].items():
            assert idle == pytest.approx(0.2 if int(ahead) < needed else 0.0)
    assert found.figures["waits"] == ["attention.py:7"]
    assert "inside a prefill the host waits for the device 1 times (attention.py:7)" in found.line


@pytest.mark.parametrize(
    ("what", "value", "state"), [("held_share", 1.04, "passed"), ("held_share", 1.06, "FAILED"), ("ooms", 1, "FAILED")]
)
def test_prefills_that_hold_more_than_is_counted_fail(
    what: str, value: float, state: str, engine: KnownEngine, tmp_path: Path
) -> None:
    setattr(engine, what, value)
    found = last(memory.measure, engine, tmp_path)
    assert found.state == state
    assert [(row["tokens"], row["tiles"]) for row in found.figures["rows"]] == [
        (tokens, is_tiled) for tokens in (512, 4096) for is_tiled in (False, True)
    ]
    assert found.line.startswith(
        f"suspended prefills hold at most {max(1.0, engine.held_share):.0%} of what is counted"
    )


def test_shorter_tiles_are_weighed_against_their_cost(engine: KnownEngine, tmp_path: Path) -> None:
    engine.times_s = lambda engine, length, checkpoints: (
        0.1 * (1 + (0 if engine.tiles == WHOLE else 5 / engine.tiles.rows))
    )
    found = last(tiles.measure, engine, tmp_path)
    costs = {row["length_ms"]: row["cost"] for row in found.figures["rows"]}
    assert costs == pytest.approx({2.0: 0.025, 5.0: 0.01, 10.0: 0.005, 20.0: 0.0025})


def test_steps_that_change_nothing_and_end_in_time_pass(engine: KnownEngine, tmp_path: Path) -> None:
    engine.limit_tokens = 100_000
    engine.step_late_s = 3e-3
    found = last(steps.measure, engine, tmp_path, budget_s=30.0)
    assert found.state == "passed"
    assert found.figures["same"] == found.figures["compared"] == 16 * steps.CHECKED_TOKENS
    assert found.figures["step_costs"] == STEP_COSTS
    assert "CUDA graphs" in found.line
    alone, *timed = found.figures["rows"]
    assert alone["step"]["p50_ms"] == pytest.approx(1e3 * STEP_S)
    assert [row["objective_ms"] for row in timed] == pytest.approx([100.0, 50.0, 20.0])
    for row in timed:
        assert row["late"]["p99_ms"] == pytest.approx(3.0)
        assert row["gaps"]["p99_ms"] == pytest.approx(row["objective_ms"] + 3.0)
        assert row["gap_limit_ms"] == pytest.approx(row["objective_ms"] + 1e3 * STEP_S)
        assert row["gaps_kept"]
        assert 0.4 < row["in_time"] < 0.6  # every other step is late, and the next one early
    assert engine.decoded[0] == (16, steps.CHECKED_TOKENS, 0, None)
    assert [(beside, tbt_slo_s) for _, _, beside, tbt_slo_s in engine.decoded[2:]] == [
        (32_768, 0.1), (32_768, 0.05), (32_768, 0.02),
    ]  # fmt: skip


@pytest.mark.parametrize(("what", "value"), [("wrong_tokens", 1), ("wrong_under_steps", 0.02), ("step_late_s", 17e-3)])
def test_steps_that_change_a_token_or_a_logit_or_end_late_fail(
    what: str, value: float, engine: KnownEngine, tmp_path: Path
) -> None:
    setattr(engine, what, value)
    assert last(steps.measure, engine, tmp_path).state == "FAILED"


@pytest.mark.parametrize(("wrong", "state"), [(0, "passed"), (1, "FAILED")])
def test_steps_that_are_queued_ahead_are_shown_and_have_to_give_the_same_tokens(
    wrong: int, state: str, engine: KnownEngine, tmp_path: Path
) -> None:
    engine.has_steps_ahead, engine.wrong_ahead = True, wrong
    found = last(steps.measure, engine, tmp_path)
    alone, ahead, *timed = found.figures["rows"]
    assert ahead["step"]["p50_ms"] == pytest.approx(alone["step"]["p50_ms"] / 2)
    assert len(timed) == 3
    assert found.figures["same_ahead"] == found.figures["compared"] - wrong
    assert "queued ahead" in found.line
    assert found.state == state


def test_gaps_longer_than_the_objective_and_one_step_fail(engine: KnownEngine, tmp_path: Path) -> None:
    """Also where each step ends as soon after it was due as a suspension may take."""
    engine.step_late_s = STEP_S + 1e-3
    found = last(steps.measure, engine, tmp_path)
    timed = found.figures["rows"][1:]
    assert all(row["late"]["p99_ms"] < found.figures["limit_ms"] for row in timed)
    assert not any(row["gaps_kept"] for row in timed)
    assert found.state == "FAILED"
    named = re.search(r"; gaps with (\d+) ms as objective are (.+) ms in p99, .* \((.+) ms, the objective", found.line)
    assert named is not None
    objective_ms, gap_ms, limit_ms = map(float, named.groups())
    assert (gap_ms - objective_ms, limit_ms - objective_ms) == (5.0, 4.0)


def test_what_steps_differ_by_themselves_is_not_the_prefills_fault(engine: KnownEngine, tmp_path: Path) -> None:
    engine.step_s, engine.step_late_s, engine.step_spread_s = 20e-3, 17e-3, 2e-3
    found = last(steps.measure, engine, tmp_path)
    assert found.figures["limit_ms"] == pytest.approx(18.0)
    assert found.state == "passed"


def test_there_are_as_many_streams_as_have_kv_cache_and_their_answers_fit_into_the_budget(
    engine: KnownEngine, tmp_path: Path
) -> None:
    engine.limit_tokens = 3 * (512 + steps.MOST_TOKENS)
    last(steps.measure, engine, tmp_path)
    assert [streams for streams, *_ in engine.decoded] == 5 * [3]
    assert [answer_tokens for _, answer_tokens, *_ in engine.decoded[2:]] == 3 * [steps.LEAST_TOKENS]


def test_one_check_that_fails_fails_the_phase_and_its_figures_are_shown(engine: KnownEngine, tmp_path: Path) -> None:
    found = last(checks.measure, engine, tmp_path, budget_s=10.0)
    assert (found.state, found.line) == ("FAILED", "known: 2 of 3 checks passed")
    assert ("tokens under preemption", "FAIL", "7 of 8 the same") in found.rows


def test_without_time_left_no_further_check_is_begun(engine: KnownEngine, tmp_path: Path) -> None:
    line = last(checks.measure, engine, tmp_path).line
    assert line == "known: 1 of 1 checks passed, for more the time did not do"


# ---- servers, as they answer ----------------------------------------------------------------------------------------

TOKEN_S = 2e-5
TOKEN_BYTES = 5


class Turns:
    """A server's process: who is stopped while another is measured."""

    stopped: ClassVar[set[str]] = set()

    def __init__(self, name: str) -> None:
        self.name = name

    def suspend(self) -> None:
        self.stopped.add(self.name)

    def resume(self) -> None:
        self.stopped.discard(self.name)


@contextmanager
def lone(name: str, broken: bool = False) -> Iterator[goodput.MeasuredServer]:
    """A server that computes one prompt after the other, as long as the profile says; a stopped one answers nothing."""
    running = threading.Lock()
    answered = count()

    def answer(path: str, headers: Mapping[str, str]) -> tuple[int, str]:
        assert name not in Turns.stopped
        with running:
            time.sleep(TOKEN_S * int(headers["Content-Length"]) / TOKEN_BYTES)
        if broken and next(answered) > 2:
            return 500, "out of memory"
        tokens = (1, 5) if system.is_unified else (1,)
        events = [{"text": "a", "meta_info": {"completion_tokens": count}} for count in tokens]
        return 200, "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"

    system = SYSTEMS[name]
    with answering(answer) as url:
        client = Client(url, GenerateApi() if system.is_unified else goodput.PrefillOnlyApi())
        yield goodput.MeasuredServer(system, FlowPrefillConfig(), Turns(name), client, Path("/nowhere"))  # type: ignore[arg-type]


def written_profile(path: Path) -> dict[str, Any]:
    """A profile of prefills that take TOKEN_S a token, and what the operators' phase says of it."""
    setting = Setting(model="m", device="d", dtype="t", attention_backend="a", threads=1, sglang="0.5.23")
    profile = Profile(setting, 8192, complete=True)
    for length in (16, 64, 256, 1024, 4096, 8192):
        profile.rows.append(Row((PrefillShape(length),), 1e-3 + TOKEN_S * length, 0.0, 1, 0.0))
    write_profile(path / "profile.parquet", profile)
    return {"layers": 2, "complete": True, "profile": str(path / "profile.parquet")}


@pytest.mark.usefixtures("quick_replays")
@pytest.mark.parametrize("broken", [pytest.param(False, marks=pytest.mark.stress), True])
def test_systems_take_turns_on_the_same_requests(broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "SHORTEST_REPLAY_S", 0.7)
    monkeypatch.setattr(goodput, "SIMULATED_REQUESTS", 100)
    monkeypatch.setattr(goodput, "WAKE_S", 0.0)
    monkeypatch.setattr(Turns, "stopped", set())
    profile = written_profile(tmp_path)
    request = Request("goodput", tmp_path, Budget(0.0), ())
    with lone("flowprefill") as ours, lone("sglang", broken) as stock:
        *_, found = goodput.compare(request, [ours, stock], {"kv_tokens": 100_000}, profile)
    assert all(len(row) == len(found.columns) for row in found.rows)
    first, second = found.figures["rows"]
    assert (first["system"], second["system"]) == ("flowprefill", "sglang")
    assert first["requests"] == second["requests"] == found.figures["requests"] > 3
    assert first["failed"] == 0
    assert 0 < first["attainment"] <= 1
    assert first["preemptions"] == 0
    assert found.figures["time_scale"] == pytest.approx(0.25, rel=0.5)  # 2,048 tokens in 0.04 s, and 0.16 on an A800
    if broken:
        assert found.state == "FAILED"
        assert second["failed"] > 0
        assert "out of memory" in second["errors"][0]
    else:
        assert found.state == "measured"
        assert second["failed"] == 0


@pytest.mark.usefixtures("quick_replays")
def test_unified_servers_are_judged_by_the_gaps_between_tokens_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(goodput, "SHORTEST_REPLAY_S", 0.7)
    monkeypatch.setattr(goodput, "SIMULATED_REQUESTS", 100)
    monkeypatch.setattr(goodput, "WAKE_S", 0.0)
    monkeypatch.setattr(Turns, "stopped", set())
    profile = written_profile(tmp_path)
    request = Request(UNIFIED_GOODPUT, tmp_path, Budget(0.0), ())
    with lone("unified") as ours, lone("unified-sglang") as stock:
        *_, found = goodput.compare(request, [ours, stock], {"kv_tokens": 100_000}, profile, STEP_COSTS)
        trace = goodput.trace_at(found.figures["rate_rps"], found.figures["time_scale"], 1.0, 500.0)
        strict = replace(trace, requests=[replace(one, tbt_slo_s=0.0) for one in trace.requests])
        ours.server.resume()
        late = goodput.replayed(ours, strict, PromptBuilder(0), "gaps")
    assert found.state == "measured"
    assert all(len(row) == len(found.columns) for row in found.rows)
    assert found.figures["judge"] == "gaps"
    assert [row["system"] for row in found.figures["rows"]] == ["unified", "unified-sglang"]
    assert found.figures["answer_tokens"] > 1
    for row in found.figures["rows"]:
        assert row["failed"] == 0
        assert 0 < row["attainment"] <= 1
        assert 0 < row["simulated_attainment"] <= 1
        assert row["gaps"]["max_ms"] > 0
    assert late["attainment"] == 0 == late["failed"]


def test_without_times_of_decode_steps_unified_servers_are_not_compared(tmp_path: Path) -> None:
    written = {"figures": {**written_profile(tmp_path), "engine": {}}}
    (tmp_path / "phases").mkdir()
    (tmp_path / "phases" / "operators.json").write_text(json.dumps(written))
    [found] = goodput.measure(Request(UNIFIED_GOODPUT, tmp_path, Budget(0.0), ()))
    assert (found.state, found.line) == ("left out", "there are no times of decode steps to choose a rate by")
