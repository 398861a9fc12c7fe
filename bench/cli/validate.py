"""``bench validate``: the simulator against the engine, on the same traces, with the engine's own profile.

Rates are multiples of saturation, the rate at which the forwards of the trace, each alone, fill the machine. What a
request spends outside forwards (HTTP, tokenizer, handshake, KV transfer, first answer) and how fast the machine is are
measured by isolated requests before and after each replay, what passes between forwards once by a burst; the
simulator is given these. Of servers that prefill and decode, decode steps are measured as well, and both sides are
judged by the times between tokens, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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
from sgl_flowprefill.bench.metrics.joint import answered, meets, summarise_joint
from sgl_flowprefill.bench.reports.table import milliseconds
from sgl_flowprefill.bench.simulator import joint
from sgl_flowprefill.bench.simulator.measured import saturation_rps
from sgl_flowprefill.bench.simulator.requests import SimRequest
from sgl_flowprefill.bench.simulator.systems import run as simulate
from sgl_flowprefill.bench.systems.catalog import select
from sgl_flowprefill.bench.systems.system import UNIFIED_OPTION, System
from sgl_flowprefill.bench.workloads.answers import DECODE_SHARE, UNIFIED_DECODE_SHARE
from sgl_flowprefill.bench.workloads.synthetic import workload
from sgl_flowprefill.provenance import result, write_result


def run(options: Validate, console: Console) -> int:
    """Replay, simulate, print both side by side; writes ``validate.json``. Stopped, the same command goes on.

    Returns 0, or 1 if the client fell behind in a replay. Raises ClusterError, CalibrationError, ConfigError or
    ValueError with a sentence for the user.
    """
    servers = requested_servers(options.servers)
    systems = select(options.systems)
    for system in systems:
        if system.is_unified != options.unified:
            kind, remedy = ("one server", "give") if system.is_unified else ("two servers", "leave out")
            raise ValueError(f"{system.name} is {kind}, and a run validates one kind: {remedy} {UNIFIED_OPTION}")
    plan = Plan(
        workload(options.workload),
        options.seeds,
        options.duration,
        options.max_output_tokens,
        "gaps" if options.unified else "ttft",
        UNIFIED_DECODE_SHARE if options.unified else DECODE_SHARE,
        options.slower,
    )
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
    def met(self) -> tuple[bool, bool]:
        """Whether its first token came in time, on both sides."""
        return self.measured.meets_ttft(), self.simulated.met

    @property
    def met_both(self) -> tuple[bool, bool]:
        """Whether its gaps did, too."""
        return meets(self.measured, "gaps"), joint.answered(self.simulated).meets_both

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
    figures = _joint_figures if prober.plan.judge == "gaps" else _figures
    classes = sorted({pair.measured.request_class for pair in found})
    return {
        "system": system.name,
        "load": load,
        "rate_rps": load_rps(prober, load),
        **figures(found),
        "classes": {name: figures([p for p in found if p.measured.request_class == name]) for name in classes},
    }


def _figures(found: Sequence[Pair]) -> dict[str, Any]:
    """Both sides of ``found``, by their first tokens."""
    ttft_s = [
        (pair.measured.ttft_s, pair.simulated_ttft_s)
        for pair in found
        if pair.measured.ttft_s is not None and math.isfinite(pair.simulated_ttft_s)
    ]
    measured_s, simulated_s = np.array(ttft_s or [(math.nan, math.nan)]).T
    return {
        "requests": len(found),
        **_attainments([pair.met for pair in found]),
        "measured_ttft_p50_s": float(np.median(measured_s)),
        "simulated_ttft_p50_s": float(np.median(simulated_s)),
        "ttft_difference_s": np.percentile(simulated_s - measured_s, [10, 50, 90]).tolist(),
    }


def _joint_figures(found: Sequence[Pair]) -> dict[str, Any]:
    """Both sides of ``found``, by their first tokens, and as ``joint`` by these and the times between tokens."""
    measured = summarise_joint([answered(pair.measured) for pair in found])
    simulated = summarise_joint([joint.answered(pair.simulated) for pair in found])
    gaps = {
        f"{side}_{name}": getattr(figures, name)
        for side, figures in (("measured", measured), ("simulated", simulated))
        for name in ("tbt_attainment", "tbt_p50_s", "tbt_p99_s", "tbt_max_s")
    }
    return {**_figures(found), "joint": _attainments([pair.met_both for pair in found]) | gaps}


def _attainments(met: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Attainment of both sides: what is simulated may be right on the whole and wrong for each request."""
    measured, simulated = np.array(met).mean(axis=0).tolist()
    differing = sum(one != other for one, other in met)
    return {
        "measured": measured,
        "simulated": simulated,
        "difference_points": 100 * (simulated - measured),
        "differing": differing,
        "chance_points": 100 * math.sqrt(differing) / len(met),
    }


def worst_points(rows: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference of any row, by first tokens or jointly."""
    judged = [figures for row in rows for figures in (row, row.get("joint")) if figures]
    return max(abs(float(figures["difference_points"])) for figures in judged)


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
        "worst_points": worst_points(rows),
        "judge": prober.plan.judge,
        "slower": prober.plan.slower,
        "workload": prober.plan.workload.name,
        "seeds": prober.plan.seeds,
        "duration_s": prober.plan.duration_s,
        "time_scale": prober.time_scale,
        "answers": answers.to_dict(trace),
        "engine": prober.log.facts["engine"],
        "overhead_s": prober.setup.machine.cost.serving_s,
    }
    write_result(folder / "validate.json", result("validate", figures))
    console.print(rows_table(rows))
    console.print(answers.text(trace), highlight=False, soft_wrap=True)
    console.print(f"Figures: {folder / 'validate.json'}", highlight=False, soft_wrap=True)


def rows_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each system and load; servers that decode as well have one more, by both objectives."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("system")
    for column in ("x saturation", "req/s", "requests", "judged by", "measured", "simulated", "points", "by chance"):
        table.add_column(column, justify="right")
    table.add_column("measured / simulated", justify="right")
    for row in rows:
        ttft_s = f"TTFT p50 {row['measured_ttft_p50_s']:.3f} / {row['simulated_ttft_p50_s']:.3f} s"
        shape = f"{row['load']:.1f}", f"{row['rate_rps']:.2f}", str(row["requests"])
        table.add_row(row["system"], *shape, "TTFT", *_cells(row), ttft_s)
        if both := row.get("joint"):
            tbt = " / ".join(milliseconds(both[f"{side}_tbt_p99_s"]) for side in ("measured", "simulated"))
            table.add_row("", "", "", "", "and TBT", *_cells(both), f"TBT p99 {tbt}")
    return table


def _cells(figures: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['measured']:.1%}",
        f"{figures['simulated']:.1%}",
        f"{figures['difference_points']:+.1f}",
        f"{figures['chance_points']:.1f}",
    )
