"""What the options of a command ask for: its trace, and its servers."""

from __future__ import annotations

import math
from pathlib import Path

from sgl_flowprefill.bench.cli.options import AUTO, ServerOptions, TraceOptions
from sgl_flowprefill.bench.systems.serving import Servers
from sgl_flowprefill.bench.workloads.formats import load_trace
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS, WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Trace


def check_trace(options: TraceOptions, *, needs_rate: bool = False) -> None:
    """Refuse what can be seen to be wrong before servers run and the time scale is known.

    Raises ValueError with a sentence.
    """
    if options.trace in WORKLOADS:
        _refuse_options_of_files(options)
        return
    trace = _file(options)
    if needs_rate:
        trace.positive_rate_rps()


def requested_trace(options: TraceOptions, time_scale: float) -> Trace:
    """The trace that the options ask for, scaled and cut, with its own answers.

    Raises ValueError with a sentence for a trace that cannot be read or comes out empty, or options that do not fit it.
    """
    if options.trace in WORKLOADS:
        _refuse_options_of_files(options)
        expected = options.duration * options.rate_scale / time_scale * QWEN_RATE_RPS
        enough = math.ceil(expected + 6 * math.sqrt(expected) + 10)
        trace = WORKLOADS[options.trace](enough, options.seed, QWEN_RATE_RPS)
    else:
        trace = _file(options)
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


def _file(options: TraceOptions) -> Trace:
    path, slos = Path(options.trace), dict(options.slo)
    if not path.exists():
        raise ValueError(f"trace {options.trace!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    return load_trace(path, options.format, slos=slos, new_tokens_only=options.new_tokens_only)


def _refuse_options_of_files(options: TraceOptions) -> None:
    given = {
        "--slo": bool(options.slo),
        "--new-tokens-only": options.new_tokens_only,
        "--format": options.format != AUTO,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{flag} is for trace files, and {options.trace} is a built-in workload, with classes and objectives "
                "of its own: leave it out"
            )
