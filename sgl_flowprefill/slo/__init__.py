"""Objectives of requests: where clients put them, what is valid, and in which order one of them is chosen."""

from sgl_flowprefill.slo.body import body_error, with_objective
from sgl_flowprefill.slo.objective import (
    DEFAULT,
    SLO_KEY,
    TBT_KEY,
    Objective,
    SloError,
    objective_s,
)
from sgl_flowprefill.slo.priorities import PriorityClasses

__all__ = [
    "DEFAULT",
    "SLO_KEY",
    "TBT_KEY",
    "Objective",
    "PriorityClasses",
    "SloError",
    "body_error",
    "objective_s",
    "with_objective",
]
