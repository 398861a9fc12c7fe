"""What a capacity search found: rates with confidence intervals, ratios between systems, and the JSON of both.

``GoodputResult`` is made once, from a campaign and its log. Its document has all that the report's table and plots
show, so that a report can be made again from ``goodput.json`` alone.

A seed is a sample. Intervals are 95% percentile bootstraps over seeds (``scipy.stats.bootstrap``); intervals of
ratios are paired by seed, since both systems saw the same requests. Intervals of rates, and of their ratios, are no
narrower than the brackets that the rates were searched to. Of two seeds a bootstrap gives the range, of one nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from sgl_flowprefill.bench.capacity.campaign import TOLD_SLO_SCALES, Campaign, Goal
from sgl_flowprefill.bench.capacity.prober import Plan
from sgl_flowprefill.bench.capacity.probes import Probe, ProbeLog
from sgl_flowprefill.bench.capacity.rate_search import Bracket, bracket, mean_bracket
from sgl_flowprefill.bench.loadgen.replay import STOPPED, RequestResult
from sgl_flowprefill.bench.metrics.joint import answered, summarise_joint
from sgl_flowprefill.bench.metrics.requests import SLO_SCALES, attainment, retractions, tokens_per_s
from sgl_flowprefill.bench.systems.catalog import UNCHUNKED_FCFS, UNIFIED
from sgl_flowprefill.bench.systems.system import EndpointSystem, System
from sgl_flowprefill.bench.workloads.answers import Answers
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.provenance import result

OURS: Final = "flowprefill"
BY_LAYER: Final = "flowprefill-layer"
RESAMPLES: Final = 5000
CURVE_POINTS: Final = 100
"""Points of a distribution in the JSON."""
CURVE_DIGITS: Final = 5
MAX_DRIFT: Final = 1.1
"""Factor between isolated requests at two visits to one system above which a report doubts itself."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval."""

    value: float
    ci95: tuple[float, float] | None
    """None where one seed is all there is."""

    def covering(self, low: float, high: float) -> Estimate:
        """The estimate with an interval that has ``low`` and ``high`` in it."""
        return Estimate(self.value, (min(low, *(self.ci95 or (low,))), max(high, *(self.ci95 or (high,)))))


BySeed = Mapping[int, float]


def mean_estimate(values: BySeed) -> Estimate | None:
    """Mean over seeds; None without any."""
    return _bootstrapped((list(values.values()),), np.mean)


def ratio_estimate(values: BySeed, others: BySeed) -> Estimate | None:
    """Ratio of means over the seeds that both have; None when there is none, or it is not finite."""
    seeds = sorted(values.keys() & others.keys())
    ours, theirs = [values[seed] for seed in seeds], [others[seed] for seed in seeds]
    if not np.isfinite([*ours, *theirs]).all() or not all(theirs):
        return None
    return _bootstrapped((ours, theirs), lambda a, b, axis: np.mean(a, axis=axis) / np.mean(b, axis=axis))


