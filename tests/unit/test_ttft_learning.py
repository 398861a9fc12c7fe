"""Learning while serving: which tasks become rows and stay, and when a refitted model takes over."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgl_flowprefill.bench.simulator.cost import CostModel
from sgl_flowprefill.bench.simulator.learned import LearnedTTFT
from sgl_flowprefill.profiling import make_design
from sgl_flowprefill.ttft import AdaptiveTTFT, PrefillShape
from sgl_flowprefill.ttft.boosted import BoostedTTFT, Fitted, fit_rows, train
from sgl_flowprefill.ttft.features import COUNT, Array, feature_matrix, features
from sgl_flowprefill.ttft.learning import REFIT_TASKS, Journal, RefittedTTFT, errors, needed, refit
from sgl_flowprefill.ttft.reservoir import (
    EXPLORED,
    NUMBER,
    OF_PROFILE,
    SLOWNESS,
    Reservoir,
    Row,
    cell,
    features_of,
    rows_of_profile,
)
from sgl_flowprefill.ttft.trees import Trees

Batch = tuple[PrefillShape, ...]
Cost = Callable[[Sequence[PrefillShape]], float]


def cost_s(batch: Sequence[PrefillShape], per_pair_s: float = 1.8e-8, per_cached_s: float = 2e-7) -> float:
    new = sum(request.new_tokens for request in batch)
    cached = sum(request.cached_tokens for request in batch)
    pairs = sum(request.new_tokens * (request.cached_tokens + request.new_tokens / 2) for request in batch)
    return 0.004 + 0.0006 * len(batch) + 9e-5 * new + per_pair_s * pairs + per_cached_s * cached


def slow_attention(batch: Sequence[PrefillShape]) -> float:
    """Another machine: attention takes three times as long, and so do cached tokens."""
    return cost_s(batch, per_pair_s=5.4e-8, per_cached_s=2e-5)


def profiled(cost: Cost, noise: float = 0.02, seed: int = 0) -> tuple[Fitted, Array]:
    """The model of a first start, and the rows of its profile."""
    rng = random.Random(seed)
    design = make_design(4096)
    seconds = np.array([cost(shape) * math.exp(rng.gauss(0, noise)) for shape in design])
    matrix = feature_matrix(design)
    return fit_rows(matrix, seconds), rows_of_profile(matrix, seconds)


FITTED, PROFILE = profiled(cost_s)


def tasks(count: int, seed: int = 0) -> list[Batch]:
    """What a server computes: mostly texts, some continued, now and then long, seldom several at once."""
    rng = random.Random(seed)
    found: list[Batch] = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.6:
            found.append((PrefillShape(rng.randint(60, 1100)),))
        elif kind < 0.8:
            found.append((PrefillShape(rng.randint(60, 900), rng.randint(100, 3000)),))
        elif kind < 0.97:
            found.append((PrefillShape(rng.randint(2000, 9000)),))
        else:
            found.append(tuple(PrefillShape(rng.randint(20, 60)) for _ in range(rng.randint(2, 4))))
    return found


class LearnsAtOnce(RefittedTTFT):
    """The TTFT model of a server whose refits take no time; of one that keeps the profile's, if it never ``learns``."""

    def __init__(self, learns: bool, fitted: Fitted, rows: Array) -> None:
        super().__init__(fitted, 0.75, Reservoir.of(rows))
        self.asked: list[int] = []
        """Tasks after which a refit was asked for."""
        self.adopted: list[int] = []
        self._learns = learns
        self._through = 0

    def may_refit(self, tasks: int) -> bool:
        return self._learns

    def ask_for_refit(self) -> None:
        self.asked.append(self.journal.number)
        found = refit(self.journal.reservoir.rows, self.model, self._through)
        if found is not None and found.is_better:
            assert found.challenger_error < found.champion_error
            self.adopted.append(self.journal.number)
            self._through = found.trained_through
            self.take_over(found.challenger)


class Server:
    """A server that learns. ``Server(False)`` keeps the profile's model."""

    def __init__(self, learns: bool = True, fitted: Fitted = FITTED, rows: Array = PROFILE) -> None:
        self.ttft = LearnsAtOnce(learns, fitted, rows)
        self.apes: list[float] = []

    @property
    def adopted(self) -> list[int]:
        """Tasks after which a model was adopted."""
        return self.ttft.adopted

    def run(self, batches: Sequence[Batch], cost: Cost, noise: float = 0.02, rng: random.Random | None = None) -> None:
        rng = rng or random.Random(0)
        for batch in batches:
            measured_s = cost(batch) * math.exp(rng.gauss(0, noise))
            prediction = self.ttft.observe(batch, measured_s)
            self.apes.append(abs(prediction.expected_s / measured_s - 1))


