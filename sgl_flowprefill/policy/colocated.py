"""Prefills and decode steps on one server: one object decides which of them runs now. No torch, no SGLang, no clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, Final, Generic, TypeVar

from sgl_flowprefill.policy.base import Job, Policy
from sgl_flowprefill.policy.decode import (
    MARGIN_OF_TBT,
    NO_LOAD,
    CorrectedSteps,
    DecodeLimits,
    DecodeLoad,
    Joiner,
    Margin,
    NoSteps,
    StepModel,
    Stream,
    Streams,
    decode_load,
    may_join,
)

R = TypeVar("R")
K = TypeVar("K")


LEAST_TURN_S: Final = 0.05
MOST_TURN_S: Final = 2.0
"""How long a retracted request that finds no KV cache keeps others from starting, before it lets them."""


class Act(Enum):
    """What runs now."""

    STEP = auto()
    """A decode step over all streams."""
    TASK = auto()
    """A task that has started."""
    START = auto()
    """A new task for a waiting request."""
    NOTHING = auto()


@dataclass(frozen=True, slots=True)
class Turn(Generic[R, K]):
    """What runs now, and until when that holds if nothing else happens."""

    act: Act
    job: Job[R] | Job[K] | None = None
    """The task to go on, or the request to start."""
    ask_again_s: float = math.inf


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A decode step that has begun, and what was known then."""

    begin_s: float
    requests: int
    widest: int
    context_tokens: int
    """What the time of a step depends on (``Streams``)."""
    load: DecodeLoad