@dataclass(frozen=True)
class SystemFigures:
    """What was measured of one system."""

    system: System
    brackets: Mapping[float, Mapping[int, Bracket]]
    """By attainment and seed, where a search has begun."""
    compared: Mapping[int, Probe]
    """By seed: its probes at the rate at which systems are compared."""
    told: Mapping[float, Mapping[int, Probe]]
    """By SLO scale below 1 and seed: probes at that rate of a system that orders by SLOs, told such ones."""
    solo_ttft_s: Sequence[Mapping[int, float]]
    simulated_rps: Mapping[float, float | None]
    """By attainment; None for what cannot be simulated."""
    probes: Sequence[Probe] = ()
    simulated_attainment: float | None = None
    """At the rate at which systems are compared, of the seeds that were replayed."""
    beaten: Collection[float] = ()
    """Attainments at which a race found a better stock system: its rate is only known to lie below that one's."""

    def rates_rps(self, share: float) -> BySeed:
        """The rate found for each seed."""
        return {seed: found.rate_rps for seed, found in self.brackets[share].items()}

    def max_rate(self, share: float) -> Estimate | None:
        """Mean rate over seeds; its interval covers the mean bracket. None where a race found a better one."""
        estimate = mean_estimate(self.rates_rps(share))
        if estimate is None or share in self.beaten:
            return None
        low_rps, high_rps = self.mean_bracket(share, self.brackets[share])
        return estimate.covering(low_rps, high_rps if high_rps < math.inf else estimate.value)

    def mean_bracket(self, share: float, seeds: Iterable[int]) -> Bracket:
        """Mean of the brackets of ``seeds``."""
        return mean_bracket(self.brackets[share][seed] for seed in seeds)

    def rate_ratio(self, other: SystemFigures, share: float) -> Estimate | None:
        """The system's rate over the rate of ``other``, on the seeds that both have; None where a rate is not known."""
        ratio = ratio_estimate(self.rates_rps(share), other.rates_rps(share))
        if ratio is None:
            return None
        seeds = self.brackets[share].keys() & other.brackets[share].keys()
        ours, theirs = self.mean_bracket(share, seeds), other.mean_bracket(share, seeds)
        highest = ours.high_rps / theirs.low_rps if theirs.low_rps else math.inf
        return ratio.covering(ours.low_rps / theirs.high_rps, highest if highest < math.inf else ratio.value)

    def below_rps(self, share: float) -> float | None:
        """Where a race found a better one: the mean over seeds of the lowest rates that it was found not to keep."""
        return self.mean_bracket(share, self.brackets[share]).high_rps if share in self.beaten else None

    def results(self) -> list[RequestResult]:
        """Requests of all seeds at the rate at which systems are compared."""
        return [result for probe in self.compared.values() for result in probe.run.results]

    @property
    def blocking_s(self) -> list[float]:
        """Blocking times at that rate."""
        return [value_s for probe in self.compared.values() for value_s in probe.blocking_s or ()]

    @property
    def blocking_mean_s(self) -> float | None:
        """Mean blocking time of all preemptions; None without preemption."""
        return float(np.mean(self.blocking_s)) if self.blocking_s else None

    @property
    def blocking_by_seed_s(self) -> BySeed:
        return {seed: float(np.mean(probe.blocking_s)) for seed, probe in self.compared.items() if probe.blocking_s}

    def attainment_at(self, slo_scale: float, seed: int) -> float:
        """Attainment with scaled SLOs: of the replay that was told such ones if there is one, else of that at 1."""
        if told := self.told.get(slo_scale, {}).get(seed):
            return attainment(told.run.results)
        return attainment(self.compared[seed].run.results, slo_scale)

    @property
    def attainment_by_slo_scale(self) -> dict[float, float]:
        """Mean attainment at each of SLO_SCALES over the seeds, or over those that were told such SLOs if some were;
        empty before there are any."""
        return {
            scale: float(np.mean([self.attainment_at(scale, seed) for seed in self.told.get(scale) or self.compared]))
            for scale in SLO_SCALES
            if self.compared
        }

    def slo_scales(self, share: float) -> BySeed:
        """For each seed the tightest scale of the SLOs that ``share`` of its requests meet.

        Between the scales that a system was told it is interpolated; the tightest of them is the least.
        """
        return {seed: self._slo_scale(share, seed) for seed in self.compared}

    def _slo_scale(self, share: float, seed: int) -> float:
        told = sorted(scale for scale, probes in self.told.items() if seed in probes)
        scales = [*told, 1.0]
        shares = [self.attainment_at(scale, seed) for scale in scales]
        missed = [place for place, kept in enumerate(shares) if kept < share]
        if not told or (missed and missed[-1] == len(told)):
            return _quantile([_scale(result) for result in self.compared[seed].run.results], share)
        if not missed:
            return told[0]
        last = missed[-1]
        return float(np.interp(share, shares[last : last + 2], scales[last : last + 2]))

    @property
    def uncontended_tokens_per_s(self) -> float | None:
        """Prompt tokens over TTFT of isolated requests, all lengths together: the median over starts of its servers."""
        if not self.solo_ttft_s:
            return None
        return float(np.median([sum(times_s) / sum(times_s.values()) for times_s in self.solo_ttft_s]))

    def to_dict(self, shares: Sequence[float]) -> dict[str, Any]:
        rates = {_key(share): self.max_rate(share) for share in shares}
        return {
            "label": self.system.label,
            "settings": self.system.settings,
            "why": self.system.why,
            "max_rate_rps": {key: rate.value if rate else None for key, rate in rates.items()},
            "ci95": {key: _interval(rate) for key, rate in rates.items()},
            "below_rps": {_key(share): below for share in shares if (below := self.below_rps(share)) is not None},
            "bracket_rps_by_seed": {
                _key(share): {
                    str(seed): [low, None if math.isinf(high) else high]
                    for seed, (low, high) in self.brackets[share].items()
                }
                for share in shares
            },
            "simulated_max_rate_rps": {_key(share): rate for share, rate in self.simulated_rps.items()},
            "uncontended_tokens_per_s": self.uncontended_tokens_per_s,
            "blocking_mean_s": self.blocking_mean_s,
            "preemptions": len(self.blocking_s),
            "joint": self._joint(),
            "simulated_attainment": self.simulated_attainment,
            "attainment_by_slo_scale": {f"{scale:.1f}": met for scale, met in self.attainment_by_slo_scale.items()},
            "ttft_by_class": self._ttft_by_class(),
            "blocking": curve(self.blocking_s, len(self.blocking_s)),
            "replays": [
                {
                    "rate_rps": probe.rate_rps,
                    "seed": probe.seed,
                    "requests": probe.total,
                    "attainment": list(probe.attainment_bounds),
                }
                for probe in self.probes
                if probe.slo_scale == 1 and probe.run.client.valid
            ],
        }

    def _joint(self) -> dict[str, Any] | None:
        """Figures of the time between tokens at the rate at which systems are compared, where it was judged."""
        if not any(probe.judge != "ttft" for probe in self.compared.values()):
            return None
        found = self.results()
        duration_s = sum(probe.run.duration_s for probe in self.compared.values())
        return {
            **dataclasses.asdict(summarise_joint([answered(result) for result in found])),
            "tokens_per_s": tokens_per_s(found, duration_s),
            "retractions": retractions(found),
        }

    def _ttft_by_class(self) -> dict[str, Any]:
        """Distribution of TTFT by class, tightest SLO first; requests that failed never had a first token."""
        results = self.results()
        slo_s = {one.request_class: one.ttft_slo_s for one in results}
        found = {}
        for name in sorted(slo_s, key=lambda name: slo_s[name]):
            members = [one for one in results if one.request_class == name]
            ttft_s = [one.ttft_s for one in members if one.completed and one.ttft_s is not None]
            found[name] = {"slo_s": slo_s[name], **curve(ttft_s, len(members))}
        return found


