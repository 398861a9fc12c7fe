"""What SGLang's watchdogs see of the hub."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler_components.invariant_checker import create_scheduler_watchdog

from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.hub_scheduler import feed_watchdogs
from tests.waiting import until


@pytest.mark.parametrize("point", [Executor.checkpoint, Executor.between_tiles])
def test_a_watchdog_is_fed_by_interruption_points_and_notices_when_none_is_passed(
    point: Callable[[Executor], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dumps: list[float] = []
    monkeypatch.setattr("sglang.srt.utils.watchdog.pyspy_dump_schedulers", lambda: dumps.append(time.monotonic()))
    executor = Executor(SimpleNamespace(), lambda: False)
    executor.running = SimpleNamespace(operators_passed=0, points_passed=0, tiles_passed=0)  # type: ignore[assignment]
    scheduler: Any = SimpleNamespace(
        forward_ct=1, cur_batch_for_debug=object(), is_initializing=False, hub=SimpleNamespace(executor=executor)
    )
    for name in ("watchdog", "soft_watchdog"):
        scheduler.__dict__[name] = create_scheduler_watchdog(scheduler, watchdog_timeout=0.4, soft=True)
        scheduler.__dict__[name].dump_info = None
    feed_watchdogs(scheduler)
    try:
        for _ in range(60):  # one forward pass for three times as long as a watchdog waits
            point(executor)
            time.sleep(0.02)
        assert not dumps
        until(lambda: len(dumps) >= 2, 10.0)
    finally:
        scheduler.cur_batch_for_debug = None


def test_without_a_soft_watchdog_there_is_one() -> None:
    watchdog = SimpleNamespace()
    hub = SimpleNamespace(executor=SimpleNamespace(points_passed=4))
    feed_watchdogs(SimpleNamespace(watchdog=watchdog, forward_ct=3, hub=hub))
    assert watchdog.get_counter() == 7
