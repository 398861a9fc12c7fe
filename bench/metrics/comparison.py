"""The result of running systems on the same trace: what is measured, and the JSON that it is written as."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.bench.loadgen.replay import ReplayRun
from sgl_flowprefill.bench.metrics.joint import JointSummary, answered, meets, share, summarise_joint
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.bench.metrics.missed import Missed, missed_requests
from sgl_flowprefill.bench.metrics.requests import (
    PreemptionSummary,
    RunSummary,
    StepSummary,
    Suspension,
    attainment,
    events_within,
    retractions,
    summarise,
    summarise_blocking,
    summarise_steps,
    suspensions,
    tokens_per_s,
)
from sgl_flowprefill.bench.workloads.answers import Answers
from sgl_flowprefill.bench.workloads.trace import Trace
from sgl_flowprefill.provenance import result, write_result

MAX_ISOLATED_DIFFERENCE: Final = 1.1
"""Factor between isolated requests of the same length above which a comparison doubts that the machine was steady."""
MAX_CACHED_BEFORE: Final = 0.05
"""Share of its prompt tokens that a system may have in its cache beyond what requests of the trace share: a server may
put a few tokens of its own before each prompt of a chat."""
STEP_FIGURES: Final = tuple(field.name for field in dataclasses.fields(StepSummary))
"""Null in the report of a system that does not log its decode steps."""


@dataclass(frozen=True)
class SystemResult:
    """One system's run."""

    name: str
    """Key in the report, e.g. ``flowprefill``."""
    label: str
    """What the table calls it, with the setting that matters most."""
    run: ReplayRun
    summary: RunSummary
    joint: JointSummary
    turns: Sequence[ReplayRun] = ()
    """The parts that ``run`` was joined from; none for one that was made in one go."""
    suspensions: Sequence[Suspension] | None = None
    """Preemptions of ``run``; None for a system that has no preemption."""
    steps: StepSummary | None = None
    """Its decode steps; None for a system that does not log any."""
    missed: Sequence[Missed] = ()
    """The requests of ``run`` that missed their objective, as its event log tells; none for a system without."""
    solo_ttft_s: Mapping[int, float] = field(default_factory=dict)
    decode_tokens_per_s: Sequence[float] = ()
    """What it carried when it had nothing to do but to decode, in each turn in which that was measured."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        label: str,
        run: ReplayRun,
        trace: Trace,
        *,
        turns: Sequence[ReplayRun] = (),
        event_log: Path | None = None,
        solo_ttft_s: Mapping[int, float] | None = None,
        decode_tokens_per_s: Sequence[float] = (),
        settings: Mapping[str, Any] | None = None,
    ) -> SystemResult:
        """Summarise ``run``, which may be joined from ``turns``; preemptions and misses come from ``event_log`` if the
        system writes one.
        """
        parts = turns or [run]
        spans_s = [part.span_s for part in parts]
        events = events_within(event_log, spans_s) if event_log else []
        return cls(
            name=name,
            label=label,
            run=run,
            summary=summarise(run.results, run.duration_s, trace.classes),
            joint=summarise_joint([answered(result) for result in run.results]),
            turns=turns,
            suspensions=suspensions(events) if event_log else None,
            steps=summarise_steps(events, sum(part.duration_s for part in parts)),
            missed=missed_requests(event_log, spans_s) if event_log else (),
            solo_ttft_s=solo_ttft_s or {},
            decode_tokens_per_s=decode_tokens_per_s,
            settings=settings or {},
        )

    def attainment(self, judge: Judge) -> float:
        """Share of the requests that were served as ``judge`` wants it."""
        return {
            "ttft": self.summary.ttft_attainment,
            "gaps": self.joint.joint_attainment,
            "mean": self.joint.joint_attainment_mean_tpot,
        }[judge]

    def goodput_rps(self, judge: Judge) -> float:
        """Requests per second that were served as ``judge`` wants it."""
        return self.attainment(judge) * self.summary.requests / self.run.duration_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens of answers per second of the run."""
        return tokens_per_s(self.run.results, self.run.duration_s)

    @property
    def retractions(self) -> int | None:
        """Streams that lost their KV cache to others; None for a server that does not say."""
        return retractions(self.run.results)

    @property
    def blocking_s(self) -> list[float]:
        """Blocking time of each preemption."""
        return [one.blocking_s for one in self.suspensions or () if one.blocking_s is not None]

    @property
    def preemption(self) -> PreemptionSummary | None:
        """Preemptions and blocking, for a system that preempts."""
        if self.suspensions is None:
            return None
        return summarise_blocking(self.blocking_s, len(self.suspensions) - len(self.blocking_s))

    @property
    def stop_wait_p50_p99_max_s(self) -> tuple[float, float, float] | None:
        """How long the running tasks took to stop; None without preemptions."""
        summary = summarise_blocking([one.stop_wait_s for one in self.suspensions or () if one.stop_wait_s is not None])
        if summary.blocking_p50_s is None or summary.blocking_p99_s is None or summary.blocking_max_s is None:
            return None
        return summary.blocking_p50_s, summary.blocking_p99_s, summary.blocking_max_s

    def to_dict(self) -> dict[str, Any]:
        """The system's entry in the report."""
        preemption: dict[str, Any] = dataclasses.asdict(self.preemption) if self.preemption else {}
        if self.stop_wait_p50_p99_max_s:
            names = ("stop_wait_p50_s", "stop_wait_p99_s", "stop_wait_max_s")
            preemption |= dict(zip(names, self.stop_wait_p50_p99_max_s, strict=True))
        return {
            "label": self.label,
            **dataclasses.asdict(self.summary),
            **dataclasses.asdict(self.joint),
            "tokens_per_s": self.tokens_per_s,
            "retractions": self.retractions,
            **preemption,
            **(dataclasses.asdict(self.steps) if self.steps else dict.fromkeys(STEP_FIGURES)),
            "duration_s": self.run.duration_s,
            "solo_ttft_s": {str(tokens): ttft_s for tokens, ttft_s in self.solo_ttft_s.items()},
            "decode_only_tokens_per_s": list(self.decode_tokens_per_s),
            "client": dataclasses.asdict(self.run.client),
            "errors": sorted({result.error for result in self.run.results if result.error}),
            "settings": dict(self.settings),
        }