def curve(values_s: Sequence[float], total: int) -> dict[str, list[float]]:
    """The distribution of ``values_s`` in CURVE_POINTS: the share of ``total`` that does not exceed each."""
    ordered = sorted(values_s)
    places = sorted({round(place) for place in np.linspace(0, len(ordered) - 1, CURVE_POINTS)}) if ordered else []
    return {
        "values_s": [float(f"{ordered[place]:.{CURVE_DIGITS}g}") for place in places],
        "shares": [round((place + 1) / total, CURVE_DIGITS) for place in places],
    }


@dataclass(frozen=True)
class GoodputResult:
    """All systems of a run."""

    plan: Plan
    goal: Goal
    figures: Mapping[str, SystemFigures]
    """Measured systems by name."""
    only_simulated_rps: Mapping[str, Mapping[float, float | None]]
    """Systems that were asked for and left out, with the rates that the simulator has for them."""
    time_scale: float
    answers: Answers
    trace: Trace
    """One at the workload's own rate, whose answers stand for all."""
    comparison_rps: float | None
    finished: bool
    problems: Sequence[str]
    model: str
    probes: Sequence[Probe] = field(repr=False)

    @classmethod
    def of(cls, campaign: Campaign, model: str) -> GoodputResult:
        """What ``campaign`` has found so far. What the simulator says is computed once and kept in the log."""
        plan, goal, log = campaign.plan, campaign.goal, campaign.log
        comparison_rps = log.facts.get("comparison_rps")
        measured = campaign.systems
        figures = {system.name: _figures(campaign, system, comparison_rps) for system in measured}
        return cls(
            plan=plan,
            goal=goal,
            figures=figures,
            only_simulated_rps={
                system.name: {share: campaign.simulated_rps(system, share) for share in goal.attainments}
                for system in campaign.asked_for
                if system not in measured
            },
            time_scale=campaign.prober.time_scale,
            answers=campaign.prober.answers,
            trace=campaign.prober.trace(0, plan.workload.rate_rps),
            comparison_rps=comparison_rps,
            finished=campaign.probes_left() == 0,
            problems=_problems(plan, log, figures),
            model=model,
            probes=[probe for probe in log.probes if probe.system in figures],
        )

    def best_stock(self, share: float) -> str | None:
        """The stock system with the highest rate at ``share``."""
        rates = {
            name: found.value
            for name, figures in self.figures.items()
            if figures.system.is_stock and (found := figures.max_rate(share)) is not None
        }
        return max(rates, key=lambda name: rates[name]) if rates else None

    def ratios(self, name: str) -> dict[str, Estimate | None]:
        """How the system called ``name`` stands to the others, by the names of the report."""
        ours = self.figures[name]
        found: dict[str, Estimate | None] = {}
        for share in self.goal.attainments:
            endpoints = [name for name, one in self.figures.items() if isinstance(one.system, EndpointSystem)]
            for other, against in (
                ("vs_unchunked_fcfs", UNCHUNKED_FCFS),
                ("vs_best_stock", self.best_stock(share)),
                *((f"vs_{name}", name) for name in endpoints),
            ):
                if against in self.figures:
                    found[f"{other}_{_key(share)}"] = ours.rate_ratio(self.figures[str(against)], share)
        if BY_LAYER in self.figures:
            layer = self.figures[BY_LAYER].blocking_by_seed_s
            found["blocking_vs_layer"] = ratio_estimate(layer, ours.blocking_by_seed_s)
        best = self.best_stock(self.goal.attainments[0])
        if best is not None and self.plan.judge == "ttft":
            share = self.goal.attainments[0]
            found["slo_tightness_vs_best_stock"] = ratio_estimate(
                self.figures[best].slo_scales(share), ours.slo_scales(share)
            )
        if UNCHUNKED_FCFS in self.figures:
            speeds = ours.uncontended_tokens_per_s, self.figures[UNCHUNKED_FCFS].uncontended_tokens_per_s
            if all(speeds):
                ratio = float(speeds[0] or 0) / float(speeds[1] or 1)
                found["uncontended_throughput_vs_unchunked_fcfs"] = Estimate(ratio, None)
        return found

    @property
    def ratios_of_ours(self) -> dict[str, Estimate | None]:
        """The ratios of FlowPrefill as it is by default, if that was measured."""
        return next((self.ratios(name) for name in (OURS, UNIFIED) if name in self.figures), {})

    def to_dict(self) -> dict[str, Any]:
        """What ``goodput.json`` holds."""
        ratios = self.ratios_of_ours
        figures = {
            "systems": {
                name: figures.to_dict(self.goal.attainments)
                | ({"ratios": _values(self.ratios(name))} if figures.system.orders_by_slo else {})
                for name, figures in self.figures.items()
            },
            "attainments": list(self.goal.attainments),
            "judge": self.plan.judge,
            "ratios": _values(ratios),
            "ratios_ci95": {name: _interval(ratio) for name, ratio in ratios.items()},
            "best_stock": {_key(share): self.best_stock(share) for share in self.goal.attainments},
            "comparison_rps": self.comparison_rps,
            "only_simulated": {
                name: {"max_rate_rps": {_key(share): rate for share, rate in rates.items()}}
                for name, rates in self.only_simulated_rps.items()
            },
            "workload": self.plan.workload.name,
            "seeds": self.plan.seeds,
            "duration_s": self.plan.duration_s,
            "precision": self.goal.precision,
            "max_output_tokens": self.plan.max_output_tokens,
            "answers": self.answers.to_dict(self.trace) | {"text": self.answers.text(self.trace)},
            "time_scale": self.time_scale,
            "probes": len(self.probes),
            "finished": self.finished,
            "problems": list(self.problems),
            "model": self.model,
        }
        return result("goodput", figures)


