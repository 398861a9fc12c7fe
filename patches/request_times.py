"""A request's times travel as the HTTP server took them: when it received the request, and when it sent it on.

Target: ``ReqTimeStatsBase.__getstate__`` of ``observability/req_time_stats.py``, which says what of a
request's times is pickled on the way from the HTTP server to the first scheduler rank, and from there to the others.
SGLang leaves these times out, and shifts every pickled number whose name ends in "time" by the difference between wall
clock and monotonic clock as each process last measured it: such a number follows steps of the wall clock, and differs
from rank to rank. The names used here end otherwise, so every rank has the very numbers of the HTTP server. They are
seconds of CLOCK_MONOTONIC, which Python calls both ``time.monotonic`` and ``time.perf_counter``; all processes of a
machine share it, and a rank on another machine can compare them with each other but not with its own clock.
"""

from __future__ import annotations

from typing import Any, Final

from sgl_flowprefill.deadline import RECEIVED, SENT
from sgl_flowprefill.patches.base import expect, resolve

SEAM: Final = "request_times"
STATS: Final = "sglang.srt.observability.req_time_stats.ReqTimeStatsBase"
STATE: Final = "sglang.srt.observability.req_time_stats.ReqTimeStatsBase.__getstate__"
SOURCES: Final = {RECEIVED: "created_time", SENT: "api_server_dispatch_time"}
"""Each of them, and SGLang's name of it in the HTTP server."""


def apply() -> None:
    """Register the hook in a process that sends or receives requests. Raises SeamError when a target has changed."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    expect(SEAM)
    stats = resolve(SEAM, STATS)
    for name in SOURCES:
        setattr(stats, name, 0.0)  # SGLang copies what its own objects know of
    HookRegistry.register(STATE, _add_times, HookType.AFTER)


def _add_times(state: dict[str, Any], stats: Any) -> dict[str, Any]:
    """What has been received is passed on as it came."""
    return state | {name: getattr(stats, name) or getattr(stats, source, 0.0) for name, source in SOURCES.items()}
