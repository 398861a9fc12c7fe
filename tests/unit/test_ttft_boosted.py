"""The LightGBM TTFT model: right on unseen shapes, monotone, physical beyond its range, and fast."""

from __future__ import annotations

import inspect
import math
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgl_flowprefill.profiling import make_design
from sgl_flowprefill.ttft import BoostedTTFT, PrefillShape, kernels
from sgl_flowprefill.ttft.boosted import shape_medians, train
from sgl_flowprefill.ttft.features import COUNT, feature_matrix, single_matrix
from sgl_flowprefill.ttft.trees import Trees
from sgl_flowprefill.ttft.validation import STRATA, errors, extrapolation, fit_cubic, hold_out

Batch = Sequence[PrefillShape]


def cost_s(batch: Batch) -> float:
    """An engine with a fixed cost, linear operators that are slow on few rows, and quadratic attention."""
    new = sum(request.new_tokens for request in batch)
    pairs = sum(request.new_tokens * (request.cached_tokens + request.new_tokens / 2) for request in batch)
    cached = sum(request.cached_tokens for request in batch)
    linear_s = 9e-5 * new * (1 + 0.2 / (1 + new / 300))
    return 0.004 + 0.0006 * len(batch) + linear_s + 1.8e-8 * pairs + 2e-7 * cached


def measurements(
    seed: int = 0, noise: float = 0.03, outliers: float = 0.02, longest: int = 8192
) -> tuple[list[Batch], list[float]]:
    """Three noisy repeats of the design; a share of ``outliers`` took three times as long."""
    rng = random.Random(seed)
    batches = [shape for shape in make_design(longest) for _ in range(3)]
    disturbed = [3.0 if rng.random() < outliers else 1.0 for _ in batches]
    times_s = [cost_s(b) * d * float(np.exp(rng.gauss(0, noise))) for b, d in zip(batches, disturbed, strict=True)]
    return list(batches), times_s


BATCHES, TIMES_S = measurements()
MODEL = BoostedTTFT.fit(BATCHES, TIMES_S)

request_shapes = st.builds(PrefillShape, st.integers(1, 40_000), st.integers(0, 40_000))
batches_of_requests = st.lists(request_shapes, min_size=1, max_size=16)


def random_requests(count: int, seed: int = 1, longest: int = 20_000) -> list[PrefillShape]:
    rng = random.Random(seed)
    return [PrefillShape(rng.randint(1, longest), rng.choice((0, rng.randint(0, longest)))) for _ in range(count)]


def test_held_out_lengths_and_batch_sizes_are_predicted_better_than_by_the_cubic() -> None:
    ours, cubic = hold_out(BATCHES, TIMES_S, BoostedTTFT.fit), hold_out(BATCHES, TIMES_S, fit_cubic)
    of_all = errors(ours)
    assert of_all is not None
    assert of_all.median_ape <= 0.03
    assert of_all.p90_ape <= 0.10
    for kind in ("batched", "prefix_cached"):
        mine, baseline = (errors([p for p in each if STRATA[kind](p.batch)]) for each in (ours, cubic))
        assert mine is not None
        assert baseline is not None
        assert mine.p90_ape <= baseline.p90_ape / 2


@pytest.mark.parametrize("factor", [2, 4])
def test_beyond_the_longest_profiled_prompt_it_follows_the_physics(factor: int) -> None:
    for tokens in (factor * 8192, factor * 6000):
        alone = [PrefillShape(tokens)]
        assert MODEL.predict_s(alone) == pytest.approx(cost_s(alone), rel=0.10)
    for prediction in extrapolation(BATCHES, TIMES_S, BoostedTTFT.fit, factor):
        assert prediction.ape < 0.15