def _figures(campaign: Campaign, system: System, comparison_rps: float | None) -> SystemFigures:
    plan, goal, log = campaign.plan, campaign.goal, campaign.log
    brackets: dict[float, dict[int, Bracket]] = {share: {} for share in goal.attainments}
    compared = {}
    told: dict[float, dict[int, Probe]] = {scale: {} for scale in TOLD_SLO_SCALES if scale < 1}
    for seed in range(plan.seeds):
        for share in goal.attainments:
            verdicts = log.verdicts(system.name, seed, share)
            if verdicts and system not in campaign.only_compared:
                brackets[share][seed] = bracket(verdicts)
        if comparison_rps and (probe := log.complete_at(comparison_rps, system.name, seed)):
            compared[seed] = probe
            for scale, probes in told.items():
                if probe := log.complete_at(comparison_rps, system.name, seed, scale):
                    probes[seed] = probe
    return SystemFigures(
        system=system,
        brackets=brackets,
        compared=compared,
        told=told,
        solo_ttft_s=log.solo_ttft_s.get(system.name, []),
        simulated_rps={share: campaign.simulated_rps(system, share) for share in goal.attainments},
        simulated_attainment=campaign.simulated_attainment(system, comparison_rps, sorted(compared))
        if comparison_rps and compared
        else None,
        probes=[probe for probe in log.probes if probe.system == system.name],
        beaten={share for share in goal.attainments if campaign.is_beaten(system, share)},
    )


