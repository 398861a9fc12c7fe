"""Searches over simulated runs: the highest rate that keeps an attainment, and the fewest instances that do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from sgl_flowprefill.bench.simulator.limit import attainment_limit, joint_limit
from sgl_flowprefill.bench.simulator.requests import prepare
from sgl_flowprefill.bench.simulator.systems import Setup, Simulated, run
from sgl_flowprefill.bench.workloads.trace import Trace

PRECISION: Final = 0.01
"""A rate is found to within this share of itself."""
MAX_INSTANCES: Final = 4096
MAX_SHARE: Final = 4096
"""Multiple of the value that a search starts with: where nothing below it is too high, nothing is."""


def mean_attainment(system: Simulated, traces: Sequence[Trace], setup: Setup) -> float:
    """Attainment over all requests of ``traces`` (the seeds of one workload)."""
    runs = [run(system, trace, setup) for trace in traces]
    return sum(request.met for result in runs for request in result.requests) / sum(len(r.requests) for r in runs)


def mean_limit(traces: Sequence[Trace], setup: Setup, max_batch_tokens: int, *, joint: bool = False) -> float:
    """Upper bound of the attainment over all requests of ``traces``, of any scheduler with such batches; ``joint``: of
    servers that decode as well, by gaps too.
    """
    met = 0.0
    for trace in traces:
        machine = setup.met_by(trace).machine
        requests = prepare(trace, machine.cost, setup.conditions)
        rest = max_batch_tokens, setup.instances, machine.slowdown
        limit = (
            joint_limit(requests, machine.cost, setup.steps(), *rest)
            if joint
            else attainment_limit(requests, machine.cost, *rest)
        )
        met += len(requests) * limit
    return met / sum(len(trace.requests) for trace in traces)


def highest(meets: Callable[[float], bool], start: float, least: float = 1 / 1000) -> float:
    """The highest value at which ``meets`` holds, to within PRECISION, for one that holds up to some value only.

    0 when it holds nowhere above ``least``, a share of ``start``. Raises ValueError when it holds up to MAX_SHARE.
    """
    low, high = 0.0, start
    while meets(high):
        low, high = high, 2 * high
        if high > MAX_SHARE * start:
            raise ValueError(
                f"so few requests keep the attainment at any rate, even when all arrive at once (tried up to {low:.4g} "
                "req/s): simulate more with --requests"
            )
    while low == 0.0 and high > start * least:
        middle = high / 2
        low, high = (middle, high) if meets(middle) else (0.0, middle)
    while low > 0.0 and high > low * (1 + PRECISION):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def max_rate_rps(system: Simulated, traces: Sequence[Trace], setup: Setup, attainment: float) -> float:
    """Highest arrival rate at which ``attainment`` of the requests meet their SLO; the same draws at every rate."""
    return _max_rate_rps(traces, lambda scaled: mean_attainment(system, scaled, setup) >= attainment)


def max_limit_rps(traces: Sequence[Trace], setup: Setup, attainment: float) -> float:
    """Highest arrival rate at which the limit is ``attainment``: no scheduler keeps it beyond, to within PRECISION."""
    tokens = setup.limits.max_batch_tokens
    return _max_rate_rps(traces, lambda scaled: mean_limit(scaled, setup, tokens) >= attainment)


def _max_rate_rps(traces: Sequence[Trace], meets: Callable[[Sequence[Trace]], bool]) -> float:
    own_rps = sum(trace.rate_rps for trace in traces) / len(traces)
    return highest(lambda rate_rps: meets([trace.scaled(rate_scale=rate_rps / own_rps) for trace in traces]), own_rps)


def fewest_instances(system: Simulated, traces: Sequence[Trace], setup: Setup, attainment: float) -> int:
    """Fewest prefill instances that keep ``attainment`` on ``traces``; more are taken never to be worse.

    Raises ValueError when MAX_INSTANCES are not enough.
    """

    def meets(instances: int) -> bool:
        return mean_attainment(system, traces, dataclasses.replace(setup, instances=instances)) >= attainment

    high = 1
    while not meets(high):
        high *= 2
        if high > MAX_INSTANCES:
            raise ValueError(
                f"{system} does not reach {attainment:.0%} on {MAX_INSTANCES} instances: some requests "
                "cannot meet their SLO even alone"
            )
    low = high // 2  # not enough, or 0
    while high > low + 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
