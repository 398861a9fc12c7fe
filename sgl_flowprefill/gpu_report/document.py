"""The JSON of a report: what each phase has found, and where all of it comes from."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sgl_flowprefill.gpu_report.phases import Phase
from sgl_flowprefill.gpu_report.phases.base import phase_file
from sgl_flowprefill.gpu_report.tuning import Choice
from sgl_flowprefill.profiling.file import replacing
from sgl_flowprefill.provenance import result

FORMAT: Final = 3
PACKAGES: Final = ("flashinfer-python", "sglang-kernel", "triton", "transformers", "apache-tvm-ffi")


@dataclass
class Document:
    """A report in the making; written anew whenever a phase has found something."""

    out: Path
    command: Sequence[str]
    model: str
    device: str
    budget_s: float
    phases: dict[str, dict[str, Any]] = field(default_factory=dict)
    choices: Sequence[Choice] = ()
    ended: str = "running"
    elapsed_s: float = 0.0
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    @property
    def path(self) -> Path:
        return self.out / "report.json"

    def note(self, phase: Phase, found: Mapping[str, Any], elapsed_s: float) -> None:
        """What a phase has found so far: kept in a file of its own, and in the report."""
        entry = {"title": phase.title, **found, "took_s": round(elapsed_s, 1)}
        self.phases[phase.name] = entry
        _write(phase_file(self.out, phase.name), entry)
        self.write()

    def figures(self, phase: str) -> Mapping[str, Any]:
        """Figures of a phase; none where it has found nothing."""
        figures: Mapping[str, Any] = self.phases.get(phase, {}).get("figures", {})
        return figures

    def to_dict(self) -> dict[str, Any]:
        figures = {
            "format": FORMAT,
            "started": self.started,
            "model": self.model,
            "device": self.device,
            "budget_s": self.budget_s,
            "elapsed_s": round(self.elapsed_s, 1),
            "ended": self.ended,
            "phases": self.phases,
            "choices": [asdict(choice) | {"flag": choice.flag} for choice in self.choices],
        }
        return result("gpu-report", figures, self.command, PACKAGES)

    def write(self) -> None:
        _write(self.path, self.to_dict())


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n")
