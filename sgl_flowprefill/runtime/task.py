"""A prefill task: one forward pass over a batch, in a greenlet, that can be suspended at its checkpoints."""

from __future__ import annotations

import contextvars
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from greenlet import greenlet

from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.device import CpuDevice, Device, Stamp
from sgl_flowprefill.runtime.failure import Failure, ends_server
from sgl_flowprefill.runtime.forward_state import ForwardState
from sgl_flowprefill.runtime.tiled_attention import tile_queries

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class PrefillTask:
    """A started batch."""

    id: int
    batch: Any
    """SGLang's ScheduleBatch."""
    arrival_s: float
    deadline_s: float
    readable_s: float
    """When the scheduler process could first have read that the request it was started for can be run."""
    predicted_s: float
    attention_share: float
    """Of its time, the part that is attention's."""
    attn_backend: Any
    job: Job[PrefillTask] = field(init=False)
    """What the policy sees of it."""
    checkpoint: int = 0
    """Checkpoints passed so far."""
    points: int = 0
    """Interruption points passed so far: checkpoints, and places between tiles."""
    spans: list[tuple[Stamp, Stamp]] = field(default_factory=list, repr=False)
    """Where it ran in the device's queue, from each start or resume to the suspension or end that followed."""
    result: Any = None
    """What the forward pass returned, once done."""
    done: bool = False
    failure: Failure | None = None
    """What ended the forward pass before it was done, if something did."""
    _greenlet: Any = field(default=None, repr=False)
    _state: ForwardState | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.job = Job(self, self.arrival_s, self.deadline_s, self.predicted_s, len(self.batch.reqs), started=True)

    @property
    def started(self) -> bool:
        """Whether it has run before; it may have been suspended within its first operator."""
        return self._greenlet is not None

    @property
    def executed_s(self) -> float:
        """Device time for which it ran, without the time for which it was suspended. Known once that has passed."""
        return sum(begin.seconds_until(end) for begin, end in self.spans)

    @property
    def rids(self) -> list[str]:
        return [req.rid for req in self.batch.reqs]

    @property
    def new_tokens(self) -> int:
        return int(self.batch.extend_num_tokens)

    @cached_property
    def logprob_rows(self) -> int:
        """Tokens of its prompts whose log probabilities are asked for."""
        return sum(map(input_logprobs, self.batch.reqs))


def input_logprobs(req: Any) -> int:
    """Of how many tokens of the prompt of SGLang's ``req`` log probabilities are asked for; cached ones are computed
    again for that.
    """
    if not req.return_logprob or req.logprob_start_len < 0:
        return 0
    return max(0, len(req.origin_input_ids) - int(req.logprob_start_len))


