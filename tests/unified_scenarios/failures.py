"""Prefills that fail, and decode steps for which the device has no memory."""

from __future__ import annotations

import gc
import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from sgl_flowprefill.hub.failure import StepOutOfMemory
from sgl_flowprefill.policy import Limits
from tests.faults import MARKER, STEP_PLACES, StepAttempts, raise_in_marked_prompts, without_memory_for_steps
from tests.prompts import prompt
from tests.unified_asks import Ask
from tests.unified_engine import UnifiedEngine, state_of
from tests.unified_rounds import Play, play_and_flush
from tests.unified_scenarios.common import (
    LONG,
    STREAM,
    URGENT,
    anew,
    calm,
    finish,
    running,
    suspend_all_the_time,
    suspended,
    until,
)

BAD: Final = Ask((*prompt(505, 700), MARKER), 4, (("ignore_eos", True),), ttft_slo_s=20.0)
"""A request whose prefill fails where the model raises in marked prompts."""


@dataclass
class Failed:
    play: Play
    asked: dict[str, Ask]
    """Requests whose prefills did not fail."""
    errors: list[str]
    """What was logged as an error."""


@contextmanager
def _errors() -> Iterator[list[str]]:
    """What is logged as an error in it."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    keep, logger = Keep(logging.ERROR), logging.getLogger("sgl_flowprefill")
    logger.addHandler(keep)
    try:
        yield lines
    finally:
        logger.removeHandler(keep)


@contextmanager
def _raising(engine: UnifiedEngine, fault: str) -> Iterator[None]:
    """In it, prefills of marked prompts fail in the middle of their forward pass, and tasks come back at each
    interruption point.
    """
    hooks = raise_in_marked_prompts(engine.scheduler, fault, 4)
    suspend_all_the_time(engine)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        calm(engine)


def fail(engine: UnifiedEngine, fault: str) -> Failed:
    """A prefill fails while a stream decodes and another prefill is suspended; then its prompt comes again."""
    asked = {"stays": STREAM, "goes": LONG, "again": BAD}
    anew(engine)
    engine.submit("stays", STREAM)
    until(engine, lambda: state_of(engine, "stays") == "decoding")
    with _errors() as errors, _raising(engine, fault):
        running(engine)
        engine.submit("bad", BAD)
        until(engine, lambda: "bad" in engine.answers)
        for rid in ("stays", "goes"):
            engine.seen[state_of(engine, rid)] += 1
    engine.submit("again", BAD)
    return Failed(finish(engine), asked, errors)


def fail_in_a_batch(engine: UnifiedEngine) -> Failed:
    """The prefill of three requests fails, one of whose clients has left; then their prompts come again."""
    bad = {f"bad{i}": Ask((*prompt(506 + i, 60), MARKER), 4, BAD.sampling, ttft_slo_s=60.0) for i in range(3)}
    anew(engine)
    engine.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1000)
    with _errors() as errors, _raising(engine, "error"):
        for rid, ask in bad.items():
            engine.submit(rid, ask)
        engine.turn()
        [task] = engine.hub.work.tasks.live
        engine.seen["requests of the batch"] += len(task.rids)
        engine.abort("bad1")
        until(engine, lambda: engine.answers.keys() == bad.keys())
    again = {f"again{i}": ask for i, ask in enumerate(bad.values())}
    for rid, ask in again.items():
        engine.submit(rid, ask)
    return Failed(finish(engine), again, errors)


PENALISED: Final = Ask(tuple(prompt(507, 200)), 40, (("ignore_eos", True), ("frequency_penalty", 1.5)))
WORDED: Final = Ask(tuple(prompt(508, 150)), 40, (("regex", "[a-z ]+"), ("min_new_tokens", 40)))
"""Streams whose tokens hang on those before, which a step counts once."""


@dataclass
class WithoutMemory:
    play: Play
    asked: dict[str, Ask]
    attempts: StepAttempts
    error: str
    """What was raised, and its cause."""


def _streams_of_all_kinds(engine: UnifiedEngine) -> dict[str, Ask]:
    asked = {"worded": WORDED, "penalised": PENALISED, "stays": STREAM}
    anew(engine)
    for rid, ask in asked.items():
        engine.submit(rid, ask)
        until(engine, lambda rid=rid: state_of(engine, rid) != "compiling")
    until(engine, lambda: all(state_of(engine, rid) in ("joining", "decoding") for rid in asked))
    return asked


def step_without_memory(engine: UnifiedEngine, place: str, times: int) -> WithoutMemory:
    """A step runs out of memory so many times, while two prefills are live that have run."""
    asked = _streams_of_all_kinds(engine) | {"goes": LONG, "urgent": URGENT}
    before = engine.hub.role.given_back
    suspended(engine)
    failures = iter([place] * times)
    gc.disable()
    try:
        with without_memory_for_steps(engine.scheduler, lambda: next(failures, None)) as attempts:
            engine.step()
    finally:
        gc.enable()
    engine.seen["given back"] = engine.hub.role.given_back - before
    calm(engine)
    return WithoutMemory(finish(engine), asked, attempts, "")


def step_without_memory_and_prefills(engine: UnifiedEngine, place: str) -> WithoutMemory:
    """A step runs out of memory while there are streams alone; then it runs again, as if there was some at once."""
    asked, error = _streams_of_all_kinds(engine), ""
    failures = iter([place])
    with without_memory_for_steps(engine.scheduler, lambda: next(failures, None)) as attempts:
        try:
            engine.step()
        except StepOutOfMemory as raised:
            error = f"{raised}: {type(raised.__cause__).__name__}"
        engine.step()
    return WithoutMemory(finish(engine), asked, attempts, error)


def steps_without_memory_by_chance(
    engine: UnifiedEngine, asked: Mapping[str, Ask], seed: int, probability: float
) -> WithoutMemory:
    """A round in which steps run out of memory with that ``probability``, while prefills are live that have run."""
    rng, tasks = random.Random(seed), engine.hub.work.tasks

    def place() -> str | None:
        fails = any(task.has_run for task in tasks.live) and rng.random() < probability
        return rng.choice(STEP_PLACES) if fails else None

    with without_memory_for_steps(engine.scheduler, place) as attempts:
        played = play_and_flush(engine, asked, set(), seed, 0.4)
    return WithoutMemory(played, dict(asked), attempts, "")
