"""Runs forward passes in greenlets, so that each can be suspended at an interruption point."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from greenlet import greenlet
from torch import distributed as dist

from sgl_flowprefill.hub.device import CpuDevice, Device, never
from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.runtime.forward_state import ForwardState
from sgl_flowprefill.runtime.point_log import PointLog

DEVICE_ERRORS: Final = ("CUDA error", "CUDA driver error", "device-side assert", "NCCL error", "cuDNN error")
"""In the messages of errors after which a CUDA context or a communicator may be unusable."""


class State(Protocol):
    """What a switch saves of the process's state, and restores (``ForwardState``)."""

    def install(self, model_runner: Any) -> None: ...

    def with_backend(self, attn_backend: Any) -> State: ...


@dataclass
class _Forward:
    """A forward pass while it does not run."""

    greenlet: Any
    state: State


class Executor:
    """Runs one task at a time, and comes back when it is done, has failed, or is ``interrupted`` at a preemption
    checkpoint.
    """

    def __init__(
        self,
        model_runner: Any,
        interrupted: Callable[[], bool],
        device: Device | None = None,
        ends_waiting: Callable[[], bool] | None = None,
        capture: Callable[[Any], State] = ForwardState.capture,
    ) -> None:
        """``interrupted`` is asked once at each interruption point; what ends a wait for the device there is
        ``ends_waiting``, or ``interrupted`` again without that. ``capture(model_runner)``: what a switch saves.
        """
        self._model_runner = model_runner
        self.interrupted = interrupted
        self.ends_waiting = ends_waiting or interrupted
        self.device = device or CpuDevice()
        self._capture = capture
        self.point_log: PointLog | None = None
        """Is told of each interruption point, where somebody wants to know."""
        self.running: PrefillTask | None = None
        self._own_error: Exception | None = None
        """What was raised at an interruption point, and not by the model."""
        self.points_passed = 0
        """Interruption points that tasks have passed."""

    def checkpoint(self) -> None:
        """Called by the model after each operator; may not return before much later."""
        if self.running is not None:  # no task: a forward outside any, such as the profile's
            self.running.operators_passed += 1
            self.running.tiles_passed = 0
            self._pass_point(self.running)

    def between_tiles(self) -> None:
        """Called inside a long operator: like ``checkpoint``, but no progress by which time left could be told."""
        if self.running is not None:
            self.running.tiles_passed += 1
            self._pass_point(self.running)

    def _pass_point(self, task: PrefillTask) -> None:
        self.points_passed += 1
        task.points_passed += 1
        try:
            if self.point_log is not None:
                self.point_log.passed(task)
            self.device.record()
            stops = self.interrupted() or not self.device.catch_up(self.ends_waiting)
        except Exception as error:
            self._own_error = error
            raise
        if stops:
            task.suspended_forward.greenlet.parent.switch()

    def run(self, task: PrefillTask, forward: Callable[[Any], Any]) -> None:
        """Start or resume ``task`` with ``forward(batch)``, until it is done, has failed or is interrupted.

        Raises what no task can be blamed for: errors of an interruption point, and of the device itself.
        """
        if not task.has_run:
            task.has_run = True
            state = self._capture(self._model_runner).with_backend(task.attn_backend)
            task.suspended_forward = _Forward(self._new_greenlet(task, forward), state)
        self._switch(task, task.suspended_forward.greenlet.switch)

    def cancel(self, task: PrefillTask) -> None:
        """End the forward of a ``task`` that is suspended or has failed: its context managers exit, and its activations
        are freed.
        """
        if task.has_run:
            forward, (_, last) = task.suspended_forward, task.spans[-1]
            if not forward.greenlet.dead:
                self._switch(task, forward.greenlet.throw)
            # The next plan in its attention slot overwrites host buffers that copies may still read which it queued.
            self.device.wait(last, never)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """A context for a forward pass outside of tasks: where it raises, the process's state is again as it was."""
        state = self._capture(self._model_runner)
        try:
            yield
        except Exception:
            state.install(self._model_runner)
            raise

    def _switch(self, task: PrefillTask, switch: Callable[[], Any]) -> None:
        hub_state = self._capture(self._model_runner)
        forward: _Forward = task.suspended_forward
        forward.state.install(self._model_runner)
        self.running = task
        self._own_error = None
        begin = self.device.stamp()
        try:
            switch()
        finally:
            task.spans.append((begin, self.device.stamp()))
            self.running = None
            forward.state = self._capture(self._model_runner)
            hub_state.install(self._model_runner)
            if self.point_log is not None:
                self.point_log.stopped(task)

    def _new_greenlet(self, task: PrefillTask, forward: Callable[[Any], Any]) -> Any:
        def body() -> None:
            try:
                task.result = forward(task.batch)
                task.done = True
            except Exception as error:
                if self._own_error is not None or ends_server(error):
                    raise
                task.failure = Failure.of(error, task.points_passed, task.rids)

        new = greenlet(body)
        new.gr_context = contextvars.copy_context()
        return new


def ends_server(error: Exception) -> bool:
    """Whether ``error`` says more about the process than about one prefill: nothing that runs after it can be trusted.

    Out of memory is not of that kind: PyTorch has raised it before a kernel was queued.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, (torch.AcceleratorError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERRORS)
