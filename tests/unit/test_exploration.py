"""Exploration: which shape is run while there is nothing to do, that nothing is held up by it, and what is learned.

The hub, its executor and the exploring are real; the engine and the device are simulated, in virtual time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("sglang")

from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.profiling import make_design
from sgl_flowprefill.runtime.exploration import HOUR_S, QUIET_S, REST_S, Explorer
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.exploration import Candidates
from sgl_flowprefill.ttft.features import Array, features
from sgl_flowprefill.ttft.learning import REFIT_TASKS
from sgl_flowprefill.ttft.reservoir import NUMBER, OF_PROFILE, Row
from tests.simulated_device import (
    HostCosts,
    Model,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedRequest,
    SimulatedServer,
)
from tests.unit.test_ttft_learning import FITTED, PROFILE, LearnsAtOnce, cost_s, profiled

Batch = tuple[PrefillShape, ...]
LAYERS = 8
MODEL = Model(LAYERS, attention_s=lambda tokens: 1e-4 + 6e-6 * tokens, mlp_s=lambda tokens: 1e-4 + 6e-6 * tokens)
SHARE = 0.01


# ---- which shape ----------------------------------------------------------------------------------------------------


def test_the_shape_of_which_least_is_known_is_taken() -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    many, few, odd = (PrefillShape(600),), (PrefillShape(5000),), (PrefillShape(100, 900),)
    rng = random.Random(0)
    for number in range(60):
        for shape, spread in ((many, 0.02), (odd, 0.3)):
            ttft.observe(shape, cost_s(shape) * math.exp(rng.gauss(0, spread)))
        ttft.journal.reservoir.add(Row(*features(many), cost_s(many), 1.0, float(1000 + number)))
    seen = {shape: ttft.journal.reservoir.alike(*features(shape)[:3]) for shape in (many, few, odd)}
    assert seen[few] < seen[many]
    assert ttft.uncertainty(odd) > 5 * ttft.uncertainty(many)
    assert Candidates([many, few]).take(ttft, lambda shape: True) == few
    assert Candidates([many, odd]).take(ttft, lambda shape: True) == odd


@given(st.sets(st.integers(0, 30)), st.integers(1, 40))
def test_nothing_is_taken_that_may_not_run(allowed: set[int], turns: int) -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    shapes = [(PrefillShape(16 + 100 * index),) for index in range(31)]
    candidates = Candidates(shapes)
    may_run = {shapes[index] for index in allowed}
    for _ in range(turns):
        taken = candidates.take(ttft, may_run.__contains__)
        assert taken in may_run if may_run else taken is None


def test_shapes_that_are_given_up_each_time_bar_no_others() -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    alike = [(PrefillShape(1500 + 10 * index),) for index in range(8)]
    candidates = Candidates(alike)
    assert {candidates.take(ttft, lambda shape: True) for _ in alike} == set(alike)


# ---- what is learned -------------------------------------------------------------------------------------------------


def test_what_was_explored_tells_of_the_shape_and_nothing_of_the_machine() -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    shape, usual = [PrefillShape(200, 3000)], [PrefillShape(800)]
    before, correction = ttft.predict(shape), ttft.correction
    beside = ttft.predict(usual)
    for _ in range(40):
        ttft.explored(shape, 3 * 1.3 * before.raw_s, 1.3)  # the machine is slower by 1.3, the model wrong by three
    assert ttft.correction == correction
    assert ttft.predict(usual) == beside
    assert ttft.predict(shape).expected_s == pytest.approx(3 * before.raw_s, rel=0.01)
    ttft.observe(shape, 3 * before.raw_s)
    assert ttft.predict(usual) == beside, "nor does the first request of that size, which takes what was explored"
    assert ttft.predict(shape).expected_s == pytest.approx(3 * before.raw_s, rel=0.01)
    rows = ttft.journal.reservoir.rows[-20:]
    assert rows[:, 5] == pytest.approx(1.3)
    assert ttft.journal.explored_rows > 30, "believed when it had come again"


def test_how_slow_the_machine_is_comes_from_the_reference() -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    reference = [PrefillShape(256)]
    assert ttft.slowness(reference, 1.7 * ttft.predict(reference).raw_s) == pytest.approx(1.7)
    for _ in range(40):  # of that size, all take a tenth longer; of other sizes, they do not
        ttft.observe([PrefillShape(300)], 1.1 * ttft.predict([PrefillShape(300)]).raw_s)
        ttft.observe([PrefillShape(5000)], ttft.predict([PrefillShape(5000)]).raw_s)
        ttft.observe([PrefillShape(2000)], ttft.predict([PrefillShape(2000)]).raw_s)
    assert ttft.slowness([PrefillShape(300)], 1.1 * ttft.predict([PrefillShape(300)]).raw_s) == pytest.approx(
        1, rel=0.02
    )


def test_one_absurd_measurement_is_no_row_and_changes_no_prediction() -> None:
    ttft = LearnsAtOnce(False, FITTED, PROFILE)
    shape = [PrefillShape(200, 3000)]
    before, rows = ttft.predict(shape), len(ttft.journal.reservoir)
    ttft.explored(shape, 1000 * before.raw_s, 1.0)
    assert len(ttft.journal.reservoir) == rows
    assert ttft.journal.refused == 1
    assert ttft.predict(shape).expected_s == pytest.approx(before.expected_s, rel=0.05)


def test_explored_rows_lead_to_a_refit() -> None:
    ttft = LearnsAtOnce(True, FITTED, PROFILE)
    shape = [PrefillShape(200, 3000)]
    for _ in range(REFIT_TASKS):
        ttft.explored(shape, ttft.predict(shape).raw_s, 1.0)
    assert ttft.asked == [REFIT_TASKS]


# ---- running it -----------------------------------------------------------------------------------------------------


class ExploringEngine(SimulatedEngine):
    """The simulated engine, which makes batches that nobody asked for, too."""

    limit_tokens = 4096

    def __init__(self, device: SimulatedDevice, requests: Sequence[SimulatedRequest], end_s: float) -> None:
        super().__init__(device, MODEL, requests)
        self.end_s = end_s
        self.room_tokens = 10_000
        self.cached_tokens = 0
        self.match_s = self.free_s = 0.0
        """What it takes to look for the prefix of one of 16 prompts, and to free a batch."""
        self.is_there = True
        self.held: list[Any] = []
        self.made: list[tuple[float, Batch]] = []
        """When which shapes were begun."""
        self.looks: list[int] = []
        """How many prompts were looked at each time."""
        self.fails = False
        self._owned: dict[int, Any] = {}

    @property
    def is_exiting(self) -> bool:  # type: ignore[override]
        return not self.requests_to_come and self.device.now_s >= self.end_s

    def forward(self, batch: list[SimulatedRequest]) -> Any:
        self._owned[id(batch)] = self.model_runner.attn_backend
        if self.fails:
            raise RuntimeError("no such kernel")
        return super().forward(batch)

    def can_run(self) -> bool:
        return self.is_there

    def find_prefix(self, interrupted: Callable[[], bool]) -> int:
        self.looks.append(0)
        for _ in range(16):
            if interrupted():
                break
            self.looks[-1] += 1
            self.device.now_s += self.match_s
        return self.cached_tokens

    def has_room(self, requests: int, new_tokens: int) -> bool:
        return new_tokens <= self.room_tokens

    def make_batch(self, made_of: Any) -> Any:
        if not isinstance(made_of, tuple):
            assert self.held == [], "a request starts beside what nobody asked for"
            return super().make_batch(made_of)
        self.device.now_s += self.device.costs.admission_s
        self.made.append((self.device.now_s, made_of))
        self.held.append([SimulatedRequest("nobody's", 0.0, shape.new_tokens, math.inf) for shape in made_of])
        return self.held[-1]

    def free(self, batch: Any) -> None:
        self.device.now_s += self.free_s
        self.held = [held for held in self.held if held is not batch]
        backend = self._owned.pop(id(batch), None)
        if backend is not None:
            backend.owner = None


class SleepsTillNext:
    """Arrivals, at their times; a sleep lasts until the next."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self.pending = engine.has_arrivals

    def clear(self) -> None:
        pass

    def sleep(self, timeout_s: float) -> bool:
        device, to_come = self._engine.device, self._engine.requests_to_come
        next_s = to_come[0].arrival_s if to_come else math.inf
        device.now_s = max(device.now_s, min(device.now_s + timeout_s, next_s))
        return self.pending()


