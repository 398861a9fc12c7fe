"""``bench validate``: the simulator against the engine, on the same traces, with the engine's own profile.

Rates are multiples of saturation, the rate at which the forwards of the trace, each alone, fill the machine. What a
request spends outside forwards (HTTP, tokenizer, handshake, KV transfer, first answer) and how fast the machine is are
measured by isolated requests before and after each replay, what passes between forwards once by a burst; the
simulator is given these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from sgl_flowprefill.bench.capacity.prober import Plan, Prober, outcome, probing
from sgl_flowprefill.bench.cli.options import Validate
from sgl_flowprefill.bench.cli.requested import requested_servers
from sgl_flowprefill.bench.loadgen.replay import RequestResult
from sgl_flowprefill.bench.metrics.provenance import result, write_result
from sgl_flowprefill.bench.simulator.measured import saturation_rps
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.systems import run as simulate
from sgl_flowprefill.bench.systems.catalog import select
from sgl_flowprefill.bench.systems.system import System
from sgl_flowprefill.bench.workloads.synthetic import workload


def run(options: Validate, console: Console) -> int:
    """Replay, simulate, print both side by side; writes ``validate.json``. Stopped, the same command goes on.

    Returns 0, or 1 if the client fell behind in a replay. Raises ClusterError, CalibrationError, ConfigError or
    ValueError with a sentence for the user.
    """
    servers = requested_servers(options.servers)
    plan = Plan(workload(options.workload), options.seeds, options.duration, options.max_output_tokens)
    systems = select(options.systems)
    with probing(servers, plan, options.out, options.time_scale, console) as prober:
        try:
            for system in systems:
                _replay_all(prober, system, options.loads)
        finally:  # also after Ctrl-C: what was measured so far
            rows = [row for system in systems for load in options.loads if (row := compared(prober, system, load))]
            if rows:
                _publish(rows, prober, options.out, console)
    return int(any(not probe.run.client.valid for probe in prober.log.probes))


def load_rps(prober: Prober, load: float) -> float:
    """The rate that is ``load`` times saturation, over all seeds, as the machine was at first."""
    if "saturation_rps" not in prober.log.facts:
        own_rps = prober.plan.workload.rate_rps
        traces = [prober.trace(seed, own_rps) for seed in range(prober.plan.seeds)]
        rates_rps = [saturation_rps(trace, prober.setup.machine.cost) for trace in traces]
        prober.log.fix("saturation_rps", round(float(np.mean(rates_rps)), 4))
    return round(load * float(prober.log.facts["saturation_rps"]), 4)


class Pair(NamedTuple):
    """One request, replayed and simulated."""

    seed: int
    measured: RequestResult
    simulated: SimRequest

    @property
    def simulated_ttft_s(self) -> float:
        """Infinite for a request that never ran."""
        return self.simulated.first_token_s - self.simulated.arrival_s


def pairs(prober: Prober, system: System, load: float) -> list[Pair]:
    """Every request of a system at a load, over the seeds that were replayed."""
    if not (prober.is_calibrated and prober.can_simulate):
        return []
    rate_rps = load_rps(prober, load)
    found: list[Pair] = []
    if system.name not in prober.log.solo_ttft_s:
        return found
    setup, scheduler = prober.setup_of(system), system.simulated(prober.options)
    assert scheduler is not None
    for seed in range(prober.plan.seeds):
        if probe := prober.log.complete_at(rate_rps, system.name, seed):
            requests = simulate(scheduler, prober.trace(seed, rate_rps), setup).requests
            found += [Pair(seed, result, requests[result.index]) for result in probe.run.results]
    return found


def compared(prober: Prober, system: System, load: float) -> dict[str, Any] | None:
    """Measured and simulated attainment of a system at a load, over the seeds that were replayed; None without any."""
    found = pairs(prober, system, load)
    if not found:
        return None
    classes = sorted({pair.measured.request_class for pair in found})
    return {
        "system": system.name,
        "load": load,
        "rate_rps": load_rps(prober, load),
        **_figures(found),
        "classes": {name: _figures([p for p in found if p.measured.request_class == name]) for name in classes},
    }


def _figures(found: Sequence[Pair]) -> dict[str, Any]:
    """Both sides of ``found``: what is simulated may be right on the whole and wrong for each request."""
    met = np.array([(pair.measured.meets_ttft(), pair.simulated.met) for pair in found])
    ttft_s = [
        (pair.measured.ttft_s, pair.simulated_ttft_s)
        for pair in found
        if pair.measured.ttft_s is not None and math.isfinite(pair.simulated_ttft_s)
    ]
    measured_s, simulated_s = np.array(ttft_s or [(math.nan, math.nan)]).T
    measured, simulated = met.mean(axis=0).tolist()
    differing = int((met[:, 0] != met[:, 1]).sum())
    return {
        "requests": len(found),
        "measured": measured,
        "simulated": simulated,
        "difference_points": 100 * (simulated - measured),
        "differing": differing,
        "chance_points": 100 * math.sqrt(differing) / len(found),
        "measured_ttft_p50_s": float(np.median(measured_s)),
        "simulated_ttft_p50_s": float(np.median(simulated_s)),
        "ttft_difference_s": np.percentile(simulated_s - measured_s, [10, 50, 90]).tolist(),
    }


def _replay_all(prober: Prober, system: System, loads: Sequence[float]) -> None:
    def is_done() -> bool:
        return (
            prober.is_calibrated
            and prober.can_simulate
            and all(
                prober.log.complete_at(load_rps(prober, load), system.name, seed)
                for load in loads
                for seed in range(prober.plan.seeds)
            )
        )

    if is_done():
        return
    with prober.serving(system) as served:
        for load in loads:
            rate_rps = load_rps(prober, load)
            for seed in range(prober.plan.seeds):
                if prober.log.complete_at(rate_rps, system.name, seed) is None:
                    probe = prober.probe(served, system, seed, rate_rps)
                    prober.say(f"  {load:.1f} x saturation, {rate_rps:.2f} req/s, seed {seed}: {outcome(probe)}")
                    prober.measure_isolated(served, system)


def _publish(rows: Sequence[dict[str, Any]], prober: Prober, folder: Path, console: Console) -> None:
    answers, trace = prober.answers, prober.trace(0, prober.plan.workload.rate_rps)
    figures = {
        "rows": rows,
        "worst_points": max(abs(row["difference_points"]) for row in rows),
        "workload": prober.plan.workload.name,
        "seeds": prober.plan.seeds,
        "duration_s": prober.plan.duration_s,
        "time_scale": prober.time_scale,
        "answers": answers.to_dict(trace),
        "engine": prober.log.facts["engine"],
        "overhead_s": prober.setup.machine.cost.serving_s,
    }
    write_result(folder / "validate.json", result("validate", figures))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("system")
    for column in ("x saturation", "req/s", "requests", "measured", "simulated", "points", "by chance", "TTFT p50 (s)"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row["system"],
            f"{row['load']:.1f}",
            f"{row['rate_rps']:.2f}",
            str(row["requests"]),
            f"{row['measured']:.1%}",
            f"{row['simulated']:.1%}",
            f"{row['difference_points']:+.1f}",
            f"{row['chance_points']:.1f}",
            f"{row['measured_ttft_p50_s']:.3f} / {row['simulated_ttft_p50_s']:.3f}",
        )
    console.print(table)
    console.print(answers.text(trace), highlight=False, soft_wrap=True)
    console.print(f"Figures: {folder / 'validate.json'}", highlight=False, soft_wrap=True)