@given(batches_of_requests, st.integers(0, 15), st.integers(0, 5000), st.integers(0, 5000))
def test_longer_prompts_and_prefixes_never_take_less_time(
    batch: list[PrefillShape], index: int, new: int, cached: int
) -> None:
    longer = list(batch)
    index %= len(batch)
    longer[index] = PrefillShape(batch[index].new_tokens + new, batch[index].cached_tokens + cached)
    assert MODEL.predict_s(batch) <= MODEL.predict_s(longer) * (1 + 1e-9)


@given(batches_of_requests, request_shapes)
def test_a_batch_takes_at_least_as_long_as_any_part_of_it(batch: list[PrefillShape], joining: PrefillShape) -> None:
    assert MODEL.predict_s(batch) <= MODEL.predict_s([*batch, joining]) * (1 + 1e-9)


def test_the_compiled_trees_are_the_boosters() -> None:
    shapes = shape_medians(BATCHES, TIMES_S)
    matrix, seconds = feature_matrix(list(shapes)), np.array(list(shapes.values()))
    target = np.log(seconds / MODEL.physics.predict_s(matrix))
    rng = np.random.default_rng(0)
    inputs = np.exp(rng.uniform(np.log(matrix.min(axis=0) + 1), np.log(matrix.max(axis=0) + 1), (2000, COUNT)))
    inputs = np.concatenate([inputs, matrix])
    for parameters in ({}, {"max_depth": 7, "num_leaves": 20, "min_data_in_leaf": 2}):
        booster = train(matrix, target, parameters)
        model = BoostedTTFT(MODEL.physics, Trees.of(booster), inputs.min(axis=0), inputs.max(axis=0))
        expected = MODEL.physics.predict_s(inputs) * np.exp(booster.predict(inputs))
        np.testing.assert_allclose(model.predict_matrix_s(inputs), expected, rtol=1e-12)


def test_one_by_one_and_all_at_once_are_the_same() -> None:
    requests = random_requests(500)
    one_by_one = [MODEL.predict_s([request]) for request in requests]
    np.testing.assert_allclose(MODEL.predict_each_s(requests), one_by_one, rtol=1e-12)
    np.testing.assert_allclose(MODEL.predict_all_s([[request] for request in requests]), one_by_one, rtol=1e-12)
    np.testing.assert_array_equal(single_matrix(requests), feature_matrix([[request] for request in requests]))


def test_no_call_after_the_first_compiles_anything() -> None:
    MODEL.predict_s([PrefillShape(1)])
    MODEL.predict_s([PrefillShape(100, 3), PrefillShape(7)])
    MODEL.predict_each_s(random_requests(3))
    MODEL.predict_all_s([random_requests(3), random_requests(2)])
    pickle.loads(pickle.dumps(MODEL)).predict_s([PrefillShape(1)])
    assert [len(kernel.signatures) for kernel in kernels.compiled()] == [1, 1]


def test_kernels_that_were_kept_know_no_number_that_another_module_defines() -> None:
    """numba would take a kept kernel for that of today, whatever has become of the number."""
    for function in (kernels.seconds, kernels.predict_one, kernels.predict_many):
        assert set(inspect.getclosurevars(function).globals) <= {"np", "math", "seconds"}


ELSEWHERE = """
import pickle, sys
{before}
model = pickle.load(sys.stdin.buffer)
requests = pickle.load(sys.stdin.buffer)
pickle.dump((model.predict_s(requests), model.predict_each_s(requests)), sys.stdout.buffer)
"""
"""A process with a cache of its own. It compiles without optimisation, which is faster."""
CACHE_RAISES = """
from numba.core.caching import IndexDataCacheFile
def raises(*arguments):
    raise {error}
IndexDataCacheFile.{call} = raises
"""
NOWHERE = "UserProvidedCacheLocator"
"""Kernels are kept where NUMBA_CACHE_DIR says, and neither beside the package nor among what is the user's."""


