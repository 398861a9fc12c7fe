"""Exploration: a server that has nothing to do runs a shape whose time is least known, and learns from it.

A shape is a forward pass of random tokens in a greenlet, like a task's. It runs within one turn of the hub in which
nothing else can run, so never beside a task, and comes back at the first preemption checkpoint at which something has
happened. It is given up then, not suspended: its KV cache and attention slot belong to the requests that come. While it
is prepared, what happens is looked at between two prompts whose prefixes are matched, and before each batch is made.
Its KV cache is taken where it is free, so that no cached prefix is evicted for it, and never becomes a cached prefix.
Neither the policy, nor SGLang's queues and counters of requests, nor the event log hear of it.

Before each shape, a reference of the profile runs: it tells how slow the machine is at that time.

Tensor-parallel ranks meet whenever nothing can run. The one that decides has looked at its clock, at what is known, and
at some prompts by then; the others look at the same prompts, which touches the radix cache, and all compute the same
shape: their random tokens are the same. They meet before each of its two batches, and leave it at the same point.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain, repeat
from math import inf, log
from typing import Any, Final, NamedTuple, Protocol

from sgl_flowprefill.hub.device import Device
from sgl_flowprefill.hub.parts import Agreement, Executor, Exploration, Recorder, Slots
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask
from sgl_flowprefill.profiling.design import Shape, make_design, references
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.exploration import Candidates
from sgl_flowprefill.ttft.learning import RefittedTTFT

logger = logging.getLogger(__name__)

QUIET_S: Final = 3.0
"""Seconds after a task within which others are likely."""
REST_S: Final = 60.0
"""Seconds without exploration after the start of a server, and after nothing was found that it may run."""
HOUR_S: Final = 3600.0
NO_SHAPE: Final = -1
"""In place of a shape's number: none runs now."""
GIVEN_UP: Final = -2
"""The same, as something happened while one was looked for."""


class Engine(Protocol):
    """What makes batches that nobody asked for (``profiling.measure.SchedulerEngine``)."""

    @property
    def limit_tokens(self) -> int:
        """Longest prompt."""

    def can_run(self) -> bool:
        """Whether the model and its KV cache are in place."""

    def find_prefix(self, interrupted: Callable[[], bool]) -> int:
        """How many tokens of a prefix are cached, which prompts begin with from now on; of those that were looked at
        before ``interrupted()``.
        """

    def has_room(self, requests: int, new_tokens: int) -> bool:
        """Whether there is free KV cache for so many requests with so many ``new_tokens``."""

    def make_batch(self, shape: Shape) -> Any | None:
        """A batch of ``shape``; None where it has no KV cache."""

    def shapes(self, batch: Any) -> Sequence[PrefillShape]:
        """What ``batch`` computes."""

    def free(self, batch: Any) -> None:
        """Free what ``batch`` holds."""


class Timing(NamedTuple):
    """A forward pass that ran to its end."""

    shapes: Sequence[PrefillShape]
    time_s: float


