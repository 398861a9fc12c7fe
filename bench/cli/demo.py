"""The main job end to end: one trace through FlowPrefill and through SGLang's stock scheduler, in turns.

Both run on the same servers' settings, with the same prompts, at the same rate and time scale. The servers of all stay
up, and systems without the turn are stopped (SIGSTOP). First each system answers isolated requests, whose times
make the time scale, then each half of the trace is replayed on each; the order turns round every time, so that none
always meets the machine first. A turn ends when all its requests are answered.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from sgl_flowprefill.bench.cli.options import AUTO, Demo
from sgl_flowprefill.bench.cli.requested import check_trace, requested_servers, requested_trace
from sgl_flowprefill.bench.loadgen.calibrate import median_of, time_scale
from sgl_flowprefill.bench.loadgen.progress import ReplayProgress
from sgl_flowprefill.bench.loadgen.replay import ReplayRun, joined
from sgl_flowprefill.bench.metrics.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.reports.page import browser, take_picture
from sgl_flowprefill.bench.reports.publish import publish
from sgl_flowprefill.bench.systems.catalog import endpoints, select
from sgl_flowprefill.bench.systems.endpoint import check_room
from sgl_flowprefill.bench.systems.serving import Serve, Servers, serving
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, UNIFIED_DECODE_SHARE, Answers
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.events import of_decode_server
from sgl_flowprefill.timeline import SUFFIX, write_timeline

ROUNDS: Final = 2
"""Turns of each system with isolated requests, and with parts of the trace."""


def run(options: Demo, console: Console) -> int:
    """Run the demo. Returns 0, or 1 if a request failed or the client fell behind.

    Raises ClusterError, CalibrationError or ValueError with a sentence for the user.
    """
    check_trace(options.trace, needs_rate=True)
    scale = options.trace.time_scale
    if scale != AUTO:
        parts_of(requested_trace(options.trace, scale))
    if options.png:
        browser()
    options.out.mkdir(parents=True, exist_ok=True)
    servers = requested_servers(options.servers).with_metrics()

    def say(line: str) -> None:
        console.print(f"  {line}", highlight=False, soft_wrap=True)

    with serving(servers, options.out, say, side_by_side=True) as serve:
        systems = [*select(options.systems), *endpoints(options.endpoint)]
        turns = ComparedInTurns(options, systems, serve, console)
        comparison = turns.run(servers)
    code = publish(comparison, options.out, console)
    for timeline in turns.write_timelines():
        say(f"Timeline, for https://ui.perfetto.dev: {timeline}")
    if options.png:
        say(f"Picture: {take_picture(options.out / 'report.html')}")
    return code


class ComparedInTurns:
    """The systems, up side by side, taking turns."""

    def __init__(self, options: Demo, systems: Sequence[System], serve: Serve, console: Console) -> None:
        self._options = options
        self._systems = systems
        self._serve = serve
        self._console = console
        self._prompts = PromptBuilder(options.trace.seed)
        self._solo_ttft_s: dict[str, list[dict[int, float]]] = {system.name: [] for system in systems}
        self._settings: dict[str, Mapping[str, Any]] = {}
        self._event_logs: dict[str, Path | None] = {}
        self._decode_tokens_per_s: dict[str, list[float]] = {system.name: [] for system in systems}

    def run(self, servers: Servers) -> Comparison:
        """Isolated requests on all systems, then the trace. ``servers`` is what they were started with."""
        decode_tokens_per_s = self._measure()
        scale = self._options.trace.time_scale
        if scale == AUTO:
            scale = time_scale(median_of([one for turns in self._solo_ttft_s.values() for one in turns]))
            self._detail(f"time scale {scale:.2f}, by all of them: arrivals and SLOs are stretched by it")
        whole = requested_trace(self._options.trace, scale)
        answers = Answers(max_tokens=self._options.max_output_tokens)
        if decode_tokens_per_s is not None:
            share = UNIFIED_DECODE_SHARE if self._options.unified else DECODE_SHARE
            answers = Answers.carried(whole, whole.positive_rate_rps(), decode_tokens_per_s, share)
            what = "a server" if self._options.unified else "the decode server"
            self._detail(f"{what} carries {decode_tokens_per_s:.0f} tokens/s")
        trace = answers.of(whole)
        self._detail(answers.text(trace))
        return Comparison(
            kind="demo",
            systems=self._replay(trace),
            trace=trace,
            seed=self._options.trace.seed,
            time_scale=scale,
            model=servers.model,
            answers=answers,
            settings=servers.settings(),
            judge="gaps" if self._options.unified else "ttft",
        )

    def write_timelines(self) -> list[Path]:
        """Write the timeline of each system that has event logs, beside the reports."""
        written = []
        for name, log in self._event_logs.items():
            if log is not None and log.exists():
                written.append(self._options.out / f"{name}{SUFFIX}")
                write_timeline([one for one in (log, of_decode_server(log)) if one.exists()], written[-1])
        return written

    def _in_turns(self, rounds: int) -> Iterator[tuple[int, System]]:
        """(round, system), each round in the order opposite to the one before."""
        for number in range(rounds):
            for system in self._systems if number % 2 == 0 else reversed(self._systems):
                yield number, system

    def _measure(self) -> float | None:
        """Start all systems and send isolated requests to each. Returns the tokens per second that a decode server
        carries, the median over all turns, if answers depend on it.
        """
        for number, system in self._in_turns(ROUNDS):
            self._say(f"[bold]{system.label}[/bold]" + (": isolated requests again" if number else ""))
            with self._serve(system) as served:
                self._solo_ttft_s[system.name].append(served.solo_ttft_s(self._prompts, self._detail))
                self._settings[system.name], self._event_logs[system.name] = served.settings(), served.event_log
                if self._options.max_output_tokens is None:
                    self._decode_tokens_per_s[system.name].append(served.decode_tokens_per_s(self._prompts))
        carried = [one for turns in self._decode_tokens_per_s.values() for one in turns]
        return float(np.median(carried)) if carried else None

    def _replay(self, trace: Trace) -> list[SystemResult]:
        """Replay ``trace`` in parts, each on all systems, which have answered all of one before they are stopped."""
        for system in self._systems:
            check_room(self._settings[system.name], trace)
        parts, starts_s = parts_of(trace)
        offsets = [sum(len(part.requests) for part in parts[:number]) for number in range(ROUNDS)]
        runs: dict[str, list[ReplayRun]] = {system.name: [] for system in self._systems}
        for number, system in self._in_turns(ROUNDS):
            part = parts[number]
            label = f"{system.label}, part {number + 1} of {ROUNDS}"
            self._say(f"{label}: {len(part.requests)} requests, {trace.rate_rps:.2f} req/s")
            prompts = self._prompts.beginning_at(offsets[number])
            progress = ReplayProgress(f"  {label}", len(part.requests), part.requests[-1].arrival_s, self._console)
            with self._serve(system) as served, progress:
                runs[system.name].append(served.replay(part, prompts, progress.update))
        return [self._result(system, runs[system.name], trace, offsets, starts_s) for system in self._systems]

    def _result(
        self,
        system: System,
        turns: Sequence[ReplayRun],
        trace: Trace,
        offsets: Sequence[int],
        starts_s: Sequence[float],
    ) -> SystemResult:
        run = joined(turns, offsets, starts_s)
        run.write_jsonl(self._options.out / f"{system.name}.jsonl")
        return SystemResult.of(
            system.name,
            _label(system, self._settings[system.name]),
            run,
            trace,
            turns=turns,
            event_log=self._event_logs[system.name],
            solo_ttft_s=median_of(self._solo_ttft_s[system.name]),
            decode_tokens_per_s=self._decode_tokens_per_s[system.name],
            settings=self._settings[system.name],
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)

    def _detail(self, line: str) -> None:
        self._say(f"  {line}")


def parts_of(trace: Trace) -> tuple[list[Trace], list[float]]:
    """``trace`` in ROUNDS parts, and when each begins. Raises ValueError where a part has no request."""
    ends_s = [trace.requests[-1].arrival_s * (number + 1) / ROUNDS for number in range(ROUNDS)]
    starts_s = [0.0, *ends_s[:-1]]
    ends_s[-1] = math.inf
    parts = [trace.between(*span_s) for span_s in zip(starts_s, ends_s, strict=True)]
    for number, part in enumerate(parts, start=1):
        if not part.requests:
            raise ValueError(f"no request arrives in part {number} of the trace; give a longer --duration")
    return parts, starts_s


def _label(system: System, settings: Mapping[str, Any]) -> str:
    """The system's label, with the chunk size that SGLang chose where the system leaves that to it."""
    chunk_tokens = settings.get("chunked_prefill_size")
    if not system.is_stock or system.prefill_args or chunk_tokens is None:
        return system.label
    return f"{system.label}, " + (f"chunked at {chunk_tokens}" if chunk_tokens > 0 else "unchunked")