class Executor:
    """Runs one task at a time, and comes back when it is done or has failed, or is ``interrupted`` at a checkpoint."""

    def __init__(
        self,
        model_runner: Any,
        interrupted: Callable[[], bool],
        device: Device | None = None,
        ends_waiting: Callable[[], bool] | None = None,
    ) -> None:
        """``interrupted`` is asked once at each interruption point; what ends a wait for the device there is
        ``ends_waiting``, or ``interrupted`` again if that is None.
        """
        self._model_runner = model_runner
        self._interrupted = interrupted
        self._ends_waiting = ends_waiting
        self._device = device or CpuDevice()
        self._running: PrefillTask | None = None
        self._own_error: Exception | None = None
        """What was raised at an interruption point, and not by the model."""
        self.points = 0
        """Interruption points that tasks have passed."""

    def checkpoint(self) -> None:
        """Called by the model after each operator; may not return before much later."""
        if self._running is not None:  # no task: a forward outside any, such as the profile's
            self._running.checkpoint += 1
            self._pass_point(self._running)

    def between_tiles(self) -> None:
        """Called inside a long operator: like a checkpoint, but no progress by which time left could be told."""
        if self._running is not None:
            self._pass_point(self._running)

    def _pass_point(self, task: PrefillTask) -> None:
        self.points += 1
        task.points += 1
        try:
            self._device.record()
            stops = self._interrupted() or not self._device.catch_up(self._ends_waiting or self._interrupted)
        except Exception as error:
            self._own_error = error
            raise
        if stops:
            task._greenlet.parent.switch()

    def run(self, task: PrefillTask, forward: Callable[[Any], Any]) -> None:
        """Start or resume ``task`` with ``forward(batch)``, until it is done, has failed or is interrupted.

        Raises what no task can be blamed for: errors of an interruption point, and of the device itself.
        """
        if task._greenlet is None:
            task._greenlet = self._new_greenlet(task, forward)
            task._state = ForwardState.capture(self._model_runner).with_backend(task.attn_backend)
        self._switch(task, task._greenlet.switch)

    def cancel(self, task: PrefillTask) -> None:
        """End the forward of a ``task`` that is suspended or has failed: its context managers exit, and its activations
        are freed.
        """
        if task._greenlet is not None:
            if not task._greenlet.dead:
                self._switch(task, task._greenlet.throw)
            # The next plan in its attention slot overwrites host buffers that queued copies may still read.
            self._device.drain()

    def _switch(self, task: PrefillTask, switch: Callable[[], Any]) -> None:
        hub_state = ForwardState.capture(self._model_runner)
        assert task._state is not None
        task._state.install(self._model_runner)
        self._running = task
        begin = self._device.stamp()
        try:
            switch()
        finally:
            task.spans.append((begin, self._device.stamp()))
            self._running = None
            task._state = ForwardState.capture(self._model_runner)
            hub_state.install(self._model_runner)

    def _new_greenlet(self, task: PrefillTask, forward: Callable[[Any], Any]) -> Any:
        def body() -> None:
            try:
                task.result = forward(task.batch)
                task.done = True
            except Exception as error:
                if self._own_error is not None or ends_server(error):
                    raise
                task.failure = Failure.of(error, task.points, task.rids)

        new = greenlet(body)
        new.gr_context = contextvars.copy_context()
        return new


class AttentionSlots:
    """Attention backends for tasks that live at the same time: a backend keeps the metadata of one batch.

    The first slot is the model runner's own backend; others are made when needed and reused. FlashInfer's backends have
    plans and integer workspaces of their own and share the large float workspace, which holds partial results within
    one attention kernel and the merge that follows it on the same stream: a task is never suspended between the two.
    """

    def __init__(
        self,
        model_runner: Any,
        between_tiles: Callable[[], None] | None,
        tile_pairs: Callable[[], float] = lambda: math.inf,
    ) -> None:
        """Attention runs in tiles of ``tile_pairs()`` pairs, asked for when a slot is taken; None: whole."""
        self._model_runner = model_runner
        self._between_tiles = between_tiles
        self._tile_pairs = tile_pairs
        self._free = [model_runner.attn_backend]
        whole = self._tile(model_runner.attn_backend)
        if whole is not None:
            self._between_tiles = None  # nor can its other slots: not asked again at every start
            logger.warning("FlowPrefill does not split long attention operators of %s", whole)

    def take(self) -> Any:
        backend = self._free.pop() if self._free else self._new()
        self._tile(backend)
        return backend

    def measure_bytes(self, allocated_bytes: Callable[[], int]) -> int:
        """Make a slot ahead of its use; device memory that it took."""
        before_bytes = allocated_bytes()
        self._free.append(self._new())
        return allocated_bytes() - before_bytes

    def give_back(self, backend: Any) -> None:
        self._free.append(backend)

    def _new(self) -> Any:
        backend = self._model_runner._get_attention_backend(init_new_workspace=False)
        self._model_runner.kv_index_translator.bind_and_verify_backends([backend])
        return backend

    def _tile(self, backend: Any) -> str | None:
        return None if self._between_tiles is None else tile_queries(backend, self._between_tiles, self._tile_pairs())