class Exploring(SimulatedServer):
    """A server that explores when it has nothing to do."""

    def __init__(
        self, requests: Sequence[SimulatedRequest], end_s: float, lookahead: int = 2, share: float = SHARE
    ) -> None:
        device = SimulatedDevice(lookahead, HostCosts())
        self.exploring = ExploringEngine(device, requests, end_s)
        super().__init__(device, MODEL, requests, engine=self.exploring)
        fitted, rows = profiled(lambda batch: MODEL.forward_s(sum(shape.new_tokens for shape in batch)))
        self.ttft = LearnsAtOnce(False, fitted, rows)
        hub = self.hub
        hub.events = SleepsTillNext(self.exploring)
        self.cost_s: list[float] = []
        self.recorder.explored = self.cost_s.append  # type: ignore[method-assign]
        self.explorer = hub.exploration = Explorer(
            self.exploring,
            hub.executor,
            hub.slots,
            device,
            self.ttft,
            self.recorder,
            hub.agreement,
            hub.has_news,
            share,
            now_s=lambda: device.now_s,
        )
        self.forwards: list[Any] = []
        """The greenlets of what ran and nobody asked for."""
        run = hub.executor.run

        def noted_run(task: Any, forward: Any) -> None:
            run(task, forward)
            if not task.members:
                self.forwards.append(task.suspended_forward.greenlet)

        hub.executor.run = noted_run  # type: ignore[method-assign]
        self.begun_s: list[float] = []
        """When explorations began."""
        explore = self.explorer.explore

        def noted(*arguments: Any) -> bool:
            begin_s = device.now_s
            ran = explore(*arguments)
            self.begun_s += [begin_s] * ran
            return ran

        self.explorer.explore = noted  # type: ignore[method-assign]

    def explored_rows(self) -> Array:
        rows = self.ttft.journal.reservoir.rows
        return np.asarray(rows[rows[:, NUMBER] > OF_PROFILE])

    def serve(self) -> Exploring:
        self.hub.serve()
        assert self.exploring.held == []
        assert all(forward.dead for forward in self.forwards), "a forward pass was left suspended"
        assert self.hub.slots.is_free(self.exploring.model_runner.attn_backend)
        return self


