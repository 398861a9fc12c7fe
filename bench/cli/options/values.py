"""Kinds of values that options of several commands have: how they are written, their bounds, their help texts."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg
from tyro.constructors import PrimitiveConstructorSpec

from sgl_flowprefill.bench.cli.options.base import AT_LEAST_0, POSITIVE, SHARE, OptionError
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS
from sgl_flowprefill.bench.workloads.trace import Slo


def _class_slo(values: Sequence[str]) -> tuple[str, Slo]:
    name, _, objectives = values[0].partition("=")
    ttft_s, _, tbt_s = objectives.partition("/")
    try:
        slo = Slo(float(ttft_s), float(tbt_s) if tbt_s else math.inf)
    except ValueError:
        slo = Slo(0.0, 0.0)
    if not (POSITIVE.holds(slo.ttft_s) and slo.tbt_s > 0):
        raise OptionError(f"--slo {values[0]}: it has to be CLASS=TTFT[/TBT] in seconds, like text=0.5/0.1")
    return name, slo


ClassSlo = Annotated[
    tuple[str, Slo],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="CLASS=TTFT[/TBT]",
        instance_from_str=_class_slo,
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [f"{value[0]}={value[1].ttft_s}/{value[1].tbt_s}"],
    ),
]
Arguments = Annotated[
    tuple[str, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="'ARGS'",
        instance_from_str=lambda values: tuple(shlex.split(values[0])),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [shlex.join(value)],
    ),
]


def shown(default: str) -> str:
    """What the help says of a default; the text of an option says what having none means."""
    return "" if default in ("None", "inf", "''") else f"(default: {default})"


Whole = Annotated[int, AT_LEAST_0, arg(metavar="N")]
Count = Annotated[int, POSITIVE, arg(metavar="N")]
Counts = Annotated[tuple[int, ...], POSITIVE, arg(metavar="N...")]
MaybeCount = Annotated[int | None, POSITIVE, arg(metavar="N", help_behavior_hint=shown)]
Seconds = Annotated[float, POSITIVE, arg(metavar="S", help_behavior_hint=shown)]
Factor = Annotated[float, POSITIVE, arg(metavar="X")]
FactorOrAuto = Annotated[float | Literal["auto"], POSITIVE, arg(metavar="X|auto")]
Share = Annotated[float, SHARE, arg(metavar="SHARE")]
Model = Annotated[str | None, arg(metavar="M", help_behavior_hint=shown)]
NewFile = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=shown)]
Systems = Annotated[
    tuple[str, ...],
    arg(metavar="NAME...", help="systems to run, in order: names or globs of --list-systems, or all"),
]
MaxAnswer = Annotated[
    int | None,
    POSITIVE,
    arg(
        metavar="N",
        help="keep the lengths of answers and cut those that are longer, for example 8",
        help_behavior_hint="(default: all are shortened by one factor, so that they take half of what the decode "
        "server carries, which is measured)",
    ),
]
Endpoints = Annotated[
    UseAppendAction[tuple[str, ...]],
    arg(
        metavar="NAME=URL",
        help="a running server with OpenAI's completions API (vLLM, TensorRT-LLM, SGLang, ...) that takes part as it "
        "is, for example vllm=http://127.0.0.1:8000/v1; can be repeated",
        help_behavior_hint="",
    ),
]
Unified = Annotated[
    bool,
    arg(
        help="servers that prefill and decode, judged by the first token and the time between tokens together; "
        "--unified --help shows its defaults",
        help_behavior_hint="",
    ),
]
Workload = Annotated[str, arg(metavar="NAME|FILE", help=f"{', '.join(WORKLOADS)}, or a trace file")]
ListSystems = Annotated[bool, arg(help="show every system's settings, and end", help_behavior_hint="")]
Seeds = Annotated[int, POSITIVE, arg(metavar="K", help="as many runs, with seeds 0 to K-1")]
Picture = Annotated[bool, arg(help="also write the top of the report as a picture, by an installed Chromium")]
Folder = Annotated[Path, arg(metavar="FOLDER", help="folder of results")]
