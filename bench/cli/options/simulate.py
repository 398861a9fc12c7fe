"""Options of ``bench simulate``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Final, Literal

from tyro.conf import arg, create_mutex_group

from sgl_flowprefill.bench.cli.options.base import CHANGE, POSITIVE, Command
from sgl_flowprefill.bench.cli.options.values import (
    Count,
    Factor,
    MaybeCount,
    NewFile,
    Seconds,
    Seeds,
    Share,
    Whole,
    shown,
)
from sgl_flowprefill.bench.workloads.synthetic import WORKLOADS
from sgl_flowprefill.policy import POLICIES

Router = Literal["round-robin", "least-work"]
_MODE: Final = create_mutex_group(required=False, title="instead of a comparison at one rate")


@dataclass(frozen=True)
class Simulate(Command):
    """policies on a model of the machine: attainment, goodput, capacity, and the limit"""

    name = "simulate"
    examples = (
        "--goodput --trace qwen-like mixed",
        "--plan --rate 100",
        "--unified --goodput --trace qwen-like mixed --policy feasible",
    )
    unified: bool = False
    """servers that prefill and decode, judged by TTFT and time between tokens together"""
    goodput: Annotated[bool, _MODE] = False
    """search each policy's highest rate at 90% and 99%"""
    plan: Annotated[bool, _MODE] = False
    """search the fewest instances that keep --attainment"""
    speed: Annotated[bool, _MODE] = False
    """measure how fast the policy is by itself"""
    oracle: Annotated[bool, _MODE] = False
    """compare learned predictions with those of an oracle, seed by seed"""
    policy: Annotated[
        tuple[str, ...],
        arg(
            metavar="NAME...",
            help=f"{', '.join(POLICIES)}, with /layer or /chunk for coarser preemption, or a system of "
            "docs/systems.md, e.g. stock-spf-2048; with --unified also stock-spf-768-mixed, stock-spf-512-interval-1",
            help_behavior_hint="(default: a comparison of them)",
        ),
    ] = ()
    cost: Annotated[str, arg(metavar="NAME|FILE")] = "llama-3.1-8b-a800"
    """llama-3.1-8b-a800, qwen2.5-14b-a800-tp2, qwen3-30b-a3b-a800, or the file of a TTFT profile"""
    layers: Count = 32
    """layers of a profile's model"""
    trace: Annotated[tuple[str, ...], arg(metavar="NAME|FILE...", help=f"{', '.join(WORKLOADS)}, or trace files")] = (
        "qwen-like",
    )
    rate: Annotated[float | None, POSITIVE, arg(metavar="RPS", help_behavior_hint=shown)] = None
    """arrival rate, in requests a second, which --time-scale leaves as it is (default: a file's own, or 5.5 for each
    instance, divided by --time-scale)"""
    time_scale: Factor = 1.0
    """factor of arrivals and SLOs"""
    requests: Count = 4000
    """requests of a run"""
    seeds: Seeds = 3
    instances: Count = 1
    """prefill instances"""
    router: Router = "least-work"
    """how requests are spread over the instances"""
    attainment: Share = 0.99
    """share of requests that --plan keeps in time"""
    max_suspended: Count = 16
    """suspended prefills at a time"""
    max_batch_tokens: Count = 2048
    """new tokens of a batch of several requests; 1: no batches"""
    max_starvation_s: Seconds = 60.0
    """late requests that have waited this long take turns before all others"""
    max_blocking_ms: Annotated[float, POSITIVE, arg(metavar="MS")] = 5.0
    """tiles of long operators"""
    lookahead: Whole = 0
    """operators queued on the device"""
    hub_us: Annotated[float, arg(metavar="US")] = 0.0
    """time of a visit to the scheduler"""
    bootstrap_ms: Annotated[float, arg(metavar="MS")] = 0.0
    """time before a request can start"""
    kv_tokens: MaybeCount = None
    """KV cache of an instance (default: the cost model's)"""
    link_gbps: Annotated[float, POSITIVE, arg(metavar="GBPS", help_behavior_hint=shown)] = math.inf
    """KV transfer, Gbit/s (default: no time)"""
    prediction_error: Annotated[float, arg(metavar="SD")] = 0.0
    """standard deviation of the logarithm of predictions"""
    prediction_bias: Factor = 1.0
    """factor of all predictions"""
    forward_error: Annotated[float, arg(metavar="SD")] = 0.0
    """standard deviation of the logarithm of the times of FlowPrefill's forwards around the predicted ones"""
    learned: bool = False
    """predict as a server does: by a profile of its first start, corrected and refitted while it serves"""
    slower: Annotated[float, CHANGE, arg(metavar="SHARE")] = 0.0
    """beside the machine as it is, one that becomes slower by this share, such as 0.2, in the middle (faster if it is
    negative); with --learned. With --oracle, that one alone"""
    step_ms: Annotated[float | None, POSITIVE, arg(metavar="MS", help_behavior_hint=shown)] = None
    """--unified: fixed time of a decode step (default: the cost model's; 8 for a profile)"""
    step_ms_per_stream: Annotated[float | None, POSITIVE, arg(metavar="MS", help_behavior_hint=shown)] = None
    """--unified: time of a decode step for each stream (default: the cost model's; 1.9 for a profile)"""
    step_error: Annotated[float, arg(metavar="SD")] = 0.0
    """--unified: standard deviation of the logarithm of the times of steps"""
    no_prefix_cache: bool = False
    """compute every prompt whole"""
    no_limit: bool = False
    """leave out the clairvoyant limit (slow beyond 10,000)"""
    out: NewFile = None
    """write the figures as JSON"""