def test_an_idle_server_explores_for_its_share_of_the_time() -> None:
    server = Exploring([], end_s=2 * HOUR_S).serve()
    state = server.explorer.state()
    assert state["explored"] > 100
    assert state["given_up"] == 0
    assert state["seconds"] == pytest.approx(sum(server.cost_s), abs=1e-3)
    assert state["seconds"] <= SHARE * 2 * HOUR_S
    assert state["seconds"] > SHARE * 2 * HOUR_S / 4, "sleeps last seconds, and rests begin with their ends"
    assert server.exploring.made[0][0] >= REST_S
    uncached = {shape for shape in make_design(4096) if not any(request.cached_tokens for request in shape)}
    assert {shape for _, shape in server.exploring.made} == uncached
    assert server.ttft.journal.explored_rows == state["explored"]
    assert server.recorder.turns == [], "no task was seen"


def test_what_was_explored_is_measured_as_a_task_is() -> None:
    server = Exploring([], end_s=HOUR_S).serve()
    own = server.explored_rows()
    assert len(own) > 50
    expected_s = [MODEL.forward_s(int(tokens)) for tokens in own[:, 1]]
    assert own[:, 4] == pytest.approx(expected_s, rel=0.2)
    assert own[:, 5] == pytest.approx(1.0, rel=0.05)


def test_a_machine_that_is_slower_meanwhile_is_known_by_the_references() -> None:
    server = Exploring([], end_s=HOUR_S)
    server.exploring.model = Model(
        LAYERS, lambda tokens: 1.5 * MODEL.attention_s(tokens), lambda tokens: 1.5 * MODEL.mlp_s(tokens)
    )
    own = server.serve().explored_rows()
    assert len(own) > 30
    assert own[:, 5] == pytest.approx(1.5, rel=0.05)
    shape = [PrefillShape(2000)]
    assert server.ttft.predict(shape).expected_s == pytest.approx(MODEL.forward_s(2000), rel=0.1), "as it usually is"


