"""The phases of ``launch.py gpu-report`` on an engine of known times: each finds what is there, and what is wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("sglang")

from sgl_flowprefill.gpu_report.engine import First
from sgl_flowprefill.gpu_report.phases import blocking, checks, cost, lookahead, tiles, tokens
from sgl_flowprefill.gpu_report.phases.base import Budget, Outcome, Request
from sgl_flowprefill.runtime.selfcheck import Finding
from sgl_flowprefill.runtime.tiles import WHOLE, Tiles

OPERATOR_S = 2e-3
OPERATORS = 6


class KnownEngine:
    """Prefills that take as long as they are told to; arrivals are noticed between operators."""

    on_card = True
    layers = 2
    limit_tokens = 10_000
    max_blocking_s = 5e-3
    default_lookahead = 2
    setting = SimpleNamespace(attention_backend="known")

    def __init__(self) -> None:
        self.tiles = Tiles(64, 64, 64, 1e6)
        self.ahead = self.default_lookahead
        self.times_s: Callable[[KnownEngine, int, bool], float] = lambda engine, tokens, checkpoints: 0.01
        self.wrong_under_preemption = self.wrong_in_tiles = 0.0
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

    # ---- tasks that run ----

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
    found = last(blocking.measure, engine, tmp_path)
    assert found.figures["left_out_tokens"] == [8192]
    assert "no time for 8,192" in found.line


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


def test_shorter_tiles_are_weighed_against_their_cost(engine: KnownEngine, tmp_path: Path) -> None:
    engine.times_s = lambda engine, length, checkpoints: (
        0.1 * (1 + (0 if engine.tiles == WHOLE else 5 / engine.tiles.rows))
    )
    found = last(tiles.measure, engine, tmp_path)
    costs = {row["length_ms"]: row["cost"] for row in found.figures["rows"]}
    assert costs == pytest.approx({2.0: 0.025, 5.0: 0.01, 10.0: 0.005, 20.0: 0.0025})


def test_one_check_that_fails_fails_the_phase_and_its_figures_are_shown(engine: KnownEngine, tmp_path: Path) -> None:
    found = last(checks.measure, engine, tmp_path, budget_s=10.0)
    assert (found.state, found.line) == ("FAILED", "known: 2 of 3 checks passed")
    assert ("tokens under preemption", "FAIL", "7 of 8 the same") in found.rows


def test_without_time_left_no_further_check_is_begun(engine: KnownEngine, tmp_path: Path) -> None:
    line = last(checks.measure, engine, tmp_path).line
    assert line == "known: 1 of 1 checks passed, for more the time did not do"
