"""Learning while serving: the TTFT model that keeps rows of the tasks that complete, and the process that refits it.

The scheduler's thread hands rows over and takes answers, and waits for neither. A thread of this process talks to the
refitting process (``profiling.refit_process``); should that end, whatever the cause, the next question starts another.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS
from sgl_flowprefill.hub.parts import Learning
from sgl_flowprefill.patches import affinity
from sgl_flowprefill.profiling.learned import Learned
from sgl_flowprefill.profiling.refit import Answer, Question, read_frame, write_frame
from sgl_flowprefill.profiling.refit_process import LOWEST_PRIORITY
from sgl_flowprefill.ttft import AdaptiveTTFT
from sgl_flowprefill.ttft.boosted import Fitted
from sgl_flowprefill.ttft.learning import RefittedTTFT
from sgl_flowprefill.ttft.reservoir import Reservoir

logger = logging.getLogger(__name__)

CPU_SHARE: Final = 0.008
"""Share of one core that refits may take in the long run."""
MOST_SAVED_S: Final = 7.0
"""CPU time that may be saved up, with which a server starts: it learns most then. With that share of an hour it is
about 1% of a core: what a refit takes is known when it has ended, and one that takes longer than the last is paid off
before the next.
"""


class CpuAllowance:
    """The CPU time that is there for refits."""

    def __init__(self, now_s: float) -> None:
        self._left_s = MOST_SAVED_S
        self._at_s = now_s
        self._spent_s = 0.0

    def covers(self, refit_s: float, spent_s: float, now_s: float) -> bool:
        """Whether one more refit of ``refit_s`` is within it, after ``spent_s`` so far. One that takes more than can be
        saved up waits until all of that is there.
        """
        earned_s = CPU_SHARE * (now_s - self._at_s)
        self._left_s = min(self._left_s - (spent_s - self._spent_s) + earned_s, MOST_SAVED_S)
        self._spent_s, self._at_s = spent_s, now_s
        return self._left_s >= min(refit_s, MOST_SAVED_S)


class Learner:
    """Asks the refitting process, one question at a time."""

    def __init__(self, path: Path | None, cpus: set[int], nice: int = LOWEST_PRIORITY) -> None:
        """``path``: the file of what is learned. ``cpus``: where the process runs; empty: anywhere."""
        self.path = path
        self._nice = nice
        self._cpus = cpus
        self.is_busy = False
        """Whether a question has no answer yet."""
        self.cpu_s = 0.0
        """CPU time of the refitting process, and of those before it, whatever ended them."""
        self.last_cpu_s = 0.0
        """CPU time of the last question."""
        self._answer: Answer | None = None
        self._questions: queue.SimpleQueue[Question] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self._cpu_before_s = 0.0
        self._said: set[str] = set()

    def start(self) -> None:
        """Have the process ready for the first question. Returns at once."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._talk, name="flowprefill-learner", daemon=True)
            self._thread.start()

    def ask(self, question: Question) -> None:
        """Have ``question`` answered. Returns at once."""
        self.is_busy = True
        self.start()
        self._questions.put(question)

    def take(self) -> Answer | None:
        """The answer that has come since this was asked last."""
        answer, self._answer = self._answer, None
        return answer

    def _talk(self) -> None:
        if self._cpus:
            with suppress(OSError):  # of this thread, and of the process that it starts: not if it may not run there
                os.sched_setaffinity(0, self._cpus)
        with suppress(OSError):  # the first question will tell
            self._running()
        while True:
            question = self._questions.get()
            try:
                answer = self._asked(question)
            except Exception as error:  # learning is not worth a thread that serving would wait for
                self._say(f"the process that refits cannot be used ({type(error).__name__}: {error})")
                self._end()
                answer = None
            if answer is not None:
                if answer.error is not None:
                    self._say(answer.error)
                self._answer = answer
            self.is_busy = False

    def _asked(self, question: Question) -> Answer | None:
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, question)
        begin_s = self.cpu_s
        answer: Answer | None = read_frame(process.stdout)
        self._count()
        self.last_cpu_s = self.cpu_s - begin_s
        if answer is None:
            self._say(f"the process that refits has ended ({self._reaped()}); the next refit starts another")
        return answer

    def _end(self) -> None:
        self._count()
        if self.process is not None:
            self.process.kill()
            self._reaped()

    def _count(self) -> None:
        """Bring ``cpu_s`` up to date. A process that has ended tells what it took until it is reaped."""
        if self.process is not None:
            with suppress(psutil.Error, OSError):
                times = psutil.Process(self.process.pid).cpu_times()
                self.cpu_s = self._cpu_before_s + times.user + times.system

    def _reaped(self) -> int:
        """Wait for the end of the process, whose time has been counted. Its exit code."""
        assert self.process is not None
        process, self.process = self.process, None
        self._cpu_before_s = self.cpu_s
        return process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        self._count()
        if self.process is not None and self.process.poll() is not None:
            self._reaped()
        if self.process is None:
            command = [sys.executable, "-m", "sgl_flowprefill.profiling.refit_process", "--nice", str(self._nice)]
            if self._cpus:
                command += ["--cpus", ",".join(map(str, sorted(self._cpus)))]
            env = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        return self.process

    def _say(self, problem: str) -> None:
        """Log ``problem`` once."""
        if problem not in self._said:
            self._said.add(problem)
            logger.warning("FlowPrefill goes on with the TTFT model that it has: %s", problem)