@pytest.mark.parametrize(
    ("before", "environment"),
    [
        (CACHE_RAISES.format(call="save", error='OSError(28, "No space left on device")'), {}),
        (CACHE_RAISES.format(call="load", error='EOFError("Ran out of input")'), {}),
        ("", {"NUMBA_CACHE_DIR": "/dev/null/cache", "NUMBA_CACHE_LOCATOR_CLASSES": NOWHERE}),
    ],
    ids=["full disk", "damaged file", "no directory"],
)
def test_kernels_are_there_where_numba_cannot_use_its_cache(
    tmp_path: Path, before: str, environment: dict[str, str]
) -> None:
    requests = random_requests(3)
    env = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_OPT": "0"} | environment
    ran = subprocess.run(
        [sys.executable, "-c", ELSEWHERE.format(before=before)],
        input=pickle.dumps(MODEL) + pickle.dumps(requests),
        env=env,
        check=True,
        capture_output=True,
    )
    one_s, each_s = pickle.loads(ran.stdout)
    assert one_s == pytest.approx(MODEL.predict_s(requests))
    np.testing.assert_allclose(each_s, MODEL.predict_each_s(requests), rtol=1e-9)
    assert b"compiles its TTFT kernels at each start" in ran.stderr


def best_s(run: Callable[[], object], repeats: int = 20) -> float:
    times_s = []
    for _ in range(repeats):
        started_s = time.perf_counter()
        run()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


def test_a_scheduling_event_can_afford_it() -> None:
    batch, waiting = [PrefillShape(1234, 567)], random_requests(1000)
    MODEL.predict_s(batch), MODEL.predict_each_s(waiting)
    assert best_s(lambda: [MODEL.predict_s(batch) for _ in range(1000)]) / 1000 <= 10e-6
    assert best_s(lambda: MODEL.predict_each_s(waiting)) <= 1e-3


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.1])
@pytest.mark.parametrize("repeats", [1, 2, 3, 10, 50])
def test_a_shape_that_is_measured_often_passes_for_no_faster_one(repeats: int, noise: float) -> None:
    rng = random.Random(0)
    shapes = [(PrefillShape(tokens),) for tokens in range(1, 401)]
    measured = [(shape, math.exp(rng.gauss(0, noise))) for shape in shapes for _ in range(repeats)]
    seconds = shape_medians(*zip(*measured, strict=True))
    assert np.mean(np.log(list(seconds.values()))) == pytest.approx(0.0, abs=0.02)


def test_an_outlier_among_the_repeats_changes_little() -> None:
    batches, times_s = measurements(noise=0.0, outliers=0.0)
    disturbed = [t * (50.0 if i % 3 == 0 else 1.0) for i, t in enumerate(times_s)]
    clean, model = BoostedTTFT.fit(batches, times_s), BoostedTTFT.fit(batches, disturbed)
    ratios = [model.predict_s(batch) / clean.predict_s(batch) for batch in make_design(8192)]
    np.testing.assert_allclose(ratios, 1.0, rtol=1e-6)


def test_a_shape_that_is_an_outlier_bends_the_curve_little() -> None:
    batches = make_design(8192)
    times_s = [cost_s(batch) for batch in batches]
    clean = BoostedTTFT.fit(batches, times_s)
    disturbed = BoostedTTFT.fit(batches, [t * (5.0 if i % 30 == 7 else 1.0) for i, t in enumerate(times_s)])
    ratios = np.array([disturbed.predict_s(batch) / clean.predict_s(batch) for batch in batches])
    assert np.quantile(np.abs(np.log(ratios)), 0.9) < 0.15


def test_too_few_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 3 different batches, got 2"):
        BoostedTTFT.fit([[PrefillShape(16)], [PrefillShape(64)]], [0.1, 0.2])


def test_importing_it_loads_neither_torch_nor_sglang_nor_its_own_heavy_libraries() -> None:
    code = "import sys, sgl_flowprefill.ttft; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "sglang", "lightgbm", "numba", "scipy"]
    found = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
