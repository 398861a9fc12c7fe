"""Probes of a capacity search, kept as they are made: a JSON line each, so that a run can be stopped and resumed.

A probe is one replay: a system, a rate, a seed. The first line of the file says what all of them have in common.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from sgl_flowprefill.bench.capacity.rate_search import Bracket, Verdict, bracket, decided
from sgl_flowprefill.bench.loadgen.replay import ClientReport, ReplayRun, RequestResult
from sgl_flowprefill.bench.metrics.joint import meets
from sgl_flowprefill.bench.metrics.judge import Judge
from sgl_flowprefill.profiling.steps import Step

FILE_DIGEST: Final = "digest of the trace file"
BEFORE: Final[Mapping[str, Any]] = {"judge": "ttft", "slower": 0.0, FILE_DIGEST: None}
"""What files say that say nothing of it."""


@dataclass(frozen=True)
class Probe:
    """One replay of a system at a rate, with what became of each request."""

    system: str
    rate_rps: float
    seed: int
    total: int
    """Requests of its trace, of which a probe that was stopped early knows only some."""
    run: ReplayRun
    blocking_s: Sequence[float] | None
    """Blocking time of each preemption; None for a system that does not preempt."""
    slo_scale: float = 1.0
    """Factor of the workload's TTFT SLOs, as the system was told them and as they are judged."""
    judge: Judge = "ttft"

    @functools.cached_property
    def met(self) -> int:
        return sum(meets(result, self.judge) for result in self.run.results)

    @property
    def missed(self) -> int:
        return len(self.run.results) - self.met

    @property
    def attainment_bounds(self) -> tuple[float, float]:
        """Lower and upper bound of the attainment; equal unless the replay was stopped early."""
        return self.met / self.total, 1 - self.missed / self.total

    @property
    def complete(self) -> bool:
        """Whether every request is known, and the client kept up."""
        return not self.run.stopped_early and self.run.client.valid

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Probe:
        results = [RequestResult(**(result | {"tbt_s": tuple(result["tbt_s"])})) for result in row["run"]["results"]]
        run = ReplayRun(**(row["run"] | {"results": results, "client": ClientReport(**row["run"]["client"])}))
        return cls(**({name: value for name, value in row.items() if name != "kind"} | {"run": run}))


class ProbeLog:
    """The file of a run's probes, and what is in it."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Open ``path``, or begin it with ``settings``. Raises ValueError if it holds probes of other settings."""
        self._path = path
        self.probes: list[Probe] = []
        self.solo_ttft_s: dict[str, list[dict[int, float]]] = {}
        """By system: for each start of its servers, the TTFT of isolated requests by prompt tokens."""
        self.steps: dict[str, list[Step]] = {}
        """By system: decode steps of all starts of its servers, where they were measured."""
        self.facts: dict[str, Any] = {}
        """What is fixed once in a run: the time scale, the rate at which systems are compared."""
        self._judged: dict[tuple[str, int, float], tuple[list[Verdict], Bracket]] = {}
        """By system, seed and attainment: what the probes so far say of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = list(_rows(path)) if path.exists() else []
        found = {**BEFORE, **(rows[0]["settings"] if rows else settings)}
        if different := [name for name in settings if found.get(name) != settings[name]]:
            described = "; ".join(f"{name} {_shown(found.get(name))}, not {settings[name]}" for name in different)
            raise ValueError(f"{path} has probes of other settings ({described}): give another --out, or delete it")
        if not rows:
            self._append({"kind": "settings", "settings": settings})
        for row in rows[1:]:
            if row["kind"] == "probe":
                self.probes.append(Probe.from_json(row))
            elif row["kind"] == "solo":
                times_s = {int(tokens): time_s for tokens, time_s in row["ttft_s"].items()}
                self.solo_ttft_s.setdefault(row["system"], []).append(times_s)
            elif row["kind"] == "steps":
                self.steps.setdefault(row["system"], []).extend(Step(**step) for step in row["steps"])
            else:
                self.facts[row["name"]] = row["value"]

    def add(self, probe: Probe) -> None:
        """Keep ``probe``, without the times between tokens if it is not judged by them."""
        if probe.judge == "ttft":
            run = probe.run
            run = dataclasses.replace(run, results=[dataclasses.replace(result, tbt_s=()) for result in run.results])
            probe = dataclasses.replace(probe, run=run)
        self.probes.append(probe)
        self._judged.clear()
        self._append({"kind": "probe", **dataclasses.asdict(probe)})

    def add_solo(self, system: str, ttft_s: Mapping[int, float]) -> None:
        """Keep TTFTs of isolated requests."""
        self.solo_ttft_s.setdefault(system, []).append(dict(ttft_s))
        self._append({"kind": "solo", "system": system, "ttft_s": {str(tokens): s for tokens, s in ttft_s.items()}})

    def add_steps(self, system: str, steps: Sequence[Step]) -> None:
        """Keep measured decode steps."""
        self.steps.setdefault(system, []).extend(steps)
        self._append({"kind": "steps", "system": system, "steps": [step.model_dump() for step in steps]})

    def fix(self, name: str, value: Any) -> None:
        """Keep a fact for the rest of the run."""
        self.facts[name] = value
        self._append({"kind": "fact", "name": name, "value": value})

    def of(self, system: str, seed: int, slo_scale: float = 1.0) -> list[Probe]:
        """Valid probes of a system and seed."""
        key = system, seed, slo_scale
        return [p for p in self.probes if (p.system, p.seed, p.slo_scale) == key and p.run.client.valid]

    def verdicts(self, system: str, seed: int, attainment: float) -> list[Verdict]:
        """What the probes of a system and seed say about ``attainment``."""
        return self._judge(system, seed, attainment)[0]

    def bracket(self, system: str, seed: int, attainment: float) -> Bracket:
        """Where a system stops to keep ``attainment`` on a seed, by its probes."""
        return self._judge(system, seed, attainment)[1]

    def complete_at(self, rate_rps: float, system: str, seed: int, slo_scale: float = 1.0) -> Probe | None:
        """The probe at exactly ``rate_rps`` that was not stopped early, if there is one."""
        return next((p for p in self.of(system, seed, slo_scale) if p.rate_rps == rate_rps and p.complete), None)

    def _judge(self, system: str, seed: int, attainment: float) -> tuple[list[Verdict], Bracket]:
        """A search asks for the same many times between two probes."""
        key = system, seed, attainment
        if key not in self._judged:
            found = ((p.rate_rps, decided(p.met, p.missed, p.total, attainment)) for p in self.of(system, seed))
            verdicts = [(rate_rps, kept) for rate_rps, kept in found if kept is not None]
            self._judged[key] = verdicts, bracket(verdicts)
        return self._judged[key]

    def _append(self, row: Mapping[str, Any]) -> None:
        with self._path.open("ab") as file:
            file.write(orjson.dumps(row, default=float) + b"\n")


def _shown(value: Any) -> Any:
    """A setting that a log of earlier code does not have is said to be none."""
    return "not recorded" if value is None else value


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a log; a last line that was cut off when its process was killed is dropped from the file."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    for line in whole.splitlines():
        yield orjson.loads(line)
