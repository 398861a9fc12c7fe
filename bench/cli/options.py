"""Command-line options that several commands share, and the trace that they ask for."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Final

from sgl_flowprefill.bench.loadgen.calibrate import REFERENCE_TTFT_S
from sgl_flowprefill.bench.workloads.formats import FORMATS, load_trace
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.synthetic import QWEN_RATE_RPS, WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Slo, Trace

AUTO: Final = "auto"
TOKEN_IDS: Final = (1000, 4000)
"""Token ids of prompts: ordinary tokens of the embedded model, and of any model with a larger vocabulary."""


def add_trace_options(
    parser: argparse.ArgumentParser, *, rate_scale: float, duration_s: float
) -> argparse._ActionsContainer:
    """Add the options that ``requested_trace`` reads. Returns their group."""
    group = parser.add_argument_group("trace")
    group.add_argument(
        "--trace",
        default="qwen-like",
        metavar="NAME|FILE",
        help=f"built-in workload ({', '.join(WORKLOADS)}; default %(default)s) or a trace file",
    )
    group.add_argument(
        "--format",
        choices=[AUTO, *FORMATS],
        default=AUTO,
        help="format of the trace file; auto (default) goes by its fields",
    )
    group.add_argument(
        "--new-tokens-only",
        action="store_true",
        help="QwenTrace files: a text turn counts only the tokens that its parent's prompt did not have (the paper's "
        "rule, for servers without prefix caching)",
    )
    group.add_argument(
        "--slo",
        type=_class_slo,
        action="append",
        default=[],
        metavar="CLASS=TTFT[/TBT]",
        help="objectives (s) of a class of a trace file, instead of its defaults; can be repeated",
    )
    group.add_argument("--seed", type=int, default=0, help="seed of the workload and of the prompts (default 0)")
    group.add_argument(
        "--rate-scale",
        type=positive_float,
        default=rate_scale,
        metavar="X",
        help=f"multiple of the trace's own rate, {QWEN_RATE_RPS} req/s for built-in workloads (default %(default)s)",
    )
    lengths = f"{min(REFERENCE_TTFT_S)} to {max(REFERENCE_TTFT_S)}"
    group.add_argument(
        "--time-scale",
        type=scale_or_auto,
        default=AUTO,
        metavar="X",
        help="factor for inter-arrival times and SLOs; auto (default) measures how many times longer a lone request of "
        f"{lengths} tokens takes here than with Llama-3.1-8B on an A800, for which the SLOs are made",
    )
    group.add_argument(
        "--duration",
        type=positive_float,
        default=duration_s,
        metavar="S",
        help="replay what arrives in this many seconds of wall clock (default %(default)g)",
    )
    group.add_argument("--requests", type=positive_int, metavar="N", help="replay at most this many requests")
    group.add_argument("--max-prompt-tokens", type=positive_int, metavar="N", help="cut longer prompts")
    return group


def requested_trace(args: argparse.Namespace, time_scale: float) -> Trace:
    """The trace that the options ask for, scaled and cut, with its own answers.

    Raises ValueError with a sentence for a trace that cannot be read or comes out empty.
    """
    if args.trace in WORKLOADS:
        expected = args.duration * args.rate_scale / time_scale * QWEN_RATE_RPS
        enough = math.ceil(expected + 6 * math.sqrt(expected) + 10)
        trace = WORKLOADS[args.trace](enough, args.seed, QWEN_RATE_RPS)
    elif Path(args.trace).exists():
        trace = load_trace(Path(args.trace), args.format, slos=dict(args.slo), new_tokens_only=args.new_tokens_only)
    else:
        raise ValueError(f"trace {args.trace!r} is no file and no built-in workload ({', '.join(WORKLOADS)})")
    trace = trace.scaled(rate_scale=args.rate_scale, time_scale=time_scale).until(args.duration)
    trace = trace.limited(requests=args.requests, max_prompt_tokens=args.max_prompt_tokens)
    if not trace.requests:
        raise ValueError(f"no request of {trace.name} arrives within {args.duration:g} s; give a longer --duration")
    return trace


def prompt_builder(args: argparse.Namespace) -> PromptBuilder:
    """Prompts for the seed that the options name."""
    return PromptBuilder(args.seed, *TOKEN_IDS)


def positive_float(text: str) -> float:
    """An argparse type: a positive finite number."""
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def attainment_share(text: str) -> float:
    """An argparse type: a share of requests, above 0 and below 1."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1, like 0.9")
    return value


def scale_or_auto(text: str) -> float | str:
    """An argparse type: a time scale, or ``auto``."""
    return AUTO if text == AUTO else positive_float(text)


def _class_slo(text: str) -> tuple[str, Slo]:
    name, _, values = text.partition("=")
    ttft_s, _, tbt_s = values.partition("/")
    try:
        return name, Slo(positive_float(ttft_s), positive_float(tbt_s) if tbt_s else math.inf)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form CLASS=TTFT[/TBT], in seconds") from None
