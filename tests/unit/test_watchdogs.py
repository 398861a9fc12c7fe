"""What SGLang's watchdogs see of the hub."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from queue import Queue
from types import SimpleNamespace
from typing import Any, Final

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler_components.invariant_checker import create_scheduler_watchdog

from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.hub_scheduler import feed_watchdogs

TIMEOUT_S: Final = 300.0
TIMES: Final = 30
"""That a watchdog sleeps, half its timeout each time, while a forward pass gets on."""


class Clock:
    """What two watchdogs have in place of ``time``. It goes on when they sleep, and with it a forward pass, for which
    ``get_on`` is called until both have slept ``TIMES``.
    """

    def __init__(self, get_on: Callable[[], None]) -> None:
        self.now_s = 0.0
        self.begins = threading.Event()
        self._get_on = get_on
        self._slept: Counter[int] = Counter()
        self._one_at_a_time = threading.Lock()

    @property
    def gets_on(self) -> bool:
        """Whether the forward pass does."""
        return len(self._slept) < 2 or min(self._slept.values()) < TIMES

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, time_s: float) -> None:
        self.begins.wait()
        with self._one_at_a_time:
            self.now_s += time_s
            if self.gets_on:
                self._slept[threading.get_ident()] += 1
                self._get_on()


@pytest.mark.parametrize("point", [Executor.checkpoint, Executor.between_tiles])
def test_a_watchdog_is_fed_by_interruption_points_and_notices_when_none_is_passed(
    point: Callable[[Executor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = Executor(SimpleNamespace(), lambda: False)
    executor.running = SimpleNamespace(operators_passed=0, points_passed=0, tiles_passed=0)  # type: ignore[assignment]
    clock = Clock(lambda: point(executor))
    noticed_while_it_got_on: Queue[bool] = Queue()

    def dump() -> None:
        noticed_while_it_got_on.put(clock.gets_on)
        threading.Event().wait()  # it has done what it is for

    monkeypatch.setattr("sglang.srt.utils.watchdog.pyspy_dump_schedulers", dump)
    monkeypatch.setattr("sglang.srt.utils.watchdog.time", clock)
    scheduler: Any = SimpleNamespace(
        forward_ct=1, cur_batch_for_debug=None, is_initializing=False, hub=SimpleNamespace(executor=executor)
    )
    for name in ("watchdog", "soft_watchdog"):
        scheduler.__dict__[name] = create_scheduler_watchdog(scheduler, watchdog_timeout=TIMEOUT_S, soft=True)
        scheduler.__dict__[name].dump_info = None
    feed_watchdogs(scheduler)
    scheduler.cur_batch_for_debug = object()
    clock.begins.set()
    for _ in range(2):
        assert not noticed_while_it_got_on.get(timeout=60)


def test_without_a_soft_watchdog_there_is_one() -> None:
    watchdog = SimpleNamespace()
    hub = SimpleNamespace(executor=SimpleNamespace(points_passed=4))
    feed_watchdogs(SimpleNamespace(watchdog=watchdog, forward_ct=3, hub=hub))
    assert watchdog.get_counter() == 7
