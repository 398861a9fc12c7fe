"""``python -m tests.metrics_cost``: what metrics add to a scheduling event, in CPU time of the scheduler's thread.

The recorder is told what the hub tells it, with metrics as a server keeps them (in files that its HTTP process reads)
and without; no event log either way. Two events are measured, the most expensive ones: a request arrives and takes the
place of a running prefill, and a prefill ends, its request is answered, and the suspended one goes on. Reports in
answers read the same outcomes of requests; where they are off, metrics pay for that, too.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any, Final

ROUNDS: Final = 500
WARM_UP: Final = 100
REPEATS: Final = 15
"""Times that each is measured, in turns with the others; the least median counts, as other processes can only add to
it."""
SUSPENDED: Final = 4
"""Prefills that are suspended besides."""


class Req:
    """What the recorder reads of SGLang's Req."""

    bootstrap_room = 7

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.origin_input_ids = self.origin_input_ids_unpadded = [1, 2, 3]


def costs_us(with_metrics: bool, with_reports: bool) -> dict[str, float]:
    """The median CPU time of each event."""
    from prometheus_client import CollectorRegistry

    from sgl_flowprefill.hub.progress import Progress
    from sgl_flowprefill.hub.task import PrefillTask
    from sgl_flowprefill.hub.waiting import WaitingRequest
    from sgl_flowprefill.policy import Job, Limits, make_policy
    from sgl_flowprefill.runtime.event_recorder import EventRecorder
    from sgl_flowprefill.runtime.metrics import Metrics
    from sgl_flowprefill.slo import Objective
    from sgl_flowprefill.ttft import Prediction, PrefillShape
    from sgl_flowprefill.ttft.online import AdaptiveTTFT

    labels = dict.fromkeys(("model_name", "engine_type", "tp_rank", "pp_rank", "moe_ep_rank"), "0")
    metrics = Metrics(labels, decodes=True, registry=CollectorRegistry()) if with_metrics else None
    recorder, ttft = EventRecorder(None, metrics), AdaptiveTTFT(0.9, SimpleNamespace(predict_s=lambda batch: 0.1))
    live: list[PrefillTask] = []
    work: Any = SimpleNamespace(
        waiting=(),
        policy=make_policy("feasible", Limits(16, 2048), 60.0),
        tasks=SimpleNamespace(live=live),
        ttft=ttft,
        progress=Progress([True, False], ["model.layers.0.self_attn", "model.layers.0.mlp"]),
    )
    recorder.watch(work, 4096.0)
    if with_reports:
        recorder.on_outcome(lambda outcome: None)
    objective, prediction = Objective(1.0, 0.1), Prediction(0.1, 0.1, 0.12)

    def task(number: int) -> PrefillTask:
        waiting = WaitingRequest(Req(f"request {number}"), number, [1, 2, 3], PrefillShape(1000, 0), 0.0, 0)
        now_s = time.monotonic()
        return PrefillTask(number, None, [waiting], [waiting.shape], now_s, now_s + 1.0, 0.1)

    def spent_us(event: Callable[[], None]) -> float:
        begin_s = time.thread_time()
        event()
        return 1e6 * (time.thread_time() - begin_s)

    for number in range(SUSPENDED):
        live.append(task(number))
        recorder.suspended(live[-1], live[-1], 0.0, 0.0, 0.0)
    running = task(SUSPENDED)
    live.append(running)
    spent: dict[str, list[float]] = {"arrival and preemption": [], "end and resume": []}
    for number in range(SUSPENDED + 1, SUSPENDED + 1 + ROUNDS + WARM_UP):
        winner = task(number)
        [member] = winner.members
        job: Job[WaitingRequest] = Job(member, winner.arrival_s, winner.deadline_s, 0.1)

        def preempt(winner: PrefillTask = winner, job: Job[WaitingRequest] = job) -> None:
            now_s = time.monotonic()
            recorder.arrived(job.item.req, now_s, objective)
            recorder.ready(job)
            recorder.suspended(running, winner, now_s, now_s, now_s - 0.004)
            recorder.resumed(winner, now_s)
            recorder.decided(50e-6, now_s)

        def end(winner: PrefillTask = winner) -> None:
            now_s = time.monotonic()
            recorder.completed(winner, prediction)
            recorder.answered(winner.reqs[0], None, None)
            recorder.resumed(running, now_s)
            recorder.decided(50e-6, now_s)

        live.append(winner)
        spent["arrival and preemption"].append(spent_us(preempt))
        spent["end and resume"].append(spent_us(end))
        live.pop()
    return {name: statistics.median(measured[WARM_UP:]) for name, measured in spent.items()}


def added_us() -> dict[str, float]:
    """What metrics add to each event, by its name."""
    least: dict[tuple[str, bool, bool], float] = {}
    for _ in range(REPEATS):
        for with_reports, with_metrics in product((True, False), repeat=2):
            for name, cost_us in costs_us(with_metrics, with_reports).items():
                key = name, with_reports, with_metrics
                least[key] = min(cost_us, least.get(key, math.inf))
    return {
        f"{name}, {'beside' if with_reports else 'without'} reports in answers": cost_us
        - least[name, with_reports, False]
        for (name, with_reports, with_metrics), cost_us in least.items()
        if with_metrics
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # before the client library is imported
        print(json.dumps({name: round(value, 1) for name, value in added_us().items()}, indent=2))


if __name__ == "__main__":
    main()