def busy(seed: int, count: int = 150) -> list[SimulatedRequest]:
    """Requests with pauses between them in which a server explores."""
    rng = random.Random(seed)
    now_s, requests = REST_S, []
    for number in range(count):
        now_s += rng.choice([0.001, 0.3, QUIET_S + 2.1, QUIET_S + rng.random() * 6])
        requests.append(SimulatedRequest(str(number), now_s, rng.choice([30, 300, 3000]), 5.0))
    return requests


@pytest.mark.parametrize("lookahead", [0, 2])
@pytest.mark.parametrize("seed", range(4))
def test_an_arrival_waits_no_longer_than_for_a_task(lookahead: int, seed: int) -> None:
    requests = busy(seed)
    server = Exploring(requests, requests[-1].arrival_s + 10, lookahead, share=0.5).serve()
    state = server.explorer.state()
    assert state["given_up"] >= 5
    operators = server.device.operators
    asked_for = {id(request) for request in requests}
    nobodys = [o for o in operators if o.label is not None and id(o.label[0][0]) not in asked_for]
    longest_s = max(MODEL.attention_s(4096), MODEL.mlp_s(4096))
    for request in requests:
        late = [o for o in nobodys if request.arrival_s < o.end_s and o.start_s < request.answered_s]
        # What was queued by then, and the operator that was being queued.
        assert len(late) <= lookahead + 2
        assert all(o.start_s < request.arrival_s + (lookahead + 2) * longest_s for o in late)
    assert all(request.answered_s < math.inf for request in requests)
    for begun_s in server.begun_s:
        last_s = max((request.answered_s for request in requests if request.answered_s < begun_s), default=0.0)
        assert begun_s - last_s > QUIET_S - 0.1


@pytest.mark.parametrize(("step", "batches"), [("match_s", 0), ("free_s", 1)])
def test_an_arrival_while_a_shape_is_looked_for_or_made_lets_no_batch_begin(step: str, batches: int) -> None:
    begun_s = Exploring([], end_s=REST_S + 30).serve().begun_s[0]
    request = SimulatedRequest("early", begun_s + 1.2, 300, 5.0)
    server = Exploring([request], end_s=begun_s + 30)
    setattr(server.exploring, step, 2.0)  # of each prompt, or behind the reference
    server.serve()
    assert server.begun_s == [begun_s]
    assert len(server.exploring.made) == batches
    assert (server.explorer.state()["explored"], server.explorer.state()["given_up"]) == (0, 1)
    assert request.answered_s < begun_s + 2.0 + 2 * MODEL.forward_s(1024) + 2 * MODEL.forward_s(300)


def test_requests_are_served_as_without_exploration() -> None:
    without, explored = busy(7), busy(7)
    Exploring(without, without[-1].arrival_s + 10, share=1e-9).serve()
    server = Exploring(explored, explored[-1].arrival_s + 10, share=0.5).serve()
    assert server.explorer.state()["explored"] > 10
    latest_s = max(b.answered_s - a.answered_s for a, b in zip(without, explored, strict=True))
    assert latest_s < 4 * MODEL.mlp_s(4096)


@pytest.mark.parametrize(
    ("hinder", "shapes"),
    [
        pytest.param(lambda engine: setattr(engine, "is_there", False), 0, id="weights or KV cache are gone"),
        pytest.param(lambda engine: setattr(engine, "room_tokens", 10), 0, id="no KV cache is free"),
        pytest.param(lambda engine: setattr(engine, "rest", lambda: False), 0, id="it waits for others"),
    ],
)
def test_nothing_is_explored_where_it_cannot_be(hinder: Callable[[ExploringEngine], None], shapes: int) -> None:
    server = Exploring([], end_s=HOUR_S)
    hinder(server.exploring)
    server.serve()
    assert len(server.exploring.made) == shapes
    assert server.explorer.state()["seconds"] == 0


