"""What all scenarios begin and end with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from sgl_flowprefill.policy import Limits
from tests.late_device import LateDevice
from tests.prompts import prompt
from tests.unified_asks import Ask
from tests.unified_engine import UnifiedEngine, state_of
from tests.unified_rounds import Play

STREAM: Final = Ask(tuple(prompt(501, 60)), 40, (("ignore_eos", True),), tbt_slo_s=5.0)
"""A request that decodes while others are prefilled, which on a slow machine too are done before it."""
LONG: Final = Ask(tuple(prompt(502, 1800)), 6, (("ignore_eos", True),), ttft_slo_s=60.0)
URGENT: Final = Ask(tuple(prompt(503, 500)), 4, (("ignore_eos", True),), ttft_slo_s=20.0)
"""A request that goes before the long one, also on a machine that needs seconds for it."""


def anew(engine: UnifiedEngine) -> None:
    """Forget former answers. Each request is a task of its own, and all of them may be suspended."""
    engine.forget()
    engine.seen.clear()
    engine.hub.work.policy.limits = Limits(max_suspended=100, max_batch_tokens=1)


def finish(engine: UnifiedEngine, left: set[str] | None = None) -> Play:
    """Run until all is answered; the answers, of which those of clients that have ``left`` may be missing."""
    engine.run()
    engine.assert_clean()
    return Play(dict(engine.answers), left or set(), Counter(engine.seen))


def until(engine: UnifiedEngine, condition: Callable[[], bool], turns: int = 50_000) -> None:
    """Take turns until ``condition()`` is true. Raises AssertionError when it is not after so many."""
    for _ in range(turns):
        if condition():
            return
        engine.turn()
    raise AssertionError(f"not after {turns} turns")


def late_device() -> LateDevice:
    """A device on which nothing that is queued has run a turn later."""
    return LateDevice(0, seed=1, pass_probability=0.001)


@contextmanager
def with_a_step_in_flight(engine: UnifiedEngine, late: bool) -> Iterator[None]:
    """In it, if it shall be ``late``, the tokens of a step are on their way."""
    usual = engine.hub.device
    if late:
        engine.use(late_device())
        engine.step()
        assert state_of(engine, "stays") == "step in flight"
    try:
        yield
    finally:
        engine.use(usual)


def suspend_all_the_time(engine: UnifiedEngine) -> None:
    """A task comes back at each interruption point."""
    engine.hub.executor.interrupted = lambda: True


def calm(engine: UnifiedEngine) -> None:
    """A task comes back when there is news, as ever."""
    engine.hub.executor.interrupted = engine.hub.has_news


def running(engine: UnifiedEngine) -> None:
    """The request ``goes`` runs, and comes back at each interruption point."""
    suspend_all_the_time(engine)
    engine.submit("goes", LONG)
    until(engine, lambda: state_of(engine, "goes") == "running" and engine.hub.executor.points_passed > 0)
    engine.turn()


def suspended(engine: UnifiedEngine) -> None:
    """The request ``goes`` is suspended for ``urgent``."""
    running(engine)
    engine.submit("urgent", URGENT)
    until(engine, lambda: state_of(engine, "goes") == "suspended")