# ---- the reservoir --------------------------------------------------------------------------------------------------

rows_of_tasks = st.builds(
    lambda requests, new, cached, number: Row(
        float(requests), float(new), float(cached), new * (cached + new / 2), 0.1, 1.0, float(number)
    ),
    st.integers(1, 16),
    st.one_of(st.integers(200, 300), st.integers(1, 40_000)),
    st.one_of(st.just(0), st.integers(0, 40_000)),
    st.integers(1, 10_000),
)


@given(st.lists(rows_of_tasks, max_size=120), st.integers(1, 40))
def test_a_reservoir_is_bounded_and_keeps_what_is_rare(rows: list[Row], capacity: int) -> None:
    reservoir = Reservoir(capacity)
    for row in rows:
        reservoir.add(row)
    kept = [Row(*row) for row in reservoir.rows.tolist()]
    assert len(kept) == len(reservoir) == min(capacity, len(rows))
    given_of, kept_of = ({key: [] for key in {cell(*row[:3]) for row in rows}} for _ in range(2))  # type: ignore[var-annotated]
    for row in rows:
        given_of[cell(*row[:3])].append(row)
    for row in kept:
        kept_of[cell(*row[:3])].append(row)
    fullest = max((len(of) for of in kept_of.values()), default=0)
    for key, of in given_of.items():
        assert sorted(kept_of[key]) == sorted(of[len(of) - len(kept_of[key]) :]), "the newest of a cell stay"
        if len(kept_of[key]) < len(of):
            assert len(kept_of[key]) >= fullest - 1, "only of the fullest cells one goes"


def test_a_thousand_texts_do_not_push_out_the_only_long_prompt() -> None:
    reservoir = Reservoir(100)
    reservoir.add(Row(1.0, 30_000.0, 0.0, 4.5e8, 9.0, 1.0, 1.0))
    for number in range(1000):
        reservoir.add(Row(1.0, 300.0, 0.0, 45_000.0, 0.03, 1.0, float(number + 2)))
    rows = reservoir.rows
    assert rows[:, NUMBER].min() == 1
    assert sorted(rows[:, NUMBER])[1] == 1001 - 98


def test_a_reservoir_that_was_written_is_the_same_again() -> None:
    reservoir = Reservoir(50)
    for number, batch in enumerate(tasks(200)):
        reservoir.add(Row(*features(batch), 0.1, 1.0, float(number)))
    again = Reservoir.of(reservoir.rows, 50)
    assert sorted(again.rows.tolist()) == sorted(reservoir.rows.tolist())


# ---- which tasks are believed ---------------------------------------------------------------------------------------


@given(
    st.integers(0, 100),
    st.dictionaries(
        st.sampled_from(range(24, 190, 6)), st.one_of(st.floats(1e-9, 0.3), st.floats(3.0, 1e9)), max_size=8
    ),
)
@settings(max_examples=40)
def test_absurd_measurements_never_become_rows(seed: int, absurd: dict[int, float]) -> None:
    """A process that was stopped, a clock that has jumped: factors of a measurement, by the number of its task."""
    journal = Journal(Reservoir())
    rng = random.Random(seed)
    for number, batch in enumerate(tasks(200, seed), start=1):
        true_s = cost_s(batch)
        measured_s = true_s * math.exp(rng.gauss(0, 0.03)) * absurd.get(number, 1.0)
        journal.completed(batch, measured_s, true_s)
    numbers = set(journal.reservoir.rows[:, NUMBER].astype(int).tolist())
    assert not numbers & set(absurd)
    assert journal.refused == len(absurd)
    assert len(numbers) == 200 - 7 - len(absurd), "all others are, but the newest, whose machine is not known yet"


@pytest.mark.parametrize("measured_s", [0.0, -1.0, math.nan, math.inf])
def test_nonsense_is_refused(measured_s: float) -> None:
    journal = Journal(Reservoir())
    for batch in tasks(60):
        journal.completed(batch, measured_s, 0.1)
    assert len(journal.reservoir) == 0
    assert journal.refused == 60


