"""What learning costs those who come: how long they wait for an interruption point while refits run beside.

``pytest -s -m stress tests/stress/test_learning_cost.py`` prints the waits of one engine in turns, with learning off
and with refits that are asked for again at once, each of all the rows that a server keeps: far more than it is allowed.
That a model is adopted comes between tasks, and is timed by itself. As in ``test_blocking.py``, the distribution of
waits follows from the pieces of prefills between two interruption points.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator

import pytest

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS
from sgl_flowprefill.hub.parts import Learning
from sgl_flowprefill.profiling.refit import Question
from sgl_flowprefill.runtime.learner import CpuAllowance, Learner, LearningTTFT, other_cpus
from sgl_flowprefill.ttft.online import ALL_TASKS
from sgl_flowprefill.ttft.reservoir import CAPACITY
from tests.engine import PrefillEngine, keep_freed_memory
from tests.prompts import prompt
from tests.reference import Comparison
from tests.stress.test_blocking import held, pieces_s, wait_s
from tests.unit.test_learner import KNOWN
from tests.unit.test_ttft_learning import cost_s, rows_for
from tests.waiting import until

pytestmark = [pytest.mark.stress, pytest.mark.alone]

TOKENS = 2048
SEED = 0
TURNS = 7
PART_S = 12.0
"""How long prefills are timed in a turn, with learning off and again with refits."""
WAIT_S = 120.0
HOUR_S = 3600
MOST_CPU_S = 0.01 * HOUR_S
"""CPU time of refits in an hour."""


class Restless(LearningTTFT):
    """Has the same rows refitted whenever ``ask_again`` is called and no refit runs."""

    def __init__(self, learner: Learner) -> None:
        known = KNOWN.model_copy(update={"rows": rows_for(cost_s, 2 * CAPACITY, 0.02, 0)})
        assert len(known.rows) == CAPACITY
        super().__init__(known, 0.75, learner)
        self.asked = 0
        self.adoptions_s: list[float] = []
        """How long it took to adopt each model."""
        self._question = Question(known, None)

    def may_refit(self, tasks: int) -> bool:
        return False

    def ask_again(self) -> None:
        if not self._learner.is_busy:
            self.asked += 1
            self._learner.ask(self._question)

    def adopt(self) -> None:
        begin_s = time.perf_counter()
        super().adopt()
        self.adoptions_s.append(time.perf_counter() - begin_s)


@pytest.fixture
def engine(shared_engine: PrefillEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[PrefillEngine]:
    """This thread, which computes, has one CPU, as the scheduler of a server that is told its own."""
    keep_freed_memory()
    hub = shared_engine.scheduler.hub
    ttft, cpus = hub.work.ttft, os.sched_getaffinity(0)
    monkeypatch.setenv(ENV_SCHEDULER_CPUS, str(max(cpus)))
    os.sched_setaffinity(0, {max(cpus)})
    yield shared_engine
    os.sched_setaffinity(0, cpus)
    hub.work.ttft, hub.learning = ttft, Learning()
    shared_engine.assert_clean()


@pytest.fixture
def learner(engine: PrefillEngine) -> Iterator[Learner]:
    learner = Learner(None, other_cpus())
    yield learner
    if learner.process is not None:
        learner.process.kill()


def waits_s(engine: PrefillEngine, passing: Callable[[], object] = lambda: None) -> tuple[float, float]:
    """p50 and p99 of the wait for an interruption point, at each of which ``passing`` is called."""
    pieces: list[float] = []
    end_s = time.monotonic() + PART_S
    while time.monotonic() < end_s:
        pieces += pieces_s(engine, TOKENS, SEED, passing)
    return wait_s(pieces, 0.5), wait_s(pieces, 0.99)


def cpu_s_in_an_hour(refit_s: float) -> float:
    """CPU time that refits of ``refit_s`` may take in a server's first hour, in which it may take most."""
    allowance, spent_s = CpuAllowance(0.0), 0.0
    for now_s in range(HOUR_S):
        while allowance.covers(refit_s, spent_s, float(now_s)):
            spent_s += refit_s
    return spent_s


def test_nobody_waits_longer_for_an_interruption_point_while_a_refit_runs(
    engine: PrefillEngine, learner: Learner, comparison: Comparison
) -> None:
    hub = engine.scheduler.hub
    fixed, learning = hub.work.ttft, Restless(learner)

    def answered() -> None:
        until(lambda: not learner.is_busy, WAIT_S)

    for _ in range(ALL_TASKS):  # tiles follow what the machine takes now, as on a server that has been up
        pieces_s(engine, TOKENS, SEED)
    learning.ask_again()  # the process is there, and has all that it needs
    answered()
    before_s, learning.asked, refitting_s = learner.cpu_s, 0, 0.0
    found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    with held(engine, hub.tiles.now):
        for turn in range(TURNS):
            for learns in (False, True) if turn % 2 else (True, False):
                begin_s = time.monotonic()
                if learns:
                    hub.work.ttft = hub.learning = learning
                    found[True].append(waits_s(engine, learning.ask_again))
                    answered()
                    refitting_s += time.monotonic() - begin_s
                else:
                    hub.work.ttft, hub.learning = fixed, Learning()
                    found[False].append(waits_s(engine))
                answer = engine.answers[f"{TOKENS}-{SEED}"]
                how = "beside refits" if learns else "learning off"
                comparison.answer(f"{turn} {how}", prompt(SEED, TOKENS), [answer.token], [answer.logprob])
    assert learning.asked >= TURNS
    assert learning.adoptions_s, "no answer was taken"
    turns = list(zip(found[False], found[True], strict=True))
    print(f"\nwait for an interruption point, {TOKENS} tokens, ms: p50, p99 with learning off; beside refits; ratios")
    for (p50, p99), (p50_on, p99_on) in turns:
        waits = f"{p50 * 1e3:.2f}, {p99 * 1e3:.2f}; {p50_on * 1e3:.2f}, {p99_on * 1e3:.2f}"
        print(f"{waits}; {p50_on / p50:.3f}, {p99_on / p99:.3f}")
    print(f"median ratio of p99: {statistics.median(p99_on / p99 for (_, p99), (_, p99_on) in turns):.3f}")
    spent_s = learner.cpu_s - before_s
    refit_s = spent_s / learning.asked
    hour_s = cpu_s_in_an_hour(refit_s)
    print(
        f"{learning.asked} refits of {CAPACITY} rows, on CPUs {sorted(other_cpus()) or 'of the scheduler'}: "
        f"{refit_s:.2f} s of CPU time each, {spent_s / refitting_s:.0%} of a core here; allowed in an hour: "
        f"{hour_s:.1f} s, {hour_s / HOUR_S:.2%} of a core"
    )
    print(f"{len(learning.adoptions_s)} models adopted, each within {max(learning.adoptions_s) * 1e3:.2f} ms")
    comparison.assert_same_with_logprobs()
    assert learner.process is not None
    if others := other_cpus():
        assert os.sched_getaffinity(learner.process.pid) <= others
    assert hour_s <= MOST_CPU_S
    assert statistics.median(p99_on - max(1.25 * p99, p99 + 1e-3) for (_, p99), (_, p99_on) in turns) <= 0
