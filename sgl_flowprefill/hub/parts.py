"""What the hub is made of, besides its role, the policy and the device: what it asks of each part."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from sgl_flowprefill.hub.failure import Failure
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.pace import Pace
from sgl_flowprefill.policy import Job
from sgl_flowprefill.ttft import Prediction, PrefillShape


class TTFT(Protocol):
    """Predicts how long batches take (``ttft.AdaptiveTTFT``)."""

    @property
    def correction(self) -> float:
        """Measured over profiled time of the last tasks."""

    @property
    def yardstick_s(self) -> float:
        """Expected time of the YARDSTICK (``ttft.base``)."""

    def predict(self, batch: Sequence[PrefillShape]) -> Prediction:
        """What is known of ``batch`` before it runs."""

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        """What slack is computed with."""

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        """What prefills of about the size of ``batch`` have in common."""

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Prediction:
        """A task of ``batch`` executed for ``measured_s``; what was predicted before this was known."""

    def follow(self) -> bool:
        """Bring the paces up to date. Whether any has changed."""

    def state(self) -> Mapping[str, float]:
        """For metrics."""


class Learning:
    """Offers TTFT models that are better than the one in use. Offers none."""

    def look_for_offer(self) -> bool:
        """Take in what has been learned by now. Whether a better model is on offer. Called at the rank that decides."""
        return False

    def adopt(self) -> None:
        """Predict with the model on offer from now on. Called at all ranks, in the same turn."""


class Exploration:
    """Runs what nobody asked for, while there is nothing to do. Runs nothing."""

    def explore(self, idle_since_s: float, forward: Callable[[Any], Any]) -> bool:
        """Nothing can run, and no task has run since ``idle_since_s``; infinity while requests wait for other servers.
        Run something with ``forward(batch)``, until something happens. Whether something was run. Called at all ranks,
        whatever each would say.
        """
        return False

    def state(self) -> Mapping[str, float]:
        """What it has cost."""
        return {"share": 0.0}


class Executor(Protocol):
    """Runs forward passes that can be suspended (``runtime.executor``)."""

    points_passed: int
    """Interruption points that tasks have passed."""

    def run(self, task: PrefillTask, forward: Callable[[Any], Any]) -> None:
        """Start or resume ``task`` with ``forward(batch)``, until it is done, has failed or is interrupted."""

    def cancel(self, task: PrefillTask) -> None:
        """Unwind the forward pass of a ``task`` that is suspended or has failed."""


class Slots(Protocol):
    """Attention state, of which each task has its own (``runtime.slots``)."""

    def take(self) -> Any: ...

    def give_back(self, backend: Any) -> None: ...


class Memory(Protocol):
    """Device memory for activations (``runtime.memory``)."""

    def admits(self, live_tokens: Sequence[int], new_tokens: int, logprob_rows: int = 0) -> bool:
        """Whether a task of ``new_tokens`` may start beside live ones; the one of them with the most ``logprob_rows``
        computes these at its end.
        """


class Tiles(Protocol):
    """The parts in which long operators run (``runtime.tiles``)."""

    def follow(self, yardstick_s: float) -> None:
        """The YARDSTICK is expected to take ``yardstick_s`` now (``ttft.base``)."""


class Events(Protocol):
    """What wakes the hub (``runtime.wakeup``)."""

    def pending(self) -> bool:
        """Whether something waits to be looked at."""

    def clear(self) -> None:
        """Forget what was notified so far. Called before the hub looks at what there is: before the ranks meet at the
        one that decides, behind that at the others.
        """

    def sleep(self, timeout_s: float) -> bool:
        """Sleep until something is there, at most ``timeout_s``. Whether something is there."""


class Agreement(Protocol):
    """What tensor-parallel ranks do together (``runtime.agreement``); one rank agrees with itself."""

    @property
    def decides(self) -> bool:
        """Whether what this rank says counts."""

    @property
    def ends_waiting(self) -> Callable[[], bool]:
        """Whether a wait for the device ends early."""

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        """The ``values`` of the rank that decides, at all ranks. ``failed_at``: where this rank's task has failed."""

    def naming_the_lost(self) -> AbstractContextManager[None]:
        """Errors in this context name the rank that has ended and so caused them."""


class Recorder:
    """Is told what happens. Does nothing with it."""

    def ready(self, job: Job[WaitingRequest]) -> None:
        """A request could be started from now on."""

    def shed(self, jobs: Sequence[Job[WaitingRequest]], backlog_s: float, retry_after_s: int) -> None:
        """The requests of ``jobs`` are about to be refused, with ``backlog_s`` of predicted prefills on the server."""

    def suspended(
        self, task: PrefillTask, winner: PrefillTask, stopped_s: float, now_s: float, news_readable_s: float
    ) -> None:
        """``task``, which ran until ``stopped_s``, waits for ``winner``. The first news that led to it could have been
        read at ``news_readable_s``; infinity without any.
        """

    def resumed(self, task: PrefillTask, now_s: float) -> None:
        """``task`` runs, for the first time or again."""

    def completed(self, task: PrefillTask, prediction: Prediction) -> None:
        """``task`` is done. ``prediction`` is what the TTFT model says of it now that it has run."""

    def dropped(self, task: PrefillTask) -> None:
        """``task`` is unwound: nobody waits for it any more."""

    def given_back(self, task: PrefillTask) -> None:
        """``task`` is unwound, and its requests wait again: streams need its KV cache or its memory."""

    def failed(self, task: PrefillTask, failure: Failure) -> None:
        """The forward pass of ``task`` has raised."""

    def decided(self, cost_s: float, now_s: float) -> float:
        """By ``now_s``, what has happened was taken and what runs next was chosen, in ``cost_s``. Returns when it is to
        be told of a decision again at the latest, as long as something runs.
        """
        return math.inf

    def explored(self, time_s: float) -> None:
        """So long, the server has run what nobody asked for."""

    def flush(self) -> None:
        """Nothing runs: there is time to write."""


def blocked_since_s(winner: PrefillTask, now_s: float, news_readable_s: float) -> float | None:
    """Since when ``winner``, which takes the place of a task at ``now_s``, was blocked; None where no news led to the
    switch (``Recorder.suspended``): nobody was.
    """
    # A winner that lost an earlier decision wins because of what has happened since, and waits for it from then on.
    return min(now_s, max(winner.readable_s, news_readable_s)) if news_readable_s < math.inf else None


class OneRank:
    """The agreement of a rank that is alone."""

    decides = True

    def __init__(self, news: Callable[[], bool]) -> None:
        """``news``: whether the hub has something to look at, which interrupts a task and ends a wait."""
        self.interrupted = news
        self.ends_waiting = news

    def agree(self, values: Sequence[int] = (), failed_at: int = 0) -> Sequence[int]:
        return values

    def naming_the_lost(self) -> AbstractContextManager[None]:
        return nullcontext()