def _problems(plan: Plan, log: ProbeLog, figures: Mapping[str, SystemFigures]) -> list[str]:
    found = []
    for name in figures:
        probes = [probe for probe in log.probes if probe.system == name]
        invalid = [probe.run.client.invalid_reason for probe in probes if not probe.run.client.valid]
        if invalid:
            found.append(f"{name}: {len(invalid)} of {len(probes)} probes are not valid; the first: {invalid[0]}")
        counted = [result for probe in probes if probe.run.client.valid for result in probe.run.results]
        errors = [result.error for result in counted if result.error not in (None, STOPPED)]
        if errors:
            found.append(f"{name}: {len(errors)} requests failed; the first: {errors[0]}")
    return found + _repeated(plan, log, figures) + _drift(log)


def _repeated(plan: Plan, log: ProbeLog, names: Collection[str]) -> list[str]:
    """A sentence if the seeds of a trace file have requests in common, or one has some more than once."""
    apart, workload = plan.workload.apart(plan.seeds), plan.workload
    whole = [probe for probe in log.probes if probe.system in names and probe.complete]  # others tell of no interval
    requests = max((probe.total for probe in whole), default=0)
    if apart is None or requests <= apart:
        return []
    return [
        f"{workload.name} has {workload.file_requests:,} requests and probes have up to {requests:,}: some are in "
        "several seeds, or more than once in one, so that intervals over seeds are too narrow; give a longer file or a "
        "shorter --duration"
    ]


def _drift(log: ProbeLog) -> list[str]:
    """A sentence if the machine did not stay as fast as it was, by isolated requests at each visit."""
    visits_s = {name: [sum(times_s.values()) for times_s in visits] for name, visits in log.solo_ttft_s.items()}
    changes = {name: max(times_s) / min(times_s) for name, times_s in visits_s.items()}
    name = max(changes, key=lambda name: changes[name], default="")
    if not name or changes[name] <= MAX_DRIFT:
        return []
    return [
        f"The machine's speed changed: isolated requests on {name} took {min(visits_s[name]):.2f} s in all at one "
        f"visit and {max(visits_s[name]):.2f} s at another. Rates found at different times do not compare; what was "
        "measured at the common rate does if the machine was steady by then"
    ]


def _scale(result: RequestResult) -> float:
    """The tightest scale of its SLO that a request meets; infinite if it failed."""
    return result.ttft_s / result.ttft_slo_s if result.completed and result.ttft_s is not None else math.inf


def _quantile(values: Sequence[float], share: float) -> float:
    """The least value that ``share`` of ``values`` do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def _bootstrapped(samples: tuple[Sequence[float], ...], statistic: Callable[..., Any]) -> Estimate | None:
    """``statistic(*samples, axis)`` with its interval, if there are two samples; None without samples."""
    if not samples[0]:
        return None
    value = float(statistic(*map(np.asarray, samples), axis=0))
    if len(samples[0]) < 2:
        return Estimate(value, None)
    low, high = stats.bootstrap(
        samples, statistic, n_resamples=RESAMPLES, paired=True, vectorized=True, method="percentile", rng=0
    ).confidence_interval
    return Estimate(value, (float(low), float(high)))


def _values(ratios: Mapping[str, Estimate | None]) -> dict[str, float | None]:
    return {name: ratio.value if ratio else None for name, ratio in ratios.items()}


def _interval(estimate: Estimate | None) -> list[float] | None:
    return list(estimate.ci95) if estimate and estimate.ci95 else None


def _key(share: float) -> str:
    """``90`` for 0.9, ``99.5`` for 0.995."""
    return f"{share * 100:g}"
