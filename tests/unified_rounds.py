"""Rounds of chance on an engine that prefills and decodes, each answer compared with SGLang's own scheduler's."""

from __future__ import annotations

import math
import os
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from sgl_flowprefill.hub.ahead import StepAhead
from sgl_flowprefill.hub.task import STEP
from tests.late_device import LateDevice
from tests.remote import Remote
from tests.unified_asks import Answer, Ask
from tests.unified_comparison import StockComparison
from tests.unified_engine import UnifiedEngine, state_of

SWITCH_PROBABILITIES = (0.05, 0.3, 0.8)
FEW, MANY = (2, 12), (24, 40)
"""How many requests a round has, as ``randrange`` takes it. With many, KV cache that gets free is wanted at once."""


def coin(colocated: Any, rng: random.Random, seen: Counter[str]) -> Callable[..., Any]:
    """In place of what ``colocated`` decides: a task, a request or a step, by chance."""
    from sgl_flowprefill.policy import Act
    from sgl_flowprefill.policy.colocated import Turn

    def decide(now_s: float, running: Any, admit: bool = True) -> Any:
        tasks = sorted(colocated.prefills.started, key=lambda job: job.item.id)
        requests = colocated.prefills.first_waiting(now_s, 1000) if admit else []
        choices: list[Any] = tasks + sorted(requests, key=lambda job: job.item.number)
        if colocated.may_step:
            choices += [Act.STEP] * max(1, len(choices))
        if not choices:
            return Turn(Act.NOTHING)
        choice = rng.choice(choices)
        started = sum(1 for job in tasks if job.item.has_run)
        if choice is Act.STEP:
            seen["steps"] += 1
            seen["steps inside prefills"] += started > 0
            return Turn(Act.STEP)
        seen["suspensions"] += running is not None and choice is not running
        seen["deepest"] = max(seen["deepest"], started)
        return Turn(Act.TASK if choice.started else Act.START, choice)

    return decide


@contextmanager
def chance(engine: UnifiedEngine, seed: int, switch_probability: float) -> Iterator[Counter[str]]:
    """Suspend prefills at random interruption points, and run whatever a coin says: a task, a request, a step."""
    rng = random.Random(seed)
    hub, seen = engine.hub, engine.seen
    colocated, executor, role = hub.work.colocated, hub.executor, hub.role

    def interrupted() -> bool:
        from sglang.srt.layers.dp_attention import get_is_extend_in_batch

        assert get_is_extend_in_batch(), "a prefill takes itself for a decode step"
        return rng.random() < switch_probability

    def retracted(req: Any, is_retracted: bool = False) -> None:
        if is_retracted and "SGLANG_TEST_RETRACT" not in os.environ:
            may_stay = all(task.was_given_back for task in hub.work.tasks.live)
            assert may_stay, f"stream {req.rid} is retracted while prefills that never gave theirs back hold KV cache"
        add(req, is_retracted)

    scheduler, add = engine.scheduler, engine.scheduler._add_request_to_queue
    before = Counter(retractions=role.retractions, given_back=role.given_back)
    was_interrupted, ends_waiting = executor.interrupted, executor.ends_waiting
    colocated.next, scheduler._add_request_to_queue = coin(colocated, rng, seen), retracted
    executor.interrupted = executor.ends_waiting = interrupted
    try:
        yield seen
    finally:
        del colocated.next, scheduler._add_request_to_queue
        executor.interrupted, executor.ends_waiting = was_interrupted, ends_waiting
        seen["retractions"] += role.retractions - before["retractions"]
        seen["given back"] += role.given_back - before["given_back"]


@contextmanager
def late_results(engine: UnifiedEngine, seed: int) -> Iterator[None]:
    """What is queued has run later. Results of steps are processed when they have arrived, not before, and until then
    the streams of a step stay as they are.
    """
    hub, role, seen = engine.hub, engine.hub.role, engine.seen
    usual, device = hub.device, LateDevice(2, seed)
    step, finish_step, finish = role.step, role.finish_step, role.finish
    streams: list[Any] = []
    points = prefills = 0

    def noted_step() -> Any:
        nonlocal streams, points
        queued = step()
        streams, points = list(engine.scheduler.running_batch.reqs), hub.executor.points_passed
        return queued

    def noted_finish(task: Any) -> None:
        nonlocal prefills
        prefills += STEP in [done.id for done in hub.work.tasks.finishing]
        finish(task)

    def noted_finish_step(queued: Any) -> None:
        nonlocal prefills
        assert queued.result.copy_done.place <= device.passed, "a result is processed before it has arrived"
        assert engine.scheduler.running_batch.reqs == streams, "streams come or go while a step is in flight"
        seen["steps behind which prefills ran"] += hub.executor.points_passed > points
        seen["prefills that ended while a step was in flight"] += prefills
        prefills = 0
        finish_step(queued)

    role.step, role.finish_step, role.finish = noted_step, noted_finish_step, noted_finish
    engine.use(device)
    try:
        yield
    finally:
        engine.use(usual)
        del role.step, role.finish_step, role.finish


