"""Rows of the contract: times of requests."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows, source
from sgl_flowprefill.contract.symbols import REQ, TIMES

PART: Final = Part(
    "request_times",
    "Times of requests",
    ("HTTP server", "scheduler"),
    (
        *rows(
            "hooks",
            TIMES,
            "ReqTimeStatsBase.__getstate__(self)",
            "adds to what travels with a request when it was received",
            "deadlines count from when the scheduler has read a request, and differ between ranks",
        ),
        source(
            "assumes",
            f"{TIMES}ReqTimeStatsBase.__setstate__",
            ['key.endswith("time")', "self.__dict__.update(state)"],
            "shifts times by the names that they have, and ours ends otherwise",
            "deadlines follow steps of the wall clock",
        ),
        source(
            "assumes",
            f"{TIMES}ReqTimeStatsBase.new_from_obj",
            ["if hasattr(new_obj, key):"],
            "copies what its own objects know of",
            "the time at which a request was received is lost",
        ),
        source(
            "assumes",
            f"{TIMES}APIServerReqTimeStats.__getstate__",
            ["super().__getstate__()"],
            "pickles what the base class adds",
            "the time at which a request was received is lost",
        ),
        source(
            "assumes",
            f"{TIMES}APIServerReqTimeStats.set_created_time",
            ["time.perf_counter()"],
            "takes the time at which a request was received from the monotonic clock",
            "deadlines follow steps of the wall clock",
        ),
        *attributes(
            f"{TIMES}APIServerReqTimeStats",
            "created_time api_server_dispatch_time",
            "is when the HTTP server received a request, and sent it on",
            "deadlines count from when the scheduler has read a request",
        ),
        *attributes(
            f"{TIMES}SchedulerReqTimeStats",
            "scheduler_recv_time",
            "is when a request came that no HTTP server has received",
            "such a request has no deadline",
        ),
        *attributes(
            REQ,
            "time_stats",
            "has the times of a request",
            "requests have no deadlines",
        ),
    ),
)