@dataclass(frozen=True)
class Comparison:
    """Runs of several systems on one trace, at one rate and time scale."""

    kind: str
    """The command that made it."""
    systems: Sequence[SystemResult]
    trace: Trace
    """The trace as it was replayed, scaled."""
    seed: int
    time_scale: float
    model: str
    answers: Answers = field(default_factory=Answers)
    """What was done to the lengths of the trace's answers."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    judge: Judge = "ttft"
    """What the headline says."""

    @property
    def turns(self) -> list[Mapping[str, Any]]:
        """Who replayed when, in order, of systems that took turns; ``start_s`` counts from the first."""
        turns = sorted(
            ((turn, system.name) for system in self.systems for turn in system.turns),
            key=lambda one: one[0].start_monotonic_s,
        )
        return [
            {
                "system": name,
                "start_s": turn.start_monotonic_s - turns[0][0].start_monotonic_s,
                "duration_s": turn.duration_s,
                "requests": len(turn.results),
                "ttft_attainment": attainment(turn.results),
                "joint_attainment": share(meets(result, "gaps") for result in turn.results),
            }
            for turn, name in turns
        ]

    @property
    def trace_rate_rps(self) -> float:
        """Rate in the time of the trace, before the time scale."""
        return self.trace.rate_rps * self.time_scale

    def problems(self) -> list[str]:
        """What makes the comparison doubtful, as sentences: failed requests, a client that fell behind."""
        found = []
        for system in self.systems:
            errors = [result.error for result in system.run.results if result.error]
            if errors:
                found.append(f"{system.label}: {len(errors)} requests failed; the first: {errors[0]}")
            if reason := system.run.client.invalid_reason:
                found.append(f"{system.label}: this run is not valid: {reason}")
        return found

    def doubts(self) -> list[str]:
        """Signs that figures are not what they seem, as sentences: isolated requests show whether the machine was as
        fast for all systems, cached tokens whether prompts were new.
        """
        first, *others = self.systems
        found = []
        for system in others:
            for tokens in sorted(first.solo_ttft_s.keys() & system.solo_ttft_s.keys()):
                times_s = first.solo_ttft_s[tokens], system.solo_ttft_s[tokens]
                if max(times_s) > MAX_ISOLATED_DIFFERENCE * min(times_s):
                    found.append(
                        f"An isolated prompt of {tokens:,} tokens took {times_s[0]:.3f} s on {first.label} and "
                        f"{times_s[1]:.3f} s on {system.label}: the machine may not have been as fast for both"
                    )
        for system in self.systems:
            told = [result for result in system.run.results if result.cached_tokens is not None]
            cached = sum(result.cached_tokens or 0 for result in told)
            shared = sum(result.shared_tokens for result in told)
            prompt_tokens = sum(result.prompt_tokens for result in told)
            if cached - shared > MAX_CACHED_BEFORE * prompt_tokens:
                found.append(
                    f"{system.label} had {cached:,} of {prompt_tokens:,} prompt tokens in its cache, and requests of "
                    f"the trace share {shared:,}: it knew prompts from before, so that first tokens came sooner"
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """What ``report.json`` holds."""
        slos = {request.request_class: (request.ttft_slo_s, request.tbt_slo_s) for request in self.trace.requests}
        figures = {
            "systems": {system.name: system.to_dict() for system in self.systems},
            "time_scale": self.time_scale,
            "seed": self.seed,
            "rate_rps": self.trace.rate_rps,
            "trace_rate_rps": self.trace_rate_rps,
            "trace": self.trace.name,
            "answers": self.answers.to_dict(self.trace),
            "judge": self.judge,
            "turns": self.turns,
            "slo_s": {name: {"ttft": slos[name][0], "tbt": slos[name][1]} for name in self.trace.classes},
            "model": self.model,
            "doubts": self.doubts(),
            "settings": dict(self.settings),
        }
        return result(self.kind, figures)

    def write_json(self, path: Path) -> None:
        """Write ``report.json``."""
        write_result(path, self.to_dict())
