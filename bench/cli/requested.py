"""What the options of a command ask for: its trace, and its servers."""

from __future__ import annotations

import math
from pathlib import Path

from sgl_flowprefill.bench.cli.options import ServerOptions, TraceOptions
from sgl_flowprefill.bench.systems.serving import Servers
from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS, WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Trace


def requested_trace(options: TraceOptions, time_scale: float) -> Trace:
    """The trace that the options ask for, scaled and cut, with its own answers.

    Raises ValueError with a sentence for a trace that cannot be read or comes out empty.
    """
    if options.trace in WORKLOADS:
        expected = options.duration * options.rate_scale / time_scale * QWEN_RATE_RPS
        enough = math.ceil(expected + 6 * math.sqrt(expected) + 10)
        trace = WORKLOADS[options.trace](enough, options.seed, QWEN_RATE_RPS)
    elif Path(options.trace).exists():
        slos = dict(options.slo)
        trace = load_trace(Path(options.trace), options.format, slos=slos, new_tokens_only=options.new_tokens_only)
    else:
        raise ValueError(f"trace {options.trace!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    trace = trace.scaled(rate_scale=options.rate_scale, time_scale=time_scale).until(options.duration)
    trace = trace.limited(requests=options.requests, max_prompt_tokens=options.max_prompt_tokens)
    if not trace.requests:
        raise ValueError(f"no request of {trace.name} arrives within {options.duration:g} s; give a longer --duration")
    return trace


def requested_servers(options: ServerOptions) -> Servers:
    """The servers of every system. Raises ConfigError."""
    return Servers(
        options.model_path,
        options.server_args,
        options.prefill_args,
        options.decode_args,
        options.flowprefill.config(),
    )
