"""``bench replay``: replay a trace against an endpoint that is already running."""

from __future__ import annotations

import random
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from sgl_flowprefill.bench.cli.options import AUTO, Replay
from sgl_flowprefill.bench.cli.requested import check_trace, requested_trace
from sgl_flowprefill.bench.loadgen.calibrate import measure_isolated_ttft, time_scale
from sgl_flowprefill.bench.loadgen.client import APIS, Client, served_model
from sgl_flowprefill.bench.loadgen.progress import ReplayProgress
from sgl_flowprefill.bench.loadgen.replay import replay
from sgl_flowprefill.bench.metrics.comparison import Comparison, SystemResult
from sgl_flowprefill.bench.reports.publish import publish
from sgl_flowprefill.bench.workloads.answers import Answers
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.events import read_events


def run(options: Replay, console: Console) -> int:
    """Replay, print the table, write the reports. Returns 0, or 1 if a request failed or the client fell behind.

    Raises CalibrationError, ValueError or OSError with a sentence for the user.
    """
    check_trace(options.trace)
    _check_files(options.out, options.event_log)
    model = options.model or served_model(options.url)
    client = Client(options.url, APIS[options.api](model), options.timeout)
    prompts = PromptBuilder(random.getrandbits(32) if options.prompt_seed is None else options.prompt_seed)
    solo_ttft_s: dict[int, float] = {}
    scale = options.trace.time_scale
    if scale == AUTO:
        solo_ttft_s = measure_isolated_ttft(client, prompts, lambda line: console.print(line, highlight=False))
        scale = time_scale(solo_ttft_s)
    answers = Answers(max_tokens=options.max_output_tokens)
    trace = answers.of(requested_trace(options.trace, scale))
    with ReplayProgress(options.label, len(trace.requests), trace.requests[-1].arrival_s, console) as progress:
        replayed = replay(trace, client, prompts, progress.update)
    replayed.write_jsonl(options.out / f"{options.label}.jsonl")
    system = SystemResult.of(
        options.label, options.label, replayed, trace, event_log=options.event_log, solo_ttft_s=solo_ttft_s
    )
    comparison = Comparison(
        kind="replay",
        systems=[system],
        trace=trace,
        seed=options.trace.seed,
        time_scale=scale,
        answers=answers,
        model=model,
        settings={"prompt_seed": prompts.seed},
    )
    return publish(comparison, options.out, console)


def _check_files(out: Path, event_log: Path | None) -> None:
    """Raises OSError or EventLogError for files that would make a run vain: results that cannot be written, an event
    log that is none.
    """
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=out):
        pass
    if event_log is not None:
        next(read_events(event_log), None)
