"""Probes on a system's servers: the traces of a plan, what is measured when servers start, and one replay."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console

from sgl_flowprefill.bench.capacity.probes import FILE_DIGEST, Probe, ProbeLog
from sgl_flowprefill.bench.capacity.rate_search import ROUNDING, decided
from sgl_flowprefill.bench.loadgen.calibrate import median_of, time_scale
from sgl_flowprefill.bench.loadgen.progress import ReplayProgress
from sgl_flowprefill.bench.loadgen.replay import Enough
from sgl_flowprefill.bench.metrics.joint import meets
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.simulator.measured import Engine, measured_setup, saturation_rps
from sgl_flowprefill.bench.simulator.systems import Setup
from sgl_flowprefill.bench.systems.endpoint import Endpoint
from sgl_flowprefill.bench.systems.serving import Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, Answers
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import Workload
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.profiling.steps import Step
from sgl_flowprefill.provenance import machine, versions


@dataclass(frozen=True)
class Plan:
    """What is replayed: traces of one workload, by seed and rate."""

    workload: Workload
    seeds: int
    duration_s: float
    """Requests of a probe arrive in this time. Rates beyond saturation depend on it, so it is the same for all."""
    max_output_tokens: int | None = None
    """Longer answers are cut; without it all are shortened to what the servers carry."""
    judge: Judge = "ttft"
    """How attainment is judged."""
    decode_share: float = DECODE_SHARE
    """Share of what the servers carry that answers take at saturation."""
    slower: float = 0.0
    """Share by which the machine becomes slower for the servers, in the middle of each replay."""

    def settings(self) -> dict[str, Any]:
        """What all probes have in common; there may be more seeds when a run is resumed."""
        return {
            "workload": self.workload.name,
            FILE_DIGEST: self.workload.file_digest,
            "duration_s": self.duration_s,
            "max_output_tokens": self.max_output_tokens,
            "judge": self.judge,
            "slower": self.slower,
        }

    def trace(self, seed: int, rate_rps: float, scale: float, slo_scale: float = 1.0) -> Trace:
        """What is replayed at ``rate_rps`` by the wall clock on an engine with the time scale ``scale``, with the
        workload's own answers. A file's rate varies: what is taken from it has this rate, whatever it had in the file.
        """
        wanted = rate_rps * self.duration_s
        drawn = self._drawn(1 << math.ceil(math.log2(wanted * 1.5 + 50)), seed)
        own_rps, end_s = self.workload.rate_rps, self.duration_s
        if self.workload.file_requests is not None:
            drawn = drawn.limited(requests=max(1, int(wanted + ROUNDING)))
            own_rps, end_s = drawn.rate_rps or own_rps, math.inf
        return drawn.scaled(rate_scale=rate_rps * scale / own_rps, time_scale=scale, slo_scale=slo_scale).until(end_s)

    @functools.cache  # noqa: B019 - a plan lives as long as its run
    def _drawn(self, requests: int, seed: int) -> Trace:
        return self.workload.draw(requests, seed)


class Prober:
    """Makes the probes of ``plan`` and keeps them in ``log``, with what is known of the machine."""

    def __init__(
        self,
        plan: Plan,
        log: ProbeLog,
        serve: Callable[[System], AbstractContextManager[Endpoint]],
        console: Console,
        options: FlowPrefillConfig,
    ) -> None:
        """``options`` are what the servers of ``serve`` run FlowPrefill with."""
        self.plan = plan
        self.options = options
        self.log = log
        self._serve = serve
        self._console = console

    @property
    def is_calibrated(self) -> bool:
        """Whether this machine's times are known, without which nothing can be probed."""
        wanted = {"time_scale", *(() if self.plan.max_output_tokens else ("answers_scale",))}
        return wanted <= self.log.facts.keys() and bool(self.log.solo_ttft_s)

    @property
    def can_simulate(self) -> bool:
        """Whether the simulator can be set up as this machine, which the servers of a system of ours show."""
        return "engine" in self.log.facts

    @property
    def answers(self) -> Answers:
        """The lengths of answers, the same at all rates, once calibrated."""
        if self.plan.max_output_tokens is not None:
            return Answers(max_tokens=self.plan.max_output_tokens)
        facts = self.log.facts
        return Answers(facts["answers_scale"], decode_tokens_per_s=facts["decode_tokens_per_s"])

    @property
    def time_scale(self) -> float:
        """Factor for the workload's times and SLOs, once calibrated."""
        return float(self.log.facts["time_scale"])

    @functools.cached_property
    def setup(self) -> Setup:
        """The simulator as this machine, once calibrated."""
        first, solo_ttft_s = next(iter(self.log.solo_ttft_s.items()))
        return self._setup(solo_ttft_s[0], self.log.steps.get(first, ()))

    def setup_of(self, system: System) -> Setup:
        """The simulator as this machine was while ``system`` was up, by all its isolated requests and decode steps."""
        return self._setup(median_of(self.log.solo_ttft_s[system.name]), self.log.steps.get(system.name, ()))

    def _setup(self, solo_ttft_s: Mapping[int, float], steps: Sequence[Step]) -> Setup:
        setup = measured_setup(Engine(**self.log.facts["engine"]), solo_ttft_s, self.options, steps)
        return dataclasses.replace(setup, slower=self.plan.slower, learned=self.plan.slower > 0)

    @contextmanager
    def serving(self, system: System) -> Iterator[Endpoint]:
        """The system's servers, up, after isolated requests."""
        self.say(f"[bold]{system.label}[/bold]")
        self.check_settings(system)
        if _settings_fact(system) not in self.log.facts:
            self.log.fix(_settings_fact(system), system.settings)
        with self._serve(system) as served:
            solo_ttft_s = self.measure_isolated(served, system)
            if "time_scale" not in self.log.facts:
                self.log.fix("time_scale", time_scale(solo_ttft_s))
                self.say(f"  time scale {self.time_scale:.2f}: arrivals and SLOs are stretched by it")
            if not self.can_simulate and (engine := served.engine(PromptBuilder(0))) is not None:
                self.log.fix("engine", dataclasses.asdict(engine))
            if not self.is_calibrated:
                self._fix_answers(served, system)
            yield served

    def check_settings(self, system: System) -> None:
        """Refuse a system that this run has under the same name with other settings, such as an endpoint's URL."""
        found = self.log.facts.get(_settings_fact(system), system.settings)
        if found != system.settings:
            raise ValueError(
                f"the probes of {system.name} so far are of {found!r}, not {system.settings!r}: give another --out, or "
                "another name"
            )

    def saturation_rps(self, trace: Trace) -> float:
        """The rate at which the forwards of ``trace`` fill the machine, by the simulator's costs."""
        return saturation_rps(trace, self.setup.machine.cost)

    def one_by_one_rps(self, trace: Trace, system: System) -> float:
        """The rate at which ``trace`` fills ``system`` if each request takes as long as an isolated one does."""
        times_s = median_of(self.log.solo_ttft_s[system.name])
        tokens = [request.new_tokens for request in trace.requests]
        return len(tokens) / float(np.interp(tokens, list(times_s), list(times_s.values())).sum())

    def _fix_answers(self, served: Endpoint, system: System) -> None:
        """Shorten answers to what the decode server carries where the prefill server hands it as many as it can."""
        decode_tokens_per_s = served.decode_tokens_per_s(PromptBuilder(0))
        served.come_to_rest()
        whole = self.plan.trace(0, self.plan.workload.rate_rps, self.time_scale)
        rate_rps = self.saturation_rps(whole) if self.can_simulate else self.one_by_one_rps(whole, system)
        answers = Answers.carried(whole, rate_rps, decode_tokens_per_s, self.plan.decode_share)
        self.log.fix("decode_tokens_per_s", decode_tokens_per_s)
        self.log.fix("answers_scale", answers.scale)
        self.say(f"  {answers.text(answers.of(whole))}; the decode server carries {decode_tokens_per_s:.0f} tokens/s")

    def measure_isolated(self, served: Endpoint, system: System) -> dict[int, float]:
        """TTFT (s) of isolated requests by prompt tokens, as the machine is now: its speed changes. On a server that
        decodes as well, decode steps are measured beside them.
        """
        solo_ttft_s = served.solo_ttft_s(PromptBuilder(0))
        self.log.add_solo(system.name, solo_ttft_s)
        if system.is_unified:
            self.log.add_steps(system.name, served.decode_steps(PromptBuilder(0)))
        served.come_to_rest()
        return solo_ttft_s

    def fix_time_scale(self, asked: float | Literal["auto"]) -> None:
        """Take ``asked``, unless it is "auto", for the rest of the run. Raises ValueError if the log has another."""
        if asked == "auto":
            return
        if self.log.facts.get("time_scale", asked) != asked:
            raise ValueError(
                f"the probes so far have the time scale {self.time_scale}, not {asked}: give another --out, or leave "
                "--time-scale out"
            )
        if "time_scale" not in self.log.facts:
            self.log.fix("time_scale", asked)

    def trace(self, seed: int, rate_rps: float, slo_scale: float = 1.0) -> Trace:
        """What is replayed at ``rate_rps`` by the wall clock."""
        return self.answers.of(self.plan.trace(seed, rate_rps, self.time_scale, slo_scale))

    def probe(
        self,
        served: Endpoint,
        system: System,
        seed: int,
        rate_rps: float,
        attainment: float | None = None,
        slo_scale: float = 1.0,
    ) -> Probe:
        """Replay a seed at a rate until it is known whether ``attainment`` is kept; to the end without one."""
        trace = self.trace(seed, rate_rps, slo_scale)
        total = len(trace.requests)

        def is_known(met: int, missed: int) -> bool:
            return attainment is not None and decided(met, missed, total, attainment) is not None

        enough = Enough(is_known, functools.partial(meets, judge=self.plan.judge))

        label = f"  {rate_rps:.2f} req/s, seed {seed}"
        with ReplayProgress(label, total, trace.requests[-1].arrival_s, self._console) as progress:
            run = served.replay(trace, PromptBuilder(seed), progress.update, enough, self.plan.slower)
        served.come_to_rest()
        probe = Probe(system.name, rate_rps, seed, total, run, served.blocking_s(run), slo_scale, self.plan.judge)
        self.log.add(probe)
        return probe

    def say(self, line: str) -> None:
        """Tell the user."""
        self._console.print(line, highlight=False, soft_wrap=True)


