"""Servers whose highest rate is searched for, in whose place the simulator stands: what must come out is known."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from sgl_flowprefill.bench.capacity.campaign import Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan, Prober
from sgl_flowprefill.bench.capacity.probes import Probe, ProbeLog
from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.loadgen.replay import ClientReport, Enough, ReplayRun, RequestResult
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.simulator.measured import Engine, measured_setup
from sgl_flowprefill.bench.simulator.requests import results
from sgl_flowprefill.bench.simulator.systems import Setup
from sgl_flowprefill.bench.simulator.systems import run as simulated
from sgl_flowprefill.bench.systems.catalog import System, select
from sgl_flowprefill.bench.workloads.synthetic import Workload, workload
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling import Profile, Row, Setting, write_profile
from sgl_flowprefill.profiling.steps import Step
from sgl_flowprefill.ttft import PrefillShape

NAMES = ("flowprefill", "flowprefill-layer", "stock-fcfs", "stock-spf-512")
OPTIONS = FlowPrefillConfig()
SETTING = Setting(model="toy", device="cpu", dtype="float32", attention_backend="x", threads=1, sglang="0")
FORWARD_S = {tokens: 0.02 + 3e-4 * tokens + 1.5e-8 * tokens**2 for tokens in (16, 128, *REFERENCE_TTFT_S)}
DECODE_TOKENS_PER_S = 200.0
STEPS = [
    Step(requests=requests, context_tokens=context, time_s=0.01 + 0.0025 * requests + 4e-7 * context)
    for requests, context in ((1, 528), (4, 2112), (16, 8448), (4, 16448))
]
SOLO_TTFT_S = {tokens: 0.02 + FORWARD_S[tokens] for tokens in REFERENCE_TTFT_S}
QWEN = workload("qwen")
WORKLOAD = dataclasses.replace(QWEN, draw=functools.cache(QWEN.draw))
"""What all runs replay; it is drawn once."""


def write_toy_profile(folder: Path) -> Path:
    """The profile of the engine that the servers have."""
    rows = [Row((PrefillShape(tokens),), time_s, 0.0, 1, 0.0) for tokens, time_s in FORWARD_S.items()]
    path = folder / "toy.parquet"
    write_profile(path, Profile(SETTING, 8192, rows, complete=True))
    return path


@dataclasses.dataclass
class Model:
    """Serves systems from the simulator; notes the order, and can be interrupted or have a slow client."""

    profile: Path
    order: list[str] = dataclasses.field(default_factory=list)
    replays: list[tuple[str, float, int]] = dataclasses.field(default_factory=list)
    interrupt_after: float = math.inf
    invalid: str | None = None
    slowdown: float = 1.0

    @property
    def engine(self) -> Engine:
        return Engine(str(self.profile), layers=8, kv_tokens=None, between_forwards_s=0.002)

    @functools.cached_property
    def setup(self) -> Setup:
        return measured_setup(self.engine, SOLO_TTFT_S, OPTIONS, STEPS)

    @contextmanager
    def serve(self, system: System) -> Iterator[SimulatedEndpoint]:
        self.order.append(system.name)
        yield SimulatedEndpoint(self, system)


@dataclasses.dataclass
class SimulatedEndpoint:
    model: Model
    system: System
    blocking: list[float] | None = None

    def solo_ttft_s(self, prompts: Any, say: Any = None) -> dict[int, float]:
        return {tokens: ttft_s * self.model.slowdown for tokens, ttft_s in SOLO_TTFT_S.items()}

    def decode_tokens_per_s(self, prompts: Any) -> float:
        return DECODE_TOKENS_PER_S

    def decode_steps(self, prompts: Any) -> list[Step]:
        return STEPS

    def engine(self, prompts: Any) -> Engine:
        return self.model.engine

    def come_to_rest(self) -> None:
        pass

    def blocking_s(self, run: ReplayRun) -> list[float] | None:
        return self.blocking

    def replay(self, trace: Trace, prompts: Any, on_progress: Any, enough: Any, slower: float = 0.0) -> ReplayRun:
        if len(self.model.replays) >= self.model.interrupt_after:
            raise KeyboardInterrupt
        self.model.replays.append((self.system.name, trace.rate_rps, len(trace.requests)))
        setup = dataclasses.replace(self.model.setup, slower=slower, learned=slower > 0)
        done = simulated(self.system.simulated(OPTIONS), trace, setup)
        self.blocking = list(done.blocking_s) if done.blocking_s is not None else None
        whole = results(trace, done.requests)
        seen, met = [], 0
        for result in whole:
            seen.append(result)
            met += (enough or Enough(lambda met, missed: False)).meets(result)
            if enough and enough.known(met, len(seen) - met):
                break
        client = ClientReport(0.0, 0.0, 0.0, 0.1, self.model.invalid)
        return ReplayRun(seen, 0.0, done.duration_s, client, stopped_early=len(seen) < len(whole))


def campaign_of(
    model: Model,
    folder: Path,
    names: tuple[str, ...] = NAMES,
    seeds: int = 2,
    duration_s: float = 40.0,
    max_output_tokens: int | None = 8,
    judge: Judge = "ttft",
    replayed: Workload = WORKLOAD,
    **goal: Any,
) -> Campaign:
    """A search among systems, which keeps its log in ``folder``."""
    plan = Plan(replayed, seeds, duration_s, max_output_tokens, judge)
    log = ProbeLog(folder / "probes.jsonl", plan.settings())
    prober = Prober(plan, log, model.serve, Console(file=StringIO(), width=200), OPTIONS)
    return Campaign(prober, select(names), dataclasses.replace(Goal((0.9, 0.99), precision=1.1), **goal))


def verdict(system: str, seed: int, rate_rps: float, kept: bool) -> Probe:
    """A probe of one request, which was in time or late."""
    result = RequestResult(0, "text", 10, 1, 0, 1.0, 1.0, 0.0, 0.0, 0.5 if kept else 2.0, 2.0, (), 0, None)
    return Probe(
        system, rate_rps, seed, 1, ReplayRun([result], 0.0, 1.0, ClientReport(0.0, 0.0, 0.0, 0.1, None), False), None
    )
