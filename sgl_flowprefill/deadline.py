"""When a request's tokens are due, by what SGLang knows of it."""

from __future__ import annotations

import logging
from typing import Any, Final

from sglang.srt.managers.utils import is_health_check_generate_req

from sgl_flowprefill.slo import SLO_KEY, TBT_KEY, SloError, objective_s

logger = logging.getLogger(__name__)

RECEIVED: Final = "flowprefill_received_s"
SENT: Final = "flowprefill_sent_s"
"""Attributes that ``patches/request_times.py`` gives SGLang's ``time_stats``; 0 in a request that did not come from the
HTTP server."""
HEALTH_CHECK_SLO_S: Final = 0.5
"""Objective of SGLang's health-check request, which runs as a one-token prefill when the server is idle."""


def slo_s(req: Any, default_s: float) -> float:
    """TTFT objective in seconds of SGLang's ``req``; ``default_s`` where it names none.

    HTTP servers refuse an invalid objective; one that came another way counts as none.
    """
    if is_health_check_generate_req(req):
        return HEALTH_CHECK_SLO_S
    return _objective_s(SLO_KEY, req, default_s)


def tbt_slo_s(req: Any, default_s: float) -> float:
    """Objective in seconds for the time between two tokens of SGLang's ``req``; ``default_s`` where it names none."""
    return _objective_s(TBT_KEY, req, default_s)


def _objective_s(key: str, req: Any, default_s: float) -> float:
    try:
        return objective_s(key, req.sampling_params.custom_params, default_s)
    except SloError as error:
        logger.warning("request %s: %s It gets the default, %g s.", req.rid, error, default_s)
        return default_s


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