class LearningTTFT(RefittedTTFT, Learning):
    """The TTFT model of a server that learns from its tasks, at the rank that decides."""

    def __init__(
        self,
        known: Learned,
        quantile: float,
        learner: Learner,
        broadcast: Callable[[Any], Any] = lambda value: value,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """``known``: what was learned so far. ``broadcast`` gives the other ranks what this one has."""
        history = known.history
        super().__init__(known.fitted, quantile, Reservoir.of(known.rows), history.tasks, history.slowness)
        self.journal.refused = history.refused
        self._known = known
        self._learner = learner
        self._broadcast = broadcast
        self._now_s = now_s
        self._allowance = CpuAllowance(now_s())
        self._offer: Fitted | None = None

    def start(self) -> None:
        """Called when the server is about to serve."""
        self._learner.start()

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def look_for_offer(self) -> bool:
        answer = self._learner.take()
        if answer is not None:
            self._known = answer.known
            if answer.refit is not None and answer.refit.is_better:
                self._offer = answer.known.fitted
        return self._offer is not None

    def adopt(self) -> None:
        self.take_over(self._broadcast(self._offer))
        self._offer = None
        history = self._known.history
        logger.info(
            "FlowPrefill predicts with a model of its first %d tasks: %.1f%% off on the %d newest, %.1f%% before",
            history.trained_through,
            100 * history.challenger_error,
            history.judged,
            100 * history.champion_error,
        )

    def state(self) -> dict[str, float]:
        history = self._known.history
        return super().state() | {
            "tasks": self.journal.number,
            "rows": len(self.journal.reservoir),
            "refused": self.journal.refused,
            "explored": self.journal.explored_rows,
            "refits": history.refits,
            "adopted": history.adopted,
            "refit_at": history.refit_at,
            "judged": history.judged,
            "champion_error": round(history.champion_error, 4),
            "challenger_error": round(history.challenger_error, 4),
            "was_adopted": int(history.was_adopted),
            "refit_cpu_s": round(self._learner.cpu_s, 2),
        }

    # ---- refits -----------------------------------------------------------------------------------------------------

    def may_refit(self, tasks: int) -> bool:
        if self._learner.is_busy or self.look_for_offer():
            return False
        return self._allowance.covers(self._learner.last_cpu_s, self._learner.cpu_s, self._now_s())

    def ask_for_refit(self) -> None:
        seen = {"tasks": self.journal.number, "refused": self.journal.refused}
        history = self._known.history.model_copy(update=seen)
        self._known = self._known.model_copy(update={"history": history, "rows": self.journal.reservoir.rows})
        self._learner.ask(Question(self._known, self._learner.path))


class FollowingTTFT(AdaptiveTTFT, Learning):
    """The TTFT model of a tensor-parallel rank that takes over what the rank that decides has learned."""

    def __init__(self, known: Learned, quantile: float, broadcast: Callable[[Any], Any]) -> None:
        """``known``: what was learned so far. ``broadcast`` gives this rank what the one that decides has."""
        super().__init__(quantile, *known.fitted.parts(), known.history.slowness)
        self._broadcast = broadcast

    def adopt(self) -> None:
        fitted: Fitted = self._broadcast(None)
        self.replace(*fitted.parts())


def other_cpus() -> set[int]:
    """The CPUs on which no scheduler of this server runs; empty where there are none, or where none is told its own."""
    if not affinity.is_enabled():
        return set()
    own = set().union(*affinity.parse_ranks(os.environ[ENV_SCHEDULER_CPUS]))
    return set(range(os.cpu_count() or 1)) - own
