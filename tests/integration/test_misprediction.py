"""Predictions that stay wrong by two cost deadlines, never requests. ``pytest -s`` prints what they cost."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import qwen_like
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.model.embedded import FIRST_WORD_ID, VOCAB_SIZE
from sgl_flowprefill.pace import AS_PREDICTED, Pace
from sgl_flowprefill.policy import make_policy
from sgl_flowprefill.ttft import PrefillShape
from tests.engine import PrefillEngine

REQUESTS = 30
RATE_RPS = 5.0
LOAD = 0.5
"""Share of the time of a replay in which the engine, as fast as it is now, computes."""
MAX_STARVATION_S = 5.0


class Wrong:
    """The scheduler's TTFT model, off by ``factor`` for good: nothing is learned from the tasks that complete."""

    def __init__(self, right: Any, factor: float) -> None:
        self._right = right
        self._factor = factor

    def predict_s(self, batch: Sequence[PrefillShape]) -> float:
        return float(self._factor * self._right.predict_s(batch))

    def observe(self, batch: Sequence[PrefillShape], measured_s: float) -> Any:
        return self._right.predict(batch)

    def pace(self, batch: Sequence[PrefillShape]) -> Pace:
        return AS_PREDICTED

    def follow(self) -> bool:
        return False

    @property
    def correction(self) -> float:
        """What tiles go by, which is right: it is not what this is about."""
        return float(self._right.correction)


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    scheduler = shared_engine.scheduler
    ttft, policy = scheduler.hub.work.ttft, scheduler.hub.work.policy
    shared_engine.answers.clear()
    scheduler.hub.work.policy = make_policy(FlowPrefillConfig().policy, policy.limits, MAX_STARVATION_S)
    yield shared_engine
    scheduler.hub.work.ttft, scheduler.hub.work.policy = ttft, policy
    scheduler.hub.executor.interrupted = scheduler.hub.events.pending


def trace_and_prompts() -> tuple[Trace, list[list[int]]]:
    trace = qwen_like(REQUESTS, seed=3, rate_rps=RATE_RPS)
    builder = PromptBuilder(3, FIRST_WORD_ID, VOCAB_SIZE)
    return trace, [builder.build(request, index) for index, request in enumerate(trace.requests)]


def answer_alone(engine: PrefillEngine, prompts: Sequence[Sequence[int]]) -> tuple[dict[str, int | None], float]:
    """The tokens of all prompts, each computed alone, and the seconds that took."""
    engine.answers.clear()
    begin_s = time.monotonic()
    for index, prompt in enumerate(prompts):
        engine.submit(f"{index:03d}", prompt)
        engine.run()
    took_s = time.monotonic() - begin_s
    engine.assert_clean()
    return {rid: answer.token for rid, answer in engine.answers.items()}, took_s


def replay(engine: PrefillEngine, trace: Trace, prompts: Sequence[Sequence[int]]) -> dict[str, float]:
    """TTFT of every request of a short trace, arriving when the trace says."""
    due = list(zip(range(REQUESTS), trace.requests, strict=True))
    begin_s = time.monotonic()
    ttft_s: dict[str, float] = {}

    def arrived() -> bool:
        return bool(due) and time.monotonic() - begin_s >= due[0][1].arrival_s

    engine.scheduler.hub.executor.interrupted = arrived
    while len(ttft_s) < REQUESTS:
        while arrived():
            index, request = due.pop(0)
            engine.submit(f"{index:03d}", prompts[index], ttft_slo_s=request.ttft_slo_s)
        if not engine.turn():
            time.sleep(0.001)
        now_s = time.monotonic() - begin_s
        assert now_s < 60 + 3 * trace.requests[-1].arrival_s, f"{REQUESTS - len(ttft_s)} requests have no answer"
        for rid in engine.answers.keys() - ttft_s.keys():
            ttft_s[rid] = now_s - trace.requests[int(rid)].arrival_s
    return ttft_s


def test_a_predictor_that_is_wrong_by_two_loses_and_starves_nobody(engine: PrefillEngine) -> None:
    right = engine.scheduler.hub.work.ttft
    trace, prompts = trace_and_prompts()
    expected, alone_s = answer_alone(engine, prompts)
    trace = trace.scaled(time_scale=alone_s / LOAD / trace.requests[-1].arrival_s)
    slo_s = {f"{index:03d}": request.ttft_slo_s for index, request in enumerate(trace.requests)}
    print(f"\n{REQUESTS} requests, {alone_s:.1f} s of work, in {trace.requests[-1].arrival_s:.1f} s")
    met: dict[float, float] = {}
    for factor in (1.0, 2.0, 0.5):
        engine.answers.clear()
        engine.scheduler.hub.work.ttft = Wrong(right, factor)
        ttft_s = replay(engine, trace, prompts)
        met[factor] = sum(ttft_s[rid] <= slo_s[rid] for rid in ttft_s) / REQUESTS
        late_s = max(ttft_s[rid] - slo_s[rid] for rid in ttft_s)
        print(f"predictions times {factor:g}: {met[factor]:.1%} met their objective, the latest by {late_s:.1f} s")
        assert not any(answer.aborted for answer in engine.answers.values())
        assert {rid: answer.token for rid, answer in engine.answers.items()} == expected
        engine.assert_clean()
    assert met[1.0] > 0.5, "the engine must be able to meet most objectives, or the factors show nothing"
