"""Scheduling policy, free of torch and SGLang: the runtime, the simulator and the tests drive the same objects."""

from sgl_flowprefill.policy.base import Job, Queue
from sgl_flowprefill.policy.queues import SlackEdfQueue, StaticQueue
from sgl_flowprefill.policy.scheduler import POLICIES, Limits, PrefillPolicy, make_policy

__all__ = ["POLICIES", "Job", "Limits", "PrefillPolicy", "Queue", "SlackEdfQueue", "StaticQueue", "make_policy"]
