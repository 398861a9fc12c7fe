"""How long decode steps take: measured steps, the file that holds them, and the model that they determine.

The file is JSON: an object with the ``setting`` that the steps hold for, and the measured ``steps``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sgl_flowprefill.profiling.file import Setting, replacing
from sgl_flowprefill.ttft.physics import non_negative

LEAST_S: Final = 1e-6
"""No step is predicted to take less, whatever was measured."""


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
