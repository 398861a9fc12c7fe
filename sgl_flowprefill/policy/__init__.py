"""Scheduling policy, free of torch and SGLang: the runtime, the simulator and the tests drive the same objects."""

from sgl_flowprefill.policy import orders
from sgl_flowprefill.policy.base import Job, Limits, Policy, Standing
from sgl_flowprefill.policy.colocated import Act, ColocatedPolicy, Turn
from sgl_flowprefill.policy.decode import DecodeLimits, Joiner, Stream
from sgl_flowprefill.policy.registry import POLICIES, discover, make_policy, register

discover(orders)

__all__ = [
    "POLICIES",
    "Act",
    "ColocatedPolicy",
    "DecodeLimits",
    "Job",
    "Joiner",
    "Limits",
    "Policy",
    "Standing",
    "Stream",
    "Turn",
    "make_policy",
    "register",
]