class ColocatedPolicy(Generic[R, K]):
    """A prefill policy beside the decode steps of streams. Without streams it is that policy.

    * A step runs when it has to start (``DecodeLoad.start_by_s``), and whenever no prefill can run.
    * Else a retracted request starts, if there is one: somebody waits for the rest of its answer. Where it finds no KV
      cache, others wait with it for as long as its objective for a first token says, and start for as long then, in
      turns.
    * Else the prefill policy picks. It plans with the time that steps will take.

    So streams get their tokens in time wherever their objectives leave prefills ``1 - max_share`` of the time, and
    prefills get that share where they do not. With exact times, if each step starts no later than a margin after it has
    to (a prefill runs to its next preemption checkpoint, and steps grow by what has joined since), no token comes later
    than

        max(TBT objective, step / max_share) + margin

    after the one before it.
    """

    def __init__(
        self, prefills: Policy[R, K], model: StepModel | None = None, limits: DecodeLimits | None = None
    ) -> None:
        """``model``: how long steps take; left out on a server that has no streams."""
        self.prefills = prefills
        self.limits = limits or DecodeLimits()
        self.streams = Streams()
        self.load: DecodeLoad = NO_LOAD
        self._begun: deque[RunningStep] = deque()
        """The step that runs, and the one that is queued behind it, if there are such."""
        self.margin = Margin()
        self._model = CorrectedSteps(model or NoSteps())
        self._returning: list[Job[R]] = []
        """Waiting requests that have part of their answers, in the order in which they were retracted."""

    # ---- streams ----------------------------------------------------------------------------------------------------

    def joined(self, streams: Iterable[Stream]) -> None:
        """Prefills have ended: ``streams`` have their first tokens."""
        for stream in streams:
            self.streams.join(stream)
        self._plan()

    def left(self, streams: Iterable[Stream]) -> None:
        """``streams`` have ended, or are retracted."""
        for stream in streams:
            self.streams.leave(stream)
        self._plan()

    def returned(self, job: Job[R]) -> None:
        """``job``, which waits among the prefills, was a stream and has been retracted: it starts before all others."""
        self._returning.append(job)

    def returns(self, job: Job[R]) -> bool:
        """Whether the waiting ``job`` was a stream, and starts before all others."""
        return any(other is job for other in self._returning)

    def shut_until_s(self, job: Job[R], now_s: float) -> float:
        """Until when nobody else starts if ``job``, which is to start at ``now_s``, finds no KV cache and none is
        freed: others may find some then.
        """
        if self._returning and job is self._returning[0] and _goes_first(job, now_s):
            turn_s = _turn_s(job)
            return job.arrival_s + turn_s * ((now_s - job.arrival_s) // turn_s + 1)
        return self.prefills.turn_ends_s(job)

    def waits_no_longer(self, job: Job[R]) -> None:
        """``job`` has started, or is not wanted any more."""
        if self._returning:
            self._returning = [other for other in self._returning if other is not job]

    @property
    def step(self) -> RunningStep | None:
        """The step that has begun and ends next: until it has, no other is asked for."""
        return self._begun[0] if self._begun else None

    def began(self, begin_s: float) -> None:
        """A step over the streams of now begins. Streams that join before it has ended take part in the next one. It
        may be queued behind one that runs, though nobody has asked for it: it runs early then.
        """
        assert len(self._begun) < 2, "one step runs, and one is queued behind it"
        load, streams = NO_LOAD if self._begun else self.load, self.streams
        self._begun.append(RunningStep(begin_s, streams.requests, streams.widest, streams.context_tokens, load))
        self.streams.begin_step()

    def stepped(self, end_s: float, ended: Iterable[Stream] = (), took_s: float | None = None) -> None:
        """The step that began has ended at ``end_s``, when the scheduler had handed out its tokens; ``ended`` are the
        streams that have their last ones. ``took_s``: its own time until then, where the device had other work to do
        first.
        """
        assert self._begun, "a step that ends has begun"
        step = self._begun.popleft()
        if self._begun:  # until now, the device has run the one before it
            self._begun[0] = replace(self._begun[0], begin_s=max(end_s, self._begun[0].begin_s))
        if step.begin_s >= step.load.start_by_s:  # one that ran early, for want of prefills, shows no lateness
            self.margin.observe(end_s - step.load.start_by_s - step.load.step_s)
        self._model.observe(step.widest, step.context_tokens, end_s - step.begin_s if took_s is None else took_s)
        self.streams.stepped(end_s)
        self.left(ended)

    @property
    def step_by_s(self) -> float:
        """When the next step has to start; infinity while one runs."""
        return self.load.start_by_s if self.step is None else math.inf

    @property
    def may_step(self) -> bool:
        """Whether there are streams, and no step runs."""
        return self.streams.requests > 0 and self.step is None

    @property
    def margin_s(self) -> float:
        """How much earlier than needed a step starts."""
        if self.limits.margin_s is not None:
            return self.limits.margin_s
        return self.margin.value_s(MARGIN_OF_TBT * self.streams.tightest_s())

    def _plan(self) -> None:
        self.load = decode_load(self.streams, self._model, self.limits, self.margin_s)
        if self.limits.charged:
            self.prefills.charge(self.load)

    # ---- decisions --------------------------------------------------------------------------------------------------

    def next(self, now_s: float, running: Job[K] | None, admit: bool = True) -> Turn[R, K]:
        """What runs at ``now_s``. ``running`` and ``admit`` are the prefill policy's: see ``Policy.pick``."""
        if now_s >= self.step_by_s or (not admit and self._decodes_ahead(now_s, running)):
            return Turn(Act.STEP)
        job = self._first_returning(now_s, running, admit) or self.prefills.pick(now_s, running, admit)
        if job is None:
            return Turn(Act.STEP if self.may_step else Act.NOTHING)
        return Turn(Act.TASK if job.started else Act.START, job, self.step_by_s)

    def may_join(self, requests: int, tokens: int, joiners: Sequence[Joiner] = (), is_waited_for: bool = False) -> bool:
        """Whether a task may start after which ``requests`` with ``tokens``, those of live tasks among them, join the
        streams. ``joiners``: what is known of the new ones; ``is_waited_for``: whether all others wait with them.
        """
        return may_join(self.streams, requests, tokens, self._model, self.limits, joiners, is_waited_for)

    @property
    def can_retract(self) -> bool:
        """Whether streams can make room for the next step by giving up their own KV cache, so that one of them is left
        and gets its token: the others have some that nobody shares.
        """
        return self.streams.fewest_served > 1

    def give_back(
        self,
        now_s: float,
        tokens: int,
        held_tokens: Callable[[K], int],
        executed_s: Callable[[K], float],
    ) -> list[Job[K]]:
        """Tasks to give up so that ``tokens`` of KV cache get free for streams; all tasks where that is not enough.

        Their requests wait again. First those that are less than half done; of these, those that the prefill policy
        would let go; of these, those that have executed least for the KV cache that they hold. Tasks need no more KV
        cache to end, and with none left the server is a stock one, so nothing can deadlock. Tasks that hold none where
        it is lacking go on.
        """

        def order(job: Job[K]) -> tuple[bool, bool, float, int]:
            done_s = executed_s(job.item)
            return (
                done_s > job.remaining_s,
                self.prefills.keeps(job, now_s),
                done_s / max(1, held_tokens(job.item)),
                job.number,
            )

        given: list[Job[K]] = []
        for job in sorted(self.prefills.started, key=order):
            if tokens <= 0:
                break
            if held_tokens(job.item) > 0:
                given.append(job)
                tokens -= held_tokens(job.item)
        return given

    def _first_returning(self, now_s: float, running: Job[K] | None, admit: bool) -> Job[R] | None:
        """The retracted request that starts now."""
        if not self._returning or not admit or not self.prefills.may_start(running):
            return None
        return self._returning[0] if _goes_first(self._returning[0], now_s) else None

    def _decodes_ahead(self, now_s: float, running: Job[K] | None) -> bool:
        """Whether a step goes first because KV cache is short for the request that would win, and steps free some."""
        if not self.limits.ahead or not self.may_step:
            return False
        rest_s = self.load.step_s * (1 / self.limits.max_share - 1)
        if now_s < self.streams.last_step_s + rest_s:
            return False
        winner = self.prefills.pick(now_s, running, admit=True)
        return winner is not None and not winner.started


def _goes_first(job: Job[Any], now_s: float) -> bool:
    """Whether the retracted ``job`` goes before all others, or lets others start. It does both in turns, from when it
    was retracted, each for as long as its objective says, within bounds.
    """
    return (now_s - job.arrival_s) // _turn_s(job) % 2 == 0


def _turn_s(job: Job[Any]) -> float:
    return min(max(job.deadline_s - job.arrival_s, LEAST_TURN_S), MOST_TURN_S)
