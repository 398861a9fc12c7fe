"""How long decode steps take: measured steps, the file that holds them, the model that they determine, and what it
learns from the steps that run.

The file is JSON: an object with the ``setting`` that the steps hold for, and the measured ``steps``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sgl_flowprefill.profiling.file import Setting, replacing
from sgl_flowprefill.ttft.physics import non_negative

LEAST_S: Final = 1e-6
"""No step is predicted to take less, whatever was measured."""
ROWS: Final = 12
"""Last steps that are kept of a kind."""
JUDGES: Final = 4
"""The newest of these, which judge. A kind with fewer than twice as many steps is as it was profiled."""
REFIT_STEPS: Final = 200
LEAST_KINDS: Final = 3
"""Kinds that judge, at least: what all steps have in common is the machine's, and says nothing of the model."""
LEAST_GAIN: Final = 0.05
"""Part of its error by which the model in use has to be worse than another, at least."""
LEAST_DIFFERENCE: Final = 0.005
"""Difference of the two errors (natural logarithm), at least."""


class Step(BaseModel):
    """A measured decode step."""

    model_config = ConfigDict(frozen=True)

    requests: int
    context_tokens: int
    """Tokens of the prompts and answers of all its requests."""
    time_s: float


class StepProfile(BaseModel):
    """Measured decode steps of a server."""

    model_config = ConfigDict(frozen=True)

    setting: Setting
    steps: tuple[Step, ...]

    @classmethod
    def read(cls, path: Path, setting: Setting) -> Self | None:
        """The profile at ``path``; None where there is none of ``setting``."""
        try:
            profile = cls.model_validate_json(path.read_text())
        except (OSError, ValidationError):
            return None
        return profile if profile.setting == setting else None

    def write(self, path: Path) -> None:
        """Replace ``path``. Raises OSError."""
        with replacing(path) as partial:
            partial.write_text(self.model_dump_json())


class LinearSteps:
    """A step takes a fixed time, a time for each of its requests, and one for each token of their contexts."""

    def __init__(self, fixed_s: float, per_request_s: float, per_token_s: float) -> None:
        self.fixed_s = fixed_s
        self.per_request_s = per_request_s
        self.per_token_s = per_token_s

    @classmethod
    def fit(cls, steps: Sequence[Step]) -> LinearSteps:
        """The three times, none of them negative, with the least squares of relative errors over ``steps``."""
        rows = np.array([[1.0, step.requests, step.context_tokens] for step in steps])
        times_s = np.array([step.time_s for step in steps])
        found = non_negative(rows / times_s[:, None], np.ones(len(steps)))
        return cls(*map(float, found))

    def predict_s(self, requests: int, context_tokens: int) -> float:
        time_s = self.fixed_s + self.per_request_s * requests + self.per_token_s * context_tokens
        return max(LEAST_S, time_s)

    def __str__(self) -> str:
        return (
            f"{1e3 * self.fixed_s:.2f} ms, {1e3 * self.per_request_s:.3f} ms a request and "
            f"{1e6 * self.per_token_s:.3f} ms a thousand tokens of context"
        )


class LearnedSteps:
    """A linear model, which is fitted again to the steps that run.

    The last steps of each kind, by number of requests and tokens of each, are kept; a kind that runs seldom keeps its
    steps for long. Every REFIT_STEPS, a model is fitted to what is typical of each kind but for its newest steps, and
    judged by these, beside the one in use.
    """

    def __init__(
        self,
        profiled: Sequence[Step],
        learns: bool = True,
        keep: Callable[[tuple[Step, ...]], None] = lambda steps: None,
    ) -> None:
        """``keep`` is called with the steps that another model was fitted to when that takes over."""
        self.model = LinearSteps.fit(profiled)
        self._profiled = {_kind(step): step for step in profiled}
        self._learns = learns
        self._keep = keep
        self._rows: dict[tuple[int, int], deque[Step]] = {}
        self._observed = 0
        self._refits = 0
        self._adopted = 0
        self._error = self._challenger_error = 0.0
        """At the last refit: errors of the model in use and of the other one on the newest steps."""

    def predict_s(self, requests: int, context_tokens: int) -> float:
        return self.model.predict_s(requests, context_tokens)

    def observe(self, requests: int, context_tokens: int, measured_s: float) -> None:
        """A step over ``requests`` streams that have ``context_tokens`` together has taken ``measured_s``."""
        if not (self._learns and 0.0 < measured_s < math.inf):
            return
        step = Step(requests=requests, context_tokens=context_tokens, time_s=measured_s)
        self._rows.setdefault(_kind(step), deque(maxlen=ROWS)).append(step)
        self._observed += 1
        if self._observed % REFIT_STEPS == 0:
            self._refit()

    def state(self) -> dict[str, float]:
        """What ``/server_info`` shows."""
        return {
            "step_rows": sum(map(len, self._rows.values())),
            "step_refits": self._refits,
            "step_models_adopted": self._adopted,
            "step_error": round(self._error, 4),
            "step_challenger_error": round(self._challenger_error, 4),
        }

    def _refit(self) -> None:
        """Fit another model, and use it if it is better on the newest steps."""
        rows = {kind: list(steps) for kind, steps in self._rows.items() if len(steps) >= 2 * JUDGES}
        if len(rows) < LEAST_KINDS:
            return
        known = {kind: self._typical(steps[:-JUDGES]) for kind, steps in rows.items()}
        judging = [self._typical(steps[-JUDGES:]) for steps in rows.values()]
        slowness = median(map(self._ratio, known.values()))
        profiled = {
            kind: step.model_copy(update={"time_s": slowness * step.time_s}) for kind, step in self._profiled.items()
        }
        steps = tuple((profiled | known).values())
        challenger = LinearSteps.fit(steps)
        self._refits += 1
        self._error, self._challenger_error = _error(self.model, judging), _error(challenger, judging)
        if self._error - self._challenger_error > max(LEAST_DIFFERENCE, LEAST_GAIN * self._error):
            self.model = challenger
            self._adopted += 1
            self._keep(steps)

    def _ratio(self, step: Step) -> float:
        return step.time_s / self.model.predict_s(step.requests, step.context_tokens)

    def _typical(self, steps: Iterable[Step]) -> Step:
        """The median of ``steps``, of which one was measured while the process was stopped, maybe."""
        ordered = sorted(steps, key=self._ratio)
        return ordered[(len(ordered) - 1) // 2]


def _kind(step: Step) -> tuple[int, int]:
    """Steps over about as many requests, with about as many tokens each."""
    return step.requests.bit_length(), (step.context_tokens // max(1, step.requests)).bit_length()


def _error(model: LinearSteps, steps: Sequence[Step]) -> float:
    """Mean error of the logs of the times of ``steps``, but for what all have in common."""
    logs = [math.log(step.time_s / model.predict_s(step.requests, step.context_tokens)) for step in steps]
    return mean(abs(one - median(logs)) for one in logs)
