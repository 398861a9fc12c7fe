"""When a request's tokens are due, by what SGLang knows of it."""

from __future__ import annotations

import logging
import sys
from typing import Any, Final

from sglang.srt.managers.utils import is_health_check_generate_req

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.slo import Objective, PriorityClasses, SloError
from sgl_flowprefill.slo.asked import body_ask
from sgl_flowprefill.slo.resolve import Request, Resolver

logger = logging.getLogger(__name__)

RECEIVED: Final = "flowprefill_received_s"
SENT: Final = "flowprefill_sent_s"
"""Attributes that ``patches/request_times.py`` gives SGLang's ``time_stats``; 0 in a request that did not come from the
HTTP server."""
HEALTH_CHECK_SLO_S: Final = 0.5
"""Objective of SGLang's health-check request, which runs as a one-token prefill when the server is idle."""
NO_PRIORITY: Final = (None, sys.maxsize, -sys.maxsize - 1)
"""What SGLang has as the priority of a request without one: nothing first, then the least urgent number."""


def resolver(config: FlowPrefillConfig) -> Resolver:
    """What chooses objectives as ``config`` has it, without a policy file, which only the HTTP process reads."""
    text = config.priority_ttft_slo
    classes = None if text is None else PriorityClasses.parse(text)
    return Resolver(config.default_ttft_slo, config.default_tbt_slo, classes)


def objective(req: Any, resolver: Resolver) -> Objective:
    """The objective of SGLang's ``req``: as the HTTP process has resolved it, or ``resolver``'s for a request that came
    another way. An invalid one counts as none there.
    """
    if is_health_check_generate_req(req):
        return Objective(HEALTH_CHECK_SLO_S, resolver.default_tbt_s)
    custom_params = req.sampling_params.custom_params
    resolved = Objective.resolved(custom_params)
    if resolved is not None:
        return resolved
    priority = None if resolver.priorities is None or req.priority in NO_PRIORITY else req.priority
    try:
        asks = [body_ask(custom_params)]
    except SloError as error:
        logger.warning("request %s: %s It gets the default.", req.rid, error)
        asks = []
    return resolver.resolve(Request(asks, priority), now_s=0.0)


def received_s(req: Any) -> float:
    """When the HTTP server received ``req``, in seconds of CLOCK_MONOTONIC; for one that came another way, when this
    process did, which no other rank knows: only what one rank decides for all may depend on it.
    """
    return float(getattr(req.time_stats, RECEIVED) or req.time_stats.scheduler_recv_time)


def received_by_http_s(req: Any) -> float:
    """When the HTTP server received ``req``: the same number on all ranks, 0 for one that came another way."""
    return float(getattr(req.time_stats, RECEIVED))


def sent_s(req: Any) -> float:
    """When the HTTP server sent ``req`` to the scheduler; 0 for one that came another way."""
    return float(getattr(req.time_stats, SENT))
