"""A real scheduler learns from the tasks that it completes, and shows what it has learned; its answers are right."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.ttft import AdaptiveTTFT
from tests.engine import PrefillEngine
from tests.prompts import prompt
from tests.reference import Comparison


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    """The shared engine, with a correction of its own: the machine that the others meet did not get slower."""
    scheduler = shared_engine.scheduler
    shared_engine.answers.clear()
    ttft = scheduler.hub.work.ttft
    scheduler.hub.work.ttft = AdaptiveTTFT(FlowPrefillConfig().slack_quantile, ttft.model)
    yield shared_engine
    scheduler.hub.work.ttft = ttft


def state(engine: PrefillEngine) -> dict[str, Any]:
    from sglang.srt.managers.io_struct import GetInternalStateReq

    output = engine.scheduler.get_internal_state(GetInternalStateReq())
    return dict(output.internal_state["flowprefill_ttft"])


def compare(engine: PrefillEngine, comparison: Comparison, prompts: Mapping[str, list[int]]) -> None:
    """Compare the answers to all of ``prompts``."""
    for rid, tokens in prompts.items():
        answer = engine.answers[rid]
        assert answer.token is not None
        assert answer.logprob is not None
        comparison.answer(rid, tokens, [answer.token], [answer.logprob])
    comparison.assert_same()
    assert comparison.counts["log probabilities"] == len(prompts)


def test_a_machine_that_got_slower_is_followed(engine: PrefillEngine, comparison: Comparison) -> None:
    scheduler = engine.scheduler
    before, run_batch = state(engine), scheduler.run_batch

    def slower(batch: Any) -> Any:
        time.sleep(0.3)  # many times what 64 tokens take
        return run_batch(batch)

    scheduler.run_batch = slower
    prompts = {f"r{index}": prompt(1000 + index, 64) for index in range(10)}
    try:
        for rid, tokens in prompts.items():
            engine.submit(rid, tokens, logprobs=True)
            engine.run()
    finally:
        scheduler.run_batch = run_batch
    after = state(engine)
    assert after["observed"] == before["observed"] + 10
    assert after["correction"] > 2 * before["correction"]
    compare(engine, comparison, prompts)
    engine.assert_clean()


def test_a_task_is_predicted_with_the_prefix_that_its_admission_found(
    engine: PrefillEngine, comparison: Comparison
) -> None:
    seen: list[Any] = []
    scheduler = engine.scheduler
    observe = scheduler.hub.work.ttft.observe
    scheduler.hub.work.ttft.observe = lambda batch, measured_s: (seen.append(list(batch)), observe(batch, measured_s))[
        1
    ]
    try:
        profiler = SchedulerEngine(scheduler.role)
        profiler.cache_prefix(600)
        prompts = {"alone": prompt(77, 50), "reusing": profiler.cached_prompt + prompt(78, 100)}
        for rid, tokens in prompts.items():
            engine.submit(rid, tokens, logprobs=True)
        engine.run()
    finally:
        scheduler.hub.work.ttft.observe = observe
    assert sorted(shape for batch in seen for shape in batch) == [(50, 0), (100, 600)]
    compare(engine, comparison, prompts)
    engine.assert_clean()
