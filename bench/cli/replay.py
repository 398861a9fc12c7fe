"""``bench replay``: replay a trace against an endpoint that is already running."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from sgl_flowprefill.bench.cli.options import (
    AUTO,
    add_trace_options,
    positive_float,
    positive_int,
    prompt_builder,
    requested_trace,
)
from sgl_flowprefill.bench.loadgen.calibrate import measure_isolated_ttft, time_scale
from sgl_flowprefill.bench.loadgen.client import APIS, Client, served_model
from sgl_flowprefill.bench.loadgen.progress import ReplayProgress
from sgl_flowprefill.bench.loadgen.replay import replay
from sgl_flowprefill.bench.metrics.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.reports.publish import publish
from sgl_flowprefill.bench.workloads.answers import Answers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench replay``."""
    parser.add_argument("--url", required=True, help="endpoint, e.g. the gateway's http://127.0.0.1:30000")
    parser.add_argument(
        "--api",
        choices=list(APIS),
        default="generate",
        help="generate is SGLang's own with token ids; completions and chat are OpenAI's (default %(default)s)",
    )
    parser.add_argument("--model", help="model name for the OpenAI APIs (default: the first that the endpoint lists)")
    parser.add_argument("--label", default="endpoint", help="name of the system in the table (default %(default)s)")
    parser.add_argument(
        "--timeout", type=positive_float, default=600.0, metavar="S", help="longest silence of a stream (default 600)"
    )
    parser.add_argument(
        "--event-log", type=Path, metavar="FILE", help="FlowPrefill's event log, if the server on this machine has one"
    )
    parser.add_argument("--out", type=Path, default=Path("out/replay"), help="folder of results (default %(default)s)")
    trace_options = add_trace_options(parser, rate_scale=1.0, duration_s=60.0)
    trace_options.add_argument("--max-output-tokens", type=positive_int, metavar="N", help="cut longer answers")


def run(args: argparse.Namespace, console: Console) -> int:
    """Replay, print the table, write the reports. Returns 0, or 1 if a request failed or the client fell behind.

    Raises CalibrationError or ValueError with a sentence for the user.
    """
    model = args.model or served_model(args.url)
    client = Client(args.url, APIS[args.api](model), args.timeout)
    prompts = prompt_builder(args)
    solo_ttft_s: dict[int, float] = {}
    scale = args.time_scale
    if scale == AUTO:
        solo_ttft_s = measure_isolated_ttft(client, prompts, lambda line: console.print(line, highlight=False))
        scale = time_scale(solo_ttft_s)
    answers = Answers(max_tokens=args.max_output_tokens)
    trace = answers.of(requested_trace(args, scale))
    with ReplayProgress(args.label, len(trace.requests), trace.requests[-1].arrival_s, console) as progress:
        replayed = replay(trace, client, prompts, progress.update)
    replayed.write_jsonl(args.out / f"{args.label}.jsonl")
    system = SystemResult.of(args.label, args.label, replayed, trace, event_log=args.event_log, solo_ttft_s=solo_ttft_s)
    comparison = Comparison(
        kind="replay",
        systems=[system],
        trace=trace,
        seed=args.seed,
        time_scale=scale,
        answers=answers,
        model=model,
    )
    return publish(comparison, args.out, console)
