"""One profiling run, short at a server's first start or long: within its budget, references throughout, resumable, and
nothing lost when it is interrupted.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from sgl_flowprefill.profiling.design import (
    SEED,
    SHORTEST_TOKENS,
    Shape,
    choose_longest,
    interleaved,
    looked_into,
    make_design,
    references,
)
from sgl_flowprefill.profiling.file import Profile, Row, Setting, write_profile
from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import Array, feature_matrix
from sgl_flowprefill.ttft.physics import non_negative

ROUNDS: Final = 1.5
"""How often the budget shall do for the whole design; it decides the longest prompt."""
MOST_ROUNDS: Final = 20
QUICK_SHARE: Final = 0.001
"""A shape that takes less than this share of the budget is quick, ..."""
QUICK_ROUNDS: Final = 5
"""... and is measured so often while the design is measured once, at times spread over all of it: of a few milliseconds
one time says little, and several cost little.
"""
LEAST_SHAPES: Final = 12
"""Shapes that are timed whatever the budget."""
LOOKS: Final = 3
"""How often each single prompt is looked into. The least times count, and a busy moment spoils a look."""
SHORTEST_LOOK_ON_GPU_TOKENS: Final = 512
"""Shorter prompts take a GPU as long as it takes to read the weights, and say nothing of rows."""
LEAST_LENGTHS: Final = 3
"""By which a fixed time, one of a row and one of a pair can be told apart."""
LONGEST_LOOK_ON_GPU_TOKENS: Final = 32_768
LONGEST_LOOK_SHARE: Final = 0.2
"""Share of the budget that one look into a longer prompt than the design's may take: tiles of attention are planned by
what a pair costs, and the design's may be too short to tell.
"""
REFERENCE_SHARE: Final = 0.1
"""Share of the time that references may take."""
RUNS_APART_S: Final = 3600.0
"""Between the last measurement of a run and the first of one that goes on with it, as profiles count time: the machine
may be as fast as it likes."""
SAVE_S: Final = 5.0
CACHED_TOKEN_COST: Final = 0.05
"""Cost of a cached token in new tokens, for the first idea of what a shape takes."""


class Timing(NamedTuple):
    """One measured forward pass."""

    shape: Shape
    """The batch that ran: the scheduler may admit fewer requests, and match another token of a prefix by chance."""
    time_s: float
    waited_s: float
    """Part of ``time_s`` in which this thread was ready to run and another process had its CPU."""


class Engine(Protocol):
    """What can run batches and time them."""

    @property
    def limit_tokens(self) -> int:
        """Longest prompt, such that a cached prompt of the same length fits beside it."""

    @property
    def is_gpu(self) -> bool:
        """Whether it computes on a GPU."""

    def cache_prefix(self, tokens: int) -> None:
        """Forget what is cached, and cache one prompt of ``tokens``: its parts are the prefixes from now on."""

    def time(self, shape: Shape) -> Timing:
        """Run one batch of ``shape``."""

    def time_operators(self, shape: Shape) -> tuple[Timing, float, float]:
        """Like ``time``, and the seconds spent in all attention and in all MLP modules."""


class Progress(NamedTuple):
    """Where a run stands."""

    elapsed_s: float
    measured: int
    what: str


def run_profile(
    engine: Engine,
    setting: Setting,
    path: Path | None,
    budget_s: float,
    resumed: Profile | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
    most_rounds: int = MOST_ROUNDS,
) -> Profile:
    """Measure for about ``budget_s``, at most ``most_rounds`` times each shape, and write the profile to ``path`` if
    there is one.

    What an interrupted run has measured stays beside it (``partial_path``). ``resumed`` is such a profile of the same
    setting: its measurements are kept and its design is continued.
    """
    started_s = clock()
    estimate_s = _calibrate(engine, budget_s)
    if resumed is None or resumed.longest_tokens > engine.limit_tokens:
        longest = choose_longest(engine.limit_tokens, budget_s / ROUNDS, estimate_s)
        profile = Profile(setting, longest)
    else:
        profile = Profile(setting, resumed.longest_tokens, list(resumed.rows))
    run = _Run(engine, profile, clock)
    saved_s = clock()
    try:
        engine.cache_prefix(profile.longest_tokens)
        looks = _looks(engine, profile.longest_tokens, LONGEST_LOOK_SHARE * budget_s, estimate_s)
        quick_s = QUICK_SHARE * budget_s
        for index, shape in _order(profile, most_rounds, looks, lambda shape: estimate_s(shape) < quick_s):
            too_late = clock() - started_s + estimate_s(shape) > budget_s
            is_needed = index == 1 and run.timed < LEAST_SHAPES
            if too_late and not is_needed:
                continue
            for measured in run.with_reference(shape, index):
                on_progress(Progress(clock() - started_s, len(profile.rows), _describe(measured)))
            if path is not None and clock() - saved_s > SAVE_S:
                write_profile(partial_path(path), profile)
                saved_s = clock()
        profile.complete = True
    finally:
        if path is None:
            pass
        elif profile.complete:
            write_profile(path, profile)
            partial_path(path).unlink(missing_ok=True)
        elif profile.rows:
            write_profile(partial_path(path), profile)
    return profile


class _Run:
    """Measures shapes, and a reference whenever others have taken long enough since the last one."""

    def __init__(self, engine: Engine, profile: Profile, clock: Callable[[], float]) -> None:
        self.timed = 0
        """Shapes of the design that were timed as a whole."""
        self._engine = engine
        self._profile = profile
        self._clock = clock
        self._began_s = clock()
        self._before_s = max(row.at_s for row in profile.rows) + RUNS_APART_S if profile.rows else 0.0
        self._references = references(profile.longest_tokens)
        self._referred = min((row.round for row in profile.rows), default=0)
        self._next_reference_s = -math.inf

    def with_reference(self, shape: Shape, index: int) -> Iterator[Shape]:
        """Measure ``shape`` in round ``index``, and a reference if it is time; what was measured, one by one."""
        if self._clock() >= self._next_reference_s:
            self._referred = min(0, self._referred) - 1
            reference = self._references[self._referred % len(self._references)]
            begin_s = self._clock()
            self._measure(reference, self._referred)
            end_s = self._clock()
            self._next_reference_s = end_s + (end_s - begin_s) * (1 / REFERENCE_SHARE - 1)
            yield reference
        self._measure(shape, index)
        self.timed += index == 1
        yield shape

    def _measure(self, shape: Shape, index: int) -> None:
        """Round 0 looks inside single requests, for the times of operators; the others time forward passes."""
        at_s = self._before_s + self._clock() - self._began_s
        if index == 0:
            timing, attention_s, mlp_s = self._engine.time_operators(shape)
            row = Row(timing.shape, timing.time_s, timing.waited_s, index, at_s, attention_s, mlp_s)
        else:
            timing = self._engine.time(shape)
            row = Row(timing.shape, timing.time_s, timing.waited_s, index, at_s)
        self._profile.rows.append(row)


def partial_path(path: Path) -> Path:
    """Where the measurements of a profile are until it is complete."""
    return path.with_name(f"{path.stem}.partial.parquet")


def _calibrate(engine: Engine, budget_s: float) -> Callable[[Shape], float]:
    """A first idea of what a shape takes, from single prompts of growing length; also warms the engine up."""
    shapes: list[Shape] = []
    times_s: list[float] = []
    length = SHORTEST_TOKENS
    while length <= engine.limit_tokens:
        shapes.append((PrefillShape(length),))
        times_s.append(min(engine.time(shapes[-1]).time_s for _ in range(2)))
        if times_s[-1] > budget_s / 100:
            break
        length *= 4

    def costs(shapes: Sequence[Shape]) -> Array:
        matrix = feature_matrix(shapes)
        return np.stack([matrix[:, 0], matrix[:, 1] + CACHED_TOKEN_COST * matrix[:, 2], matrix[:, 3]], axis=1)

    seconds = np.array(times_s)
    weights = non_negative(costs(shapes) / seconds[:, None], np.ones(len(seconds)))
    return lambda shape: float((costs([shape]) @ weights)[0])


def _looks(engine: Engine, longest_tokens: int, longest_s: float, estimate_s: Callable[[Shape], float]) -> list[Shape]:
    """The prompts that are looked into, each several times. On a GPU those that tell of rows, unless these are too few,
    and once a longer one that is expected to take up to ``longest_s``.
    """
    looks = looked_into(longest_tokens)
    if not engine.is_gpu:
        return LOOKS * looks
    tokens, most_tokens = longest_tokens, min(engine.limit_tokens, LONGEST_LOOK_ON_GPU_TOKENS)
    while tokens < most_tokens and estimate_s((PrefillShape(min(2 * tokens, most_tokens)),)) <= longest_s:
        tokens = min(2 * tokens, most_tokens)
    longer: list[Shape] = [(PrefillShape(tokens),)] if tokens > longest_tokens else []
    long_ones = [shape for shape in looks if shape[0].new_tokens >= SHORTEST_LOOK_ON_GPU_TOKENS]
    return LOOKS * (long_ones if len(long_ones + longer) >= LEAST_LENGTHS else looks) + longer


def _order(
    profile: Profile, most_rounds: int, looks: list[Shape], is_quick: Callable[[Shape], bool]
) -> Iterator[tuple[int, Shape]]:
    """Rounds over the design, without what ``profile`` has of them: the first in the design's order, of which any
    beginning is of use, the others each in an order of its own. Round 0 looks inside. Quick shapes go through their
    first rounds while the others go through one.
    """
    design = make_design(profile.longest_tokens)
    done = {(row.round, row.shape) for row in profile.rows}
    yield from ((0, shape) for shape in looks if (0, shape) not in done)
    rounds = [[(1, shape) for shape in design]]
    for index in range(2, most_rounds + 1):
        rounds.append([(index, shape) for shape in random.Random(SEED + index).sample(design, len(design))])
    quick = [one for later in rounds[1:QUICK_ROUNDS] for one in later if is_quick(one[1])]
    for ones in (interleaved(rounds[0], quick), *rounds[1:]):
        left = [one for one in ones if one not in done]
        before = len(profile.rows)
        for one in left:
            done.add(one)
            yield one
        if left and len(profile.rows) == before:
            return


def _describe(shape: Shape) -> str:
    new, cached = (sum(values) for values in zip(*shape, strict=True))
    return f"{len(shape)} x {new // len(shape)} tokens" + (f", {cached} cached" if cached else "")
