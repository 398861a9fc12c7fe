"""A real scheduler learns from the tasks that it completes, and shows what it has learned."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.ttft import AdaptiveTTFT
from tests.engine import PrefillEngine
from tests.prompts import prompt


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    """The shared engine, with a correction of its own: the machine that the others meet did not get slower."""
    scheduler = shared_engine.scheduler
    shared_engine.answers.clear()
    ttft = scheduler.hub.work.ttft
    scheduler.hub.work.ttft = AdaptiveTTFT(ttft.model, FlowPrefillConfig().slack_quantile)
    yield shared_engine
    scheduler.hub.work.ttft = ttft


def state(engine: PrefillEngine) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    output = engine.scheduler.get_internal_state(GetInternalStateReq())
    return dict(output.internal_state["flowprefill_ttft"])


def test_a_machine_that_got_slower_is_followed(engine: PrefillEngine) -> None:
    scheduler = engine.scheduler
    before, run_batch = state(engine), scheduler.run_batch

    def slower(batch: Any) -> Any:
        time.sleep(1.0)
        return run_batch(batch)

    scheduler.run_batch = slower
    try:
        for index in range(10):
            engine.submit(f"r{index}", prompt(1000 + index, 64))
            engine.run()
    finally:
        scheduler.run_batch = run_batch
    after = state(engine)
    assert after["observed"] == before["observed"] + 10
    assert after["correction"] > 2 * before["correction"]
    engine.assert_clean()


def test_a_task_is_predicted_with_the_prefix_that_its_admission_found(engine: PrefillEngine) -> None:
    seen: list[Any] = []
    scheduler = engine.scheduler
    observe = scheduler.hub.work.ttft.observe
    scheduler.hub.work.ttft.observe = lambda batch, measured_s: (seen.append(list(batch)), observe(batch, measured_s))[
        1
    ]
    try:
        profiler = SchedulerEngine(scheduler.role)
        profiler.cache_prefix(600)
        engine.submit("alone", prompt(77, 50))
        engine.submit("reusing", profiler.cached_prompt + prompt(78, 100))
        engine.run()
    finally:
        scheduler.hub.work.ttft.observe = observe
    assert sorted(shape for batch in seen for shape in batch) == [(50, 0), (100, 600)]
    engine.assert_clean()
