"""The main job end to end: one trace through FlowPrefill, then through SGLang's stock scheduler.

Both run on the same servers' settings, with the same prompts, at the same rate and time scale.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from sgl_flowprefill.bench.calibrate import time_scale
from sgl_flowprefill.bench.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.options import AUTO, add_trace_options, prompt_builder, requested_trace
from sgl_flowprefill.bench.page import add_picture_option, browser, take_picture
from sgl_flowprefill.bench.progress import ReplayProgress
from sgl_flowprefill.bench.publish import publish
from sgl_flowprefill.bench.serving import Servers, serve
from sgl_flowprefill.bench.systems import System, add_systems_option, select

DURATION_S: Final = 140.0
RATE_SCALE: Final = 2.0
MAX_OUTPUT_TOKENS: Final = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench demo``."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of results (default %(default)s)")
    add_systems_option(parser, "flowprefill", "sglang")
    add_trace_options(parser, rate_scale=RATE_SCALE, duration_s=DURATION_S, max_output_tokens=MAX_OUTPUT_TOKENS)
    add_picture_option(parser)
    Servers.add_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the demo. Returns 0, or 1 if a request failed or the client fell behind.

    Raises ClusterError, CalibrationError or ValueError with a sentence for the user.
    """
    if args.png:
        browser()
    args.out.mkdir(parents=True, exist_ok=True)
    servers = Servers.from_args(args)
    demo = _Demo(args, servers, console, None if args.time_scale == AUTO else args.time_scale)
    results = [demo.run_system(system) for system in select(args.systems)]
    assert demo.time_scale is not None
    comparison = Comparison(
        systems=results,
        trace=requested_trace(args, demo.time_scale),
        seed=args.seed,
        time_scale=demo.time_scale,
        model=servers.model,
        command=shlex.join(["python", "-m", "sgl_flowprefill.bench", *sys.argv[1:]]),
        settings={"longest answer (tokens)": args.max_output_tokens, **servers.settings()},
    )
    code = publish(comparison, args.out, console)
    if args.png:
        demo.say(f"Picture: {take_picture(args.out / 'report.html')}")
    return code


@dataclass
class _Demo:
    args: argparse.Namespace
    servers: Servers
    console: Console
    time_scale: float | None

    def run_system(self, system: System) -> SystemResult:
        """Start the system's cluster, measure lone requests, replay the trace, stop the cluster."""
        args = self.args
        self.say(f"[bold]{system.label}[/bold]")
        with serve(system, self.servers, args.out, self.detail) as served:
            prompts = prompt_builder(args)
            solo_ttft_s = served.solo_ttft_s(prompts, self.detail)
            if self.time_scale is None:
                self.time_scale = time_scale(solo_ttft_s)
                self.detail(f"time scale {self.time_scale:.2f}: arrivals and SLOs are stretched by it")
            trace = requested_trace(args, self.time_scale)
            self.detail(f"replaying {len(trace.requests)} requests, {trace.rate_rps:.2f} req/s")
            settings = served.settings()
            with ReplayProgress(
                f"  {system.label}", len(trace.requests), trace.requests[-1].arrival_s, self.console
            ) as progress:
                replayed = served.replay(trace, prompts, progress.update)
        replayed.write_jsonl(args.out / f"{system.name}.jsonl")
        return SystemResult.of(
            system.name,
            _label(system, settings),
            replayed,
            trace,
            event_log=served.event_log,
            solo_ttft_s=solo_ttft_s,
            settings=settings,
        )

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def detail(self, line: str) -> None:
        self.say(f"  {line}")


def _label(system: System, settings: Mapping[str, Any]) -> str:
    """The system's label, with the chunk size that SGLang chose where the system leaves that to it."""
    chunk_tokens = settings.get("chunked_prefill_size")
    if not system.is_stock or system.stock_args or chunk_tokens is None:
        return system.label
    return f"{system.label}, " + (f"chunked at {chunk_tokens}" if chunk_tokens > 0 else "unchunked")
