"""The doctor's checks on one attention backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Final

from sgl_flowprefill.gpu_report.engine import Engine
from sgl_flowprefill.gpu_report.phases.base import Outcome, Request, verdict
from sgl_flowprefill.runtime.selfcheck import Finding

LAST_CHECK: Final = "blocking"


def measure(engine: Engine, request: Request) -> Iterator[Outcome]:
    found: list[Finding] = []
    for finding in engine.findings():
        found.append(finding)
        passed = sum(one.passed for one in found)
        is_over = not request.budget.left_s
        yield Outcome(
            verdict(passed == len(found)),
            f"{engine.setting.attention_backend}: {passed} of {len(found)} checks passed"
            + (", for more the time did not do" if is_over and finding.check != LAST_CHECK else ""),
            ("check", "", "figures"),
            [(one.check, "pass" if one.passed else "FAIL", one.figures) for one in found],
            {"engine": engine.describe(), "findings": [asdict(one) for one in found]},
        )
        if is_over:
            break