@pytest.mark.parametrize("room_tokens", [256, 800, 1024])
def test_neither_shapes_nor_references_take_more_kv_cache_than_is_free(room_tokens: int) -> None:
    server = Exploring([], end_s=HOUR_S)
    server.exploring.room_tokens = room_tokens
    server.serve()
    assert server.exploring.made
    assert max(sum(request.new_tokens for request in shape) for _, shape in server.exploring.made) <= room_tokens


def test_shapes_fit_free_kv_cache_the_cached_prefix_and_the_budget() -> None:
    server = Exploring([], end_s=20 * HOUR_S, share=1e-4)
    server.exploring.room_tokens = 2000
    server.exploring.cached_tokens = 500
    server.serve()
    shapes = [shape for _, shape in server.exploring.made]
    assert any(request.cached_tokens for shape in shapes for request in shape)
    for shape in shapes:
        assert sum(request.new_tokens for request in shape) <= 2000
        assert max(request.cached_tokens for request in shape) <= 500
        assert MODEL.forward_s(sum(request.new_tokens for request in shape)) < 1.2e-4 * HOUR_S


def test_a_shape_that_fails_ends_exploration_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    requests = [SimulatedRequest("after", REST_S + 100, 300, 5.0)]
    server = Exploring(requests, end_s=HOUR_S)
    server.exploring.fails = True
    explore = server.explorer.explore

    def explored(*arguments: Any) -> bool:
        ran = explore(*arguments)
        server.exploring.fails = server.exploring.fails and not ran
        return ran

    server.explorer.explore = explored  # type: ignore[method-assign]
    server.serve()
    assert len(server.exploring.made) == 1
    assert server.explorer.state()["share"] == 0
    assert caplog.text.count("explores no shapes any more") == 1
    assert "no such kernel" in caplog.text
    assert requests[0].answered_s < math.inf


# ---- ranks ----------------------------------------------------------------------------------------------------------


class Says(OneRank):
    """The agreement of the rank that decides. Keeps what it says, and where it says that a batch failed."""

    def __init__(self, news: Callable[[], bool]) -> None:
        super().__init__(news)
        self.said: list[tuple[Sequence[int], int]] = []

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        self.said.append((values, failed_at))
        return values


class Hears(OneRank):
    """The agreement of another rank, which is told what was ``said``; StopIteration when that is all."""

    decides = False

    def __init__(self, said: Sequence[tuple[Sequence[int], int]]) -> None:
        super().__init__(lambda: False)
        self._said = iter(said)

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        said, others_failed_at = next(self._said)
        assert failed_at == others_failed_at
        return said


def as_another_rank(said: Sequence[tuple[Sequence[int], int]], fails: bool) -> Exploring:
    """What a rank does that is told what was ``said``."""
    server = Exploring([], end_s=HOUR_S)
    server.exploring.fails = fails
    server.explorer = replace(server.explorer, ttft=None, agreement=Hears(said))
    with suppress(StopIteration):
        while True:
            server.explorer.explore(0.0, server.hub.forward)
    assert server.exploring.held == []
    return server


@pytest.mark.parametrize("fails", [False, True])
def test_other_ranks_look_at_the_same_prompts_and_run_the_same_shapes(fails: bool) -> None:
    first, rng = Exploring([], end_s=REST_S + 1000, share=0.5), random.Random(0)
    agreement = first.explorer.agreement = Says(first.hub.has_news)
    first.explorer.pending = lambda: rng.random() < 0.03  # anywhere but within a batch
    first.exploring.fails = fails
    first.serve()
    other = as_another_rank(agreement.said, fails)
    assert [shape for _, shape in other.exploring.made] == [shape for _, shape in first.exploring.made]
    # Where it is not due, the first one looks at nothing at all.
    assert [looks for looks in other.exploring.looks if looks] == [looks for looks in first.exploring.looks if looks]
    ours, theirs = first.explorer.state(), other.explorer.state()
    for key in ("explored", "given_up"):
        assert ours[key] == theirs[key]
    assert sum(place > 0 for _, place in agreement.said) == fails
    if fails:
        assert (ours["explored"], ours["share"], theirs["share"]) == (0, 0, 0)
    else:
        assert ours["explored"] > 20
        assert len(first.explored_rows()) > len(other.explored_rows()) == 0, "one learns"
        assert len(set(first.exploring.looks)) > 5, "none ended between two prompts"
