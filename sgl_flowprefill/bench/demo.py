"""The main job end to end: one trace through FlowPrefill, then through SGLang's stock scheduler.

Both run on the same servers' settings, with the same prompts, at the same rate and time scale.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
from rich.console import Console

from sgl_flowprefill.bench.calibrate import measure_solo_ttft, time_scale
from sgl_flowprefill.bench.client import Client, GenerateApi, get_json
from sgl_flowprefill.bench.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.options import AUTO, add_trace_options, prompt_builder, requested_trace
from sgl_flowprefill.bench.progress import ReplayProgress
from sgl_flowprefill.bench.publish import publish
from sgl_flowprefill.bench.replay import replay
from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig

SYSTEMS: Final = {"flowprefill": "FlowPrefill", "sglang": "SGLang"}
DURATION_S: Final = 140.0
RATE_SCALE: Final = 2.0
MAX_OUTPUT_TOKENS: Final = 8
EMBEDDED_MODEL: Final = "embedded Llama"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench demo``."""
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of results (default %(default)s)")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=list(SYSTEMS),
        default=list(SYSTEMS),
        metavar="NAME",
        help=f"which systems to run, in order (default {' '.join(SYSTEMS)})",
    )
    add_trace_options(parser, rate_scale=RATE_SCALE, duration_s=DURATION_S, max_output_tokens=MAX_OUTPUT_TOKENS)
    servers = parser.add_argument_group("servers")
    servers.add_argument("--model-path", metavar="M", help="model to serve instead of the embedded one")
    servers.add_argument("--server-args", type=shlex.split, default=[], metavar="ARGS", help="for every SGLang server")
    servers.add_argument("--prefill-args", type=shlex.split, default=[], metavar="ARGS", help="for prefill servers")
    servers.add_argument("--decode-args", type=shlex.split, default=[], metavar="ARGS", help="for decode servers")
    servers.add_argument(
        "--stock-args",
        type=shlex.split,
        default=[],
        metavar="ARGS",
        help='for the stock prefill server only, e.g. "--chunked-prefill-size 2048"; SGLang\'s defaults otherwise',
    )
    FlowPrefillConfig.add_cli_args(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Run the demo. Returns 0, or 1 if a request failed or the client fell behind.

    Raises ClusterError, CalibrationError or ValueError with a sentence for the user.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    demo = _Demo(args, console, None if args.time_scale == AUTO else args.time_scale)
    systems = [demo.run_system(name) for name in args.systems]
    assert demo.time_scale is not None
    comparison = Comparison(
        systems=systems,
        trace=requested_trace(args, demo.time_scale),
        seed=args.seed,
        time_scale=demo.time_scale,
        model=args.model_path or EMBEDDED_MODEL,
        command=shlex.join(["python", "-m", "sgl_flowprefill.bench", *sys.argv[1:]]),
        settings={
            "longest answer (tokens)": args.max_output_tokens,
            "server options": shlex.join(args.server_args),
            "prefill options": shlex.join(args.prefill_args),
            "decode options": shlex.join(args.decode_args),
        },
    )
    return publish(comparison, args.out, console)


@dataclass
class _Demo:
    args: argparse.Namespace
    console: Console
    time_scale: float | None

    def run_system(self, name: str) -> SystemResult:
        """Start the system's cluster, measure lone requests, replay the trace, stop the cluster."""
        args, out = self.args, self.args.out
        event_log = out / "flowprefill-events.jsonl" if name == "flowprefill" else None
        if event_log:
            event_log.unlink(missing_ok=True)
        self.say(f"[bold]{SYSTEMS[name]}[/bold]")
        with Cluster(self.cluster_config(name, event_log), on_progress=self.detail) as cluster, beside(cluster):
            client = Client(cluster.gateway_url, GenerateApi())
            prompts = prompt_builder(args)
            solo_ttft_s = measure_solo_ttft(client, prompts, self.detail)
            if self.time_scale is None:
                self.time_scale = time_scale(solo_ttft_s)
                self.detail(f"time scale {self.time_scale:.2f}: arrivals and SLOs are stretched by it")
            trace = requested_trace(args, self.time_scale)
            self.detail(f"replaying {len(trace.requests)} requests, {trace.rate_rps:.2f} req/s")
            settings = _server_settings(cluster.prefill_url)
            with ReplayProgress(
                f"  {SYSTEMS[name]}", len(trace.requests), trace.requests[-1].arrival_s, self.console
            ) as progress:

                def on_progress(done: int, failed: int, in_flight: int) -> None:
                    cluster.check()
                    progress.update(done, failed, in_flight)

                replayed = replay(trace, client, prompts, on_progress)
            self.detail("stopping the servers")
        replayed.write_jsonl(out / f"{name}.jsonl")
        return SystemResult.of(
            name,
            _label(name, settings),
            replayed,
            trace,
            event_log=event_log,
            solo_ttft_s=solo_ttft_s,
            settings=settings,
        )

    def cluster_config(self, name: str, event_log: Path | None) -> ClusterConfig:
        """The cluster of a system; only the prefill scheduler differs."""
        args = self.args
        options = FlowPrefillConfig.from_namespace(args)
        if event_log:
            options = options.model_copy(update={"event_log": str(event_log.resolve())})
        return ClusterConfig(
            flowprefill=name == "flowprefill",
            model_path=args.model_path,
            server_args=args.server_args,
            prefill_args=args.prefill_args + (args.stock_args if name == "sglang" else []),
            decode_args=args.decode_args,
            log_dir=args.out / "logs" / name,
            options=options,
        )

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)

    def detail(self, line: str) -> None:
        self.say(f"  {line}")


@contextmanager
def beside(cluster: Cluster) -> Iterator[None]:
    """Keep this process off the CPUs that the prefill scheduler has for itself."""
    before = os.sched_getaffinity(0)
    if cluster.cpus:
        os.sched_setaffinity(0, cluster.cpus.others)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _server_settings(prefill_url: str) -> dict[str, Any]:
    """What the prefill server says of the settings that matter to a comparison; nothing if it does not say."""
    try:
        info = asyncio.run(get_json(f"{prefill_url}/server_info"))
    except (aiohttp.ClientError, TimeoutError, ValueError):
        return {}
    names = ("chunked_prefill_size", "schedule_policy", "max_total_tokens", "attention_backend", "disable_radix_cache")
    return {name: info[name] for name in names if name in info}


def _label(name: str, settings: dict[str, Any]) -> str:
    chunk_tokens = settings.get("chunked_prefill_size")
    if name == "flowprefill" or chunk_tokens is None:
        return SYSTEMS[name]
    return f"{SYSTEMS[name]}, " + (f"chunked at {chunk_tokens}" if chunk_tokens > 0 else "unchunked")