class AtOnce(StepAhead):
    """A step is queued as soon as one is in flight, if nothing else can run."""

    @property
    def queue_at_s(self) -> float:
        return -math.inf


@contextmanager
def steps_ahead(engine: UnifiedEngine, seed: int) -> Iterator[None]:
    """What is queued has run later, and steps are queued behind those in flight."""
    hub, role, seen = engine.hub, engine.hub.role, engine.seen
    usual, finish_step, device = hub.device, role.finish_step, LateDevice(2, seed)

    def noted_finish_step(queued: Any) -> None:
        seen["steps ahead"] += queued.is_ahead
        assert queued.result.logits_output.next_token_logits is None, "memory that the step behind it may need"
        seen["tokens of streams that have ended"] += sum(req.finished() for req in queued.batch.reqs)
        finish_step(queued)

    role.finish_step = noted_finish_step
    engine.use(device)
    assert role.steps_ahead
    hub.ahead = AtOnce()
    try:
        yield
    finally:
        hub.ahead = None
        engine.use(usual)
        del role.finish_step


@dataclass
class Play:
    """What became of a round."""

    answers: dict[str, Answer]
    left: set[str]
    seen: Counter[str]


def play(
    engine: UnifiedEngine,
    asked: Mapping[str, Ask],
    dropped: Collection[str],
    seed: int,
    switch_probability: float,
    at_once: bool = False,
    late: bool = False,
    ahead: bool = False,
) -> Play:
    """Submit what is ``asked``, now and then or ``at_once``, abort what is ``dropped`` at some time, and run it all;
    with results that come ``late``, if they shall, or with steps ``ahead`` as well.
    """
    rng = random.Random(seed)
    engine.forget()
    engine.seen.clear()
    left: set[str] = set()

    def abort(rid: str) -> None:
        if rid not in engine.answers:
            left.add(rid)
        engine.seen[f"aborts: {state_of(engine, rid)}"] += 1
        engine.abort(rid)
        engine.turn()

    results = steps_ahead(engine, seed) if ahead else late_results(engine, seed) if late else nullcontext()
    with chance(engine, rng.randrange(1 << 30), switch_probability), results:
        for rid, ask in asked.items():
            engine.submit(rid, ask)
            if rid in dropped and rng.random() < 0.2:
                abort(rid)
            for _ in range(0 if at_once else rng.randrange(6)):
                engine.turn()
        for rid in sorted(set(dropped) - left):
            abort(rid)
            for _ in range(rng.randrange(12)):
                engine.turn()
        engine.run()
    return Play(dict(engine.answers), left, Counter(engine.seen))


def play_and_flush(engine: UnifiedEngine, *arguments: Any) -> Play:
    """``play``, and nothing is left behind."""
    played = play(engine, *arguments)
    engine.assert_clean()
    return played


@dataclass
class Rounds:
    """Rounds of random requests with aborts, all of it compared."""

    unified: Remote
    comparison: StockComparison
    asks: Sequence[Ask]
    late: bool = False
    ahead: bool = False
    """``play``'s."""
    flushes: bool = True
    """Whether nothing stays in the radix cache between two rounds."""
    requests: tuple[int, int] = FEW
    """How many a round has."""
    seen: Counter[str] = field(default_factory=Counter)

    def run(self, rounds: int, first: int = 0) -> None:
        """Raises AssertionError at the end of the first round with an answer that is not SGLang's."""
        for number in range(first, first + rounds):
            self.play(random.Random(number))
            self.comparison.assert_same()

    def play(self, rng: random.Random) -> None:
        """One round."""
        asked = {f"s{i:02}": rng.choice(self.asks) for i in range(rng.randrange(*self.requests))}
        if rng.random() < 0.5:
            asked["twin"] = asked["s00"]
        dropped = {rid for rid in asked if rng.random() < 0.2}
        chances = rng.randrange(1 << 30), rng.choice(SWITCH_PROBABILITIES), rng.random() < 0.3
        how = *chances, self.late, self.ahead
        played = self.unified.call(play_and_flush if self.flushes else play, asked, dropped, *how)
        deepest = max(self.seen["deepest"], played.seen["deepest"])
        self.seen += played.seen
        self.seen["deepest"] = deepest
        self.comparison.compare(asked, played.answers, played.left)

    def __str__(self) -> str:
        return f"{', '.join(f'{count:,} {what}' for what, count in sorted(self.seen.items()))}; {self.comparison}"