def test_a_kind_that_the_model_is_wrong_about_is_believed_when_it_has_come_again() -> None:
    journal = Journal(Reservoir())
    for number, batch in enumerate(tasks(400, 3)):
        factor = 3.0 if batch[0].cached_tokens else 1.0
        journal.completed(batch, cost_s(batch) * factor * (1 + 0.01 * (number % 5)), cost_s(batch))
    rows = journal.reservoir.rows
    assert 3 <= journal.refused <= 12
    assert (rows[:, 2] > 0).sum() > 50


def test_a_machine_that_becomes_slower_and_faster_is_taken_out_of_the_rows() -> None:
    journal = Journal(Reservoir())
    for number, batch in enumerate(tasks(300)):
        journal.completed(batch, cost_s(batch) * (2.0 if number // 50 % 2 else 1.0), cost_s(batch))
    rows = journal.reservoir.rows
    assert journal.refused == 0
    assert set(np.round(rows[:, SLOWNESS], 6).tolist()) == {1.0, 2.0}
    usual = rows[:, 4] / rows[:, SLOWNESS]
    expected = 0.004 + 0.0006 * rows[:, 0] + 9e-5 * rows[:, 1] + 1.8e-8 * rows[:, 3] + 2e-7 * rows[:, 2]
    np.testing.assert_allclose(usual, expected, rtol=1e-9)


# ---- champion and challenger ----------------------------------------------------------------------------------------


def rows_for(cost: Cost, count: int, noise: float, seed: int) -> Array:
    journal = Journal(Reservoir.of(PROFILE))
    rng = random.Random(seed)
    for batch in tasks(count, seed):
        journal.completed(batch, cost(batch) * math.exp(rng.gauss(0, noise)), cost(batch))
    return journal.reservoir.rows


@given(st.integers(0, 10_000), st.floats(0.0, 0.3), st.floats(0.3, 5.0), st.integers(60, 200))
@settings(max_examples=25)
def test_what_takes_over_is_better_on_tasks_that_neither_has_seen_and_monotone(
    seed: int, noise: float, pairs: float, count: int
) -> None:
    rows = rows_for(lambda batch: cost_s(batch, per_pair_s=pairs * 1.8e-8), count, noise, seed)
    found = refit(rows, FITTED.model, 0)
    assert found is not None
    judging = rows[np.argsort(rows[:, NUMBER])][-found.judged :]
    assert judging[:, NUMBER].min() > found.trained_through
    assert found.challenger_error == pytest.approx(errors(found.challenger.model, judging).mean())
    assert found.champion_error == pytest.approx(errors(FITTED.model, judging).mean())
    assert found.challenger.model.is_sound()
    if found.is_better:
        assert found.challenger_error < found.champion_error


def test_a_model_that_is_right_is_not_replaced_by_chance() -> None:
    """Champion and challenger are equally good: few pass two standard errors."""
    better = sum(
        found is not None and found.is_better
        for found in (refit(rows_for(cost_s, 150, 0.03, seed), FITTED.model, 0) for seed in range(12))
    )
    assert better <= 3


def test_too_few_tasks_that_the_champion_has_not_seen_decide_nothing() -> None:
    rows = rows_for(cost_s, 60, 0.02, 0)
    assert refit(rows, FITTED.model, 40) is None
    assert refit(PROFILE, FITTED.model, 0) is None


def test_what_was_explored_judges_nobody() -> None:
    """The champion is right about all tasks, and wrong about some shapes that only an idle server runs."""
    journal, rng = Journal(Reservoir.of(PROFILE)), random.Random(0)

    def explore(count: int) -> None:
        for number in range(count):
            batch, factor = ((PrefillShape(200),), 1.0) if number % 2 else ((PrefillShape(200, 3000),), 1.35)
            seconds = factor * cost_s(batch) * math.exp(rng.gauss(0, 0.02))
            journal.explored(batch, seconds, cost_s(batch), 1.0)

    explore(60)
    assert refit(journal.reservoir.rows, FITTED.model, 0) is None
    for batch in tasks(80):
        journal.completed(batch, cost_s(batch) * math.exp(rng.gauss(0, 0.02)), cost_s(batch))
    explore(60)
    rows = journal.reservoir.rows
    of_tasks = rows[(rows[:, NUMBER] > OF_PROFILE) & (rows[:, EXPLORED] == 0)]
    of_tasks = of_tasks[np.argsort(of_tasks[:, NUMBER])]
    found = refit(rows, FITTED.model, 0)
    assert found is not None
    assert found.champion_error == pytest.approx(errors(FITTED.model, of_tasks[-found.judged :]).mean())
    assert found.trained_through == of_tasks[-found.judged - 1, NUMBER]
    assert not found.is_better


def test_trees_that_fall_are_found_out() -> None:
    rng = np.random.default_rng(0)
    matrix = PROFILE[:, :COUNT]
    trees = Trees.of(train(matrix, 0.1 * np.sqrt(matrix[:, 1] / 4096) + rng.normal(0, 0.01, len(matrix))))
    assert trees.is_monotone(COUNT)
    busiest = int(np.ptp(trees.leaf, axis=1).argmax())
    assert np.ptp(trees.leaf[busiest]) > 0
    fallen = trees.leaf.copy()
    fallen[busiest] = -fallen[busiest]
    assert not dataclasses.replace(trees, leaf=fallen).is_monotone(COUNT)
    for _ in range(20):
        random_leaves = dataclasses.replace(trees, leaf=rng.normal(size=trees.leaf.shape))
        assert not random_leaves.is_monotone(COUNT)
    assert not dataclasses.replace(trees, leaf=np.full_like(trees.leaf, np.nan)).is_monotone(COUNT)
    assert not dataclasses.replace(trees, feature=trees.feature + COUNT).is_monotone(COUNT)


def test_the_profile_stays_where_the_server_has_measured_little() -> None:
    rows = rows_for(cost_s, 300, 0.02, 1)
    own = rows[rows[:, NUMBER] > OF_PROFILE]
    kept = needed(rows, own)
    common = cell(1, 700, 0)
    assert not any(cell(*row[:3]) == common for row in kept[kept[:, NUMBER] == OF_PROFILE].tolist())
    assert any(row[0] > 5 for row in kept[kept[:, NUMBER] == OF_PROFILE].tolist())


def test_few_rows_leave_the_physics() -> None:
    """Noise is all that is there for trees to learn, and they move hardly anything."""
    design = make_design(4096)[:20]
    rng = random.Random(1)
    seconds = np.array([cost_s(shape) * math.exp(rng.gauss(0, 0.1)) for shape in design])
    fitted = fit_rows(feature_matrix(design), seconds)
    moved = np.log(fitted.model.predict_rows_s(PROFILE[:, :COUNT]) / fitted.model.physics.predict_s(PROFILE[:, :COUNT]))
    assert np.abs(moved).max() < 0.05
    for factor in (1, 2, 4):
        alone = [PrefillShape(factor * 4096)]
        assert fitted.model.predict_s(alone) == pytest.approx(cost_s(alone), rel=0.25)


def test_the_arrays_predict_as_the_kernels_do() -> None:
    matrix = feature_matrix([*tasks(300, 9), (PrefillShape(60_000, 70_000),)])
    np.testing.assert_allclose(FITTED.model.predict_rows_s(matrix), FITTED.model.predict_matrix_s(matrix), rtol=1e-12)


# ---- a server that learns ------------------------------------------------------------------------------------------


@functools.cache
def _usual() -> dict[int, Server]:
    server, rng, batches = Server(), random.Random(0), tasks(500)
    found = {}
    for begin, end in pairwise((0, 400, 500)):
        server.run(batches[begin:end], cost_s, rng=rng)
        found[end] = copy.deepcopy(server)
    return found


def usual(count: int) -> Server:
    """A server that learns, after the first ``count`` of ``tasks``, 400 or 500."""
    return copy.deepcopy(_usual()[count])


def test_after_300_tasks_the_newest_200_are_predicted() -> None:
    server = usual(500)
    assert np.median(server.apes[300:]) < 0.03
    assert np.quantile(server.apes[300:], 0.9) < 0.08


def test_a_refit_is_asked_for_once_in_so_many_tasks() -> None:
    server = Server()
    server.run(tasks(4 * REFIT_TASKS + 7), cost_s)
    assert server.ttft.asked == [REFIT_TASKS, 2 * REFIT_TASKS, 3 * REFIT_TASKS, 4 * REFIT_TASKS]


def test_a_profile_of_another_machine_is_noticed_within_100_tasks_and_right_within_200() -> None:
    wrong, rows = profiled(slow_attention)
    learning, still = Server(True, wrong, rows), Server(False, wrong, rows)
    for server in (learning, still):
        server.run(tasks(400), cost_s)
    assert learning.adopted
    assert learning.adopted[0] <= 100
    assert np.median(still.apes[200:]) > 0.04, "the online factors alone do not do"
    assert np.median(learning.apes[200:]) < 0.03
    assert np.quantile(learning.apes[200:], 0.9) < 0.10


def test_an_engine_that_becomes_another_in_the_middle_is_learned_within_200_tasks() -> None:
    server = usual(400)
    server.run(tasks(400, 1), lambda batch: 2 * slow_attention(batch))
    assert np.median(server.apes[600:]) < 0.03
    assert np.quantile(server.apes[600:], 0.9) < 0.08


def test_an_engine_that_slows_by_half_in_the_middle_is_followed_at_once_and_changes_no_model() -> None:
    server = usual(400)
    before = list(server.adopted)
    server.run(tasks(400, 1), lambda batch: 1.5 * cost_s(batch))
    assert np.median(server.apes[420:]) < 0.03
    assert len(server.adopted) - len(before) <= 2
    assert server.ttft.correction == pytest.approx(1.5, rel=0.05)


def test_a_simulated_server_learns_what_its_machine_takes() -> None:
    cost = CostModel("made up", layers=8, fixed_s=0.004, per_token_s=9e-5, per_pair_s=0.9e-8)
    machine = dataclasses.replace(cost, per_pair_s=4 * cost.per_pair_s)
    ttft = LearnedTTFT(cost, error=0.02)
    profiled_model = ttft.model
    for batch in tasks(400):
        ttft.observe(batch, machine.predict_s(batch))
    assert ttft.model is not profiled_model
    for tokens in (800, 8000):
        batch = [PrefillShape(tokens)]
        assert ttft.predict(batch).expected_s == pytest.approx(machine.predict_s(batch), rel=0.06)
        assert profiled_model.predict_s(batch) < 0.9 * machine.predict_s(batch)


def test_poisoned_tasks_leave_the_model_as_it_is() -> None:
    clean, poisoned = usual(400), Server()
    rng = random.Random(5)
    poisoned.run(tasks(400), lambda batch: cost_s(batch) * (rng.choice([1e-6, 50.0]) if rng.random() < 0.05 else 1.0))
    ratios = poisoned.ttft.model.predict_rows_s(PROFILE[:, :COUNT])
    ratios /= clean.ttft.model.predict_rows_s(PROFILE[:, :COUNT])
    assert np.quantile(np.abs(np.log(ratios)), 0.9) < 0.08


def test_another_model_takes_over_with_what_the_last_tasks_say_of_the_machine() -> None:
    server = Server(learns=False)
    server.run(tasks(200), lambda batch: 2 * cost_s(batch))
    exact = fit_rows(features_of(PROFILE), np.array([cost_s(shape) for shape in make_design(4096)]))
    pace = server.ttft.pace([PrefillShape(500)])
    observed = server.ttft.state()["observed"]
    server.ttft.replace(*exact.parts())
    server.ttft.follow()
    assert server.ttft.correction == pytest.approx(2.0, rel=0.02)
    assert server.ttft.pace([PrefillShape(500)]) is pace, "what waits is paced by the new model, too"
    batch = [PrefillShape(500)]
    assert pace.factor * exact.model.predict_s(batch) == pytest.approx(server.ttft.predict_s(batch), rel=0.03)
    assert server.ttft.state()["observed"] == observed


# ---- uncertainty -----------------------------------------------------------------------------------------------------


def test_a_margin_is_that_of_batches_alike() -> None:
    ttft = AdaptiveTTFT(0.9, BoostedTTFT.fit(make_design(4096), [cost_s(shape) for shape in make_design(4096)]))
    rng = random.Random(0)
    for batch in tasks(1500):
        noise = 0.3 if batch[0].cached_tokens else 0.02
        ttft.observe(batch, cost_s(batch) * math.exp(rng.gauss(0, noise)))
    margins = {}
    for cached in (0, 200):
        prediction = ttft.predict([PrefillShape(600, cached)])
        margins[cached] = prediction.planned_s / prediction.expected_s
    assert margins[0] < 1.10
    assert margins[200] > 1.2


def test_a_kind_of_batch_that_nobody_has_seen_has_a_wider_margin() -> None:
    ttft = AdaptiveTTFT(0.9, *FITTED.parts())

    def margin(batch: list[PrefillShape]) -> float:
        prediction = ttft.predict(batch)
        return math.log(prediction.planned_s / prediction.expected_s)

    assert margin([PrefillShape(30_000)]) == pytest.approx(2 * math.log(ttft.margin), rel=0.3)
    assert margin([PrefillShape(30_000)]) > 1.5 * margin([PrefillShape(600)])
