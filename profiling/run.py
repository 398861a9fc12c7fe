"""One profiling run: within its budget, in random order, resumable, and nothing lost when it is interrupted."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import numpy as np

from sgl_flowprefill.profiling.design import SEED, SHORTEST_TOKENS, Shape, choose_longest, make_design
from sgl_flowprefill.profiling.file import Profile, Row, Setting, write_profile
from sgl_flowprefill.ttft.base import PrefillShape
from sgl_flowprefill.ttft.features import Array, feature_matrix
from sgl_flowprefill.ttft.physics import non_negative

ROUNDS: Final = 5
"""How often the budget shall do for the whole design; it decides the longest prompt."""
MOST_ROUNDS: Final = 20
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
        ...

    def cache_prefix(self, tokens: int) -> None:
        """Forget what is cached, and cache one prompt of ``tokens``: its parts are the prefixes from now on."""
        ...

    def time(self, shape: Shape) -> Timing:
        """Run one batch of ``shape``."""
        ...

    def time_operators(self, shape: Shape) -> tuple[Timing, float, float]:
        """Like ``time``, and the seconds spent in all attention and in all MLP modules."""
        ...


class Progress(NamedTuple):
    """Where a run stands."""

    elapsed_s: float
    measured: int
    what: str


def run_profile(
    engine: Engine,
    setting: Setting,
    path: Path,
    budget_s: float,
    resumed: Profile | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
) -> Profile:
    """Measure for about ``budget_s`` and write the profile to ``path``.

    What an interrupted run has measured stays beside it (``partial_path``), and so does that of one whose budget did
    not do. ``resumed`` is such a profile of the same setting: its measurements are kept and its design is continued.
    """
    started_s = clock()
    estimate_s = _calibrate(engine, budget_s)
    if resumed is None or resumed.longest_tokens > engine.limit_tokens:
        longest = choose_longest(engine.limit_tokens, budget_s / ROUNDS, estimate_s)
        profile = Profile(setting, longest)
    else:
        profile = Profile(setting, resumed.longest_tokens, list(resumed.rows))
    design = make_design(profile.longest_tokens)
    saved_s = clock()
    try:
        engine.cache_prefix(profile.longest_tokens)
        for index, shape in _order(design, profile):
            at_s = clock() - started_s
            if at_s + estimate_s(shape) > budget_s:
                continue
            profile.rows.append(_measure(engine, shape, index, at_s))
            on_progress(Progress(clock() - started_s, len(profile.rows), _describe(shape)))
            if clock() - saved_s > SAVE_S:
                write_profile(partial_path(path), profile)
                saved_s = clock()
        profile.complete = _covers(profile, design)
    finally:
        if profile.complete:
            write_profile(path, profile)
            partial_path(path).unlink(missing_ok=True)
        elif profile.rows:
            write_profile(partial_path(path), profile)
    return profile


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


def _order(design: list[Shape], profile: Profile) -> Iterator[tuple[int, Shape]]:
    """Rounds over the design, each in an order of its own, from where ``profile`` stands."""
    done = {(row.round, row.shape) for row in profile.rows}
    for index in count(min((row.round for row in profile.rows[-1:]), default=0)):
        if index > MOST_ROUNDS:
            return
        shapes = [shape for shape in design if (index, shape) not in done and (index or len(shape) == 1)]
        random.Random(SEED + index).shuffle(shapes)
        before = len(profile.rows)
        for shape in shapes:
            yield index, shape
        if shapes and len(profile.rows) == before:
            return


def _measure(engine: Engine, shape: Shape, index: int, at_s: float) -> Row:
    """Round 0 looks inside single requests, for the times of operators; the others time forward passes."""
    if index == 0:
        timing, attention_s, mlp_s = engine.time_operators(shape)
        return Row(timing.shape, timing.time_s, timing.waited_s, index, at_s, attention_s, mlp_s)
    timing = engine.time(shape)
    return Row(timing.shape, timing.time_s, timing.waited_s, index, at_s)


def _covers(profile: Profile, design: list[Shape]) -> bool:
    """Whether nearly all of the design was timed (a prefix may match one token more by chance)."""
    timed = set(profile.timings()[0])
    return sum(shape in timed for shape in design) >= 0.95 * len(design)


def _describe(shape: Shape) -> str:
    new, cached = (sum(values) for values in zip(*shape, strict=True))
    return f"{len(shape)} x {new // len(shape)} tokens" + (f", {cached} cached" if cached else "")