@dataclass(eq=False)
class Explorer(Exploration):
    """Explores for a share of the time."""

    engine: Engine
    executor: Executor
    slots: Slots
    device: Device
    ttft: RefittedTTFT | None
    """What learns, at the rank that decides; None at the others."""
    recorder: Recorder
    agreement: Agreement
    pending: Callable[[], bool]
    """Whether something has happened, for which nothing begins."""
    share: float
    """After each exploration, none begins until it has been this share of the time since it began. None takes longer
    than this share of an hour.
    """
    quiet_s: float = QUIET_S
    rest_s: float = REST_S
    now_s: Callable[[], float] = time.monotonic
    uncounted: Callable[[], AbstractContextManager[None]] = nullcontext
    """A context in which SGLang counts nothing that runs."""
    _ended: int = field(default=0, init=False)
    _given_up: int = field(default=0, init=False)
    _total_s: float = field(default=0.0, init=False)
    _next_s: float = field(init=False)
    """When the next exploration may begin."""
    _has_failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._shapes = make_design(self.engine.limit_tokens)
        self._candidates = Candidates(self._shapes)
        self._references = references(self.engine.limit_tokens)
        self._next_s = self.now_s() + self.rest_s

    def explore(self, idle_since_s: float, forward: Callable[[Any], Any]) -> bool:
        begin_s = self.now_s()
        chosen = () if self.ttft is None else self._choose(self.ttft, begin_s, idle_since_s)
        number, looks = self.agreement.agree(chosen)
        if self.ttft is None:
            self.engine.find_prefix(chain(repeat(False, looks), repeat(True)).__next__)
        if number == NO_SHAPE:
            return False
        if number != GIVEN_UP and self._learn(self._shapes[number], forward):
            self._ended += 1
        else:
            self._given_up += 1
        took_s = self.now_s() - begin_s
        self._total_s += took_s
        self._next_s = begin_s + took_s / self.share
        self.recorder.explored(took_s)
        return True

    def state(self) -> Mapping[str, float]:
        return {
            "share": 0.0 if self._has_failed else self.share,
            "explored": self._ended,
            "given_up": self._given_up,
            "seconds": round(self._total_s, 3),
        }

    def _choose(self, ttft: RefittedTTFT, now_s: float, idle_since_s: float) -> tuple[int, int]:
        """The number of the shape that runs now, NO_SHAPE or GIVEN_UP, and how many prompts were looked at for it."""
        looks = 0
        if self._has_failed or now_s < max(self._next_s, idle_since_s + self.quiet_s) or not self.engine.can_run():
            return NO_SHAPE, looks

        def interrupted() -> bool:
            nonlocal looks
            ends = self.pending()
            looks += not ends
            return ends

        cached_tokens = self.engine.find_prefix(interrupted)
        if self.pending():
            return GIVEN_UP, looks
        shape = self._candidates.take(ttft, lambda shape: self._may_run(ttft, shape, cached_tokens))
        if shape is None:
            self._next_s = now_s + self.rest_s
            return NO_SHAPE, looks
        return self._shapes.index(shape), looks

    def _may_run(self, ttft: RefittedTTFT, shape: Shape, cached_tokens: int) -> bool:
        return (
            max(request.cached_tokens for request in shape) <= cached_tokens
            and self.engine.has_room(len(shape), _new_tokens(shape))
            and self.engine.has_room(1, _new_tokens(self._nearest_reference(shape)))
            and ttft.correction * ttft.model.predict_s(shape) <= self.share * HOUR_S
        )

    def _learn(self, shape: Shape, forward: Callable[[Any], Any]) -> bool:
        """Time a reference and ``shape``, and learn from it. Whether both ran to their ends."""
        reference = self._time(self._nearest_reference(shape), forward)
        timing = self._time(shape, forward) if reference is not None else None
        if reference is None or timing is None:
            return False
        if self.ttft is not None and reference.time_s > 0 and timing.time_s > 0:
            self.ttft.explored(*timing, slowness=self.ttft.slowness(*reference))
        return True

    def _nearest_reference(self, shape: Shape) -> Shape:
        return min(self._references, key=lambda reference: abs(log(_new_tokens(reference) / _new_tokens(shape))))

    def _time(self, shape: Shape, forward: Callable[[Any], Any]) -> Timing | None:
        """None at all ranks or at none of them, as is whether ``_learn`` goes on."""
        [is_interrupted] = self.agreement.agree([self.pending()])
        batch = None if is_interrupted else self.engine.make_batch(shape)
        if batch is None:
            return None
        shapes, slot = self.engine.shapes(batch), self.slots.take()
        task = PrefillTask(
            NO_TASK, batch, [], shapes, arrival_s=0.0, deadline_s=inf, predicted_s=0.0, attn_backend=slot
        )
        with self.uncounted():
            self.executor.run(task, forward)
            if not task.done:
                self.executor.cancel(task)
        if task.done and task.result.copy_done is not None:
            self.device.wait(task.result.copy_done, lambda: False)
        self.slots.give_back(slot)
        self.engine.free(batch)
        if task.failure is not None:
            self.agreement.agree(failed_at=task.failure.place)
            self._has_failed = True
            logger.warning(
                "FlowPrefill explores no shapes any more, as a prefill of %s failed:\n%s", shape, task.failure.traceback
            )
        return Timing(shapes, task.executed_s) if task.done else None


def _new_tokens(shape: Shape) -> int:
    return sum(request.new_tokens for request in shape)