@contextmanager
def probing(
    servers: Servers,
    plan: Plan,
    out: Path,
    asked_time_scale: float | Literal["auto"],
    console: Console,
    *,
    side_by_side: bool = False,
) -> Iterator[Prober]:
    """What makes probes of ``servers`` and keeps them under ``out``.

    Raises ValueError if there are some of another setting, machine or version.
    """
    settings = plan.settings() | {"model": servers.model, **servers.settings()}
    settings |= {"cpu": machine()["cpu"], "versions": versions()}

    def detail(line: str) -> None:
        console.print(f"  {line}", highlight=False, soft_wrap=True)

    log = ProbeLog(out / "probes.jsonl", settings)
    with serving(servers, out, detail, side_by_side=side_by_side) as serve_system:
        prober = Prober(plan, log, serve_system, console, servers.options)
        prober.fix_time_scale(asked_time_scale)
        yield prober


def _settings_fact(system: System) -> str:
    return f"settings of {system.name}"


def outcome(probe: Probe) -> str:
    """What came of a probe, as text."""
    if not probe.run.client.valid:
        return f"not valid: {probe.run.client.invalid_reason}"
    low, high = probe.attainment_bounds
    known = len(probe.run.results) == probe.total
    return (f"{low:.1%}" if known else f"{low:.1%} to {high:.1%}") + f" of {probe.total} in time"
