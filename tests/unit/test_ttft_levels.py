"""Of what a task took longer than predicted, what is the machine's, and what the model is wrong about its kind."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.features import Array, feature_matrix
from sgl_flowprefill.ttft.learning import AROUND, Journal, refit
from sgl_flowprefill.ttft.reservoir import NUMBER, OF_PROFILE, SLOWNESS, Reservoir
from tests.unit.test_ttft_learning import FITTED, PROFILE, Batch, cost_s

BIAS = 1.3
"""Prefills behind a long cached prefix take so many times longer than the model says."""
TASKS = 280
BURST = range(160, 220)
"""Tasks that are all behind one; before and afterwards every fourth is."""


def shape(rng: random.Random, is_cached: bool) -> Batch:
    if is_cached:
        return (PrefillShape(rng.randint(300, 900), rng.randint(1000, 3000)),)
    return (PrefillShape(rng.randint(300, 3000)),)


def true_s(batch: Batch) -> float:
    return cost_s(batch) * (BIAS if batch[0].cached_tokens else 1.0)


def served(slowness: Callable[[int], float] = lambda number: 1.0) -> Journal:
    """A journal of TASKS, during which the machine is ``slowness`` of a task's number times slower than usual."""
    journal, rng = Journal(Reservoir.of(PROFILE)), random.Random(0)
    for number in range(1, TASKS + 1):
        batch = shape(rng, number in BURST or number % 4 == 0)
        measured_s = slowness(number) * true_s(batch) * math.exp(rng.gauss(0, 0.01))
        journal.completed(batch, measured_s, cost_s(batch))
    assert journal.refused == 0
    return journal


def own_rows(journal: Journal) -> Array:
    rows = journal.reservoir.rows
    return rows[rows[:, NUMBER] > OF_PROFILE]


def test_a_burst_of_a_kind_that_the_model_is_wrong_about_passes_for_no_slow_machine() -> None:
    rows = own_rows(served())
    assert len(rows) > TASKS - 10
    np.testing.assert_allclose(rows[:, SLOWNESS], 1.0, rtol=0.05)


def test_what_the_model_is_wrong_about_is_learned_from_a_burst_of_it() -> None:
    found = refit(served().reservoir.rows, FITTED.model, 0)
    assert found is not None
    assert found.is_better
    rng = random.Random(1)
    for is_cached in (True, False):
        batches = [shape(rng, is_cached) for _ in range(100)]
        predicted_s = found.challenger.model.predict_rows_s(feature_matrix(batches))
        assert np.median(np.abs(np.log(predicted_s / [true_s(batch) for batch in batches]))) < 0.08


def test_a_machine_that_becomes_slower_during_the_burst_is_noticed_at_once_and_stays_so_afterwards() -> None:
    since = BURST.start + len(BURST) // 2
    rows = own_rows(served(lambda number: 2.0 if number >= since else 1.0))
    expected = np.where(rows[:, NUMBER] >= since, 2.0, 1.0)
    np.testing.assert_allclose(rows[:, SLOWNESS], expected, rtol=0.06)


def test_a_model_that_takes_over_is_wrong_about_no_kind_until_it_shows() -> None:
    journal, rng = served(), random.Random(1)
    journal.new_model()
    for _ in range(40):
        batch = shape(rng, is_cached=True)
        journal.completed(batch, true_s(batch), true_s(batch))
    newest = own_rows(journal)
    newest = newest[newest[:, NUMBER] > TASKS]
    assert len(newest) > 20
    np.testing.assert_allclose(newest[:, SLOWNESS], 1.0)


def test_levels_begin_where_most_tasks_are_now_whatever_most_were_before() -> None:
    """While most tasks are behind a long prefix, those pass for what is usual, and not for 1.3 times too long."""
    journal, rng = Journal(Reservoir.of(PROFILE)), random.Random(0)
    for cached_share in (0.7, 0.1):
        for _ in range(200):
            batch = shape(rng, rng.random() < cached_share)
            journal.completed(batch, true_s(batch) * math.exp(rng.gauss(0, 0.01)), cost_s(batch))
    rows = own_rows(journal)
    before, now = (rows[(rows[:, NUMBER] > first) & (rows[:, NUMBER] <= first + 50)] for first in (150, 350))
    np.testing.assert_allclose(before[:, SLOWNESS], BIAS, rtol=0.05)
    np.testing.assert_allclose(now[:, SLOWNESS], 1.0, rtol=0.05)


def test_one_kind_alone_is_as_slow_as_the_tasks_around_whatever_chance_has_shown_before() -> None:
    journal, rng = Journal(Reservoir(2000)), random.Random(0)
    batch = (PrefillShape(600),)
    log_ratios = [rng.gauss(0, 0.1) for _ in range(2000)]
    for log_ratio in log_ratios:
        journal.completed(batch, cost_s(batch) * math.exp(log_ratio), cost_s(batch))
    for row in own_rows(journal):
        number = int(row[NUMBER])
        if number > 2 * AROUND:
            around = log_ratios[number - 1 - AROUND : number + AROUND]
            assert math.log(row[SLOWNESS]) == pytest.approx(np.median(around), abs=1e-9)
