"""Options of what is replayed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import UseAppendAction, arg

from sgl_flowprefill.bench.cli.options.base import Options
from sgl_flowprefill.bench.cli.options.values import ClassSlo, Factor, FactorOrAuto, MaybeCount, Seconds, Whole
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS

Format = Literal["auto", "qwen", "mooncake", "azure", "burstgpt"]


@dataclass(frozen=True)
class TraceOptions(Options):
    """What is replayed."""

    trace: Annotated[
        str,
        arg(metavar="NAME|FILE", help=f"built-in workload ({', '.join(WORKLOADS)}) or a trace file"),
    ] = "qwen-like"
    format: Format = "auto"
    """format of the trace file; auto goes by its fields"""
    new_tokens_only: bool = False
    """QwenTrace: a text turn counts only tokens that its parent's prompt did not have, as in the paper"""
    slo: UseAppendAction[tuple[ClassSlo, ...]] = ()
    """objectives (s) of a class of a trace file, instead of its defaults; can be repeated"""
    seed: Whole = 0
    """seed of the workload, in demo of the prompts, too"""
    rate_scale: Factor = 1.0
    """multiple of the trace's own rate, which is 2.75 req/s for built-in workloads"""
    time_scale: FactorOrAuto = "auto"
    """factor for arrivals and SLOs; auto: how many times longer an isolated request takes than on the paper's A800"""
    duration: Seconds = 60.0
    """replay what arrives in this many seconds of wall clock"""
    requests: MaybeCount = None
    """replay at most this many requests"""
    max_prompt_tokens: MaybeCount = None
    """cut longer prompts"""
