"""Every metric of FlowPrefill: its name, type, labels, unit, help, buckets, and from what it is fed.

Names follow SGLang's: a prefix with a colon, ``time_to_first_token_seconds``, ``num_queue_reqs``. Every metric has the
labels of SGLang's own metrics (``model_name``, ``engine_type`` and so on) and those of its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sgl_flowprefill.misses import Cause

PREFIX: Final = "flowprefill:"
MOST_CLASSES: Final = 32
"""Classes that a server tells apart: the first that it meets, so that the number of series stays bounded."""
OTHER: Final = "other"
"""Stands for all further classes."""


class Kind(StrEnum):
    """What Prometheus has a metric for."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Unit(StrEnum):
    """What a value counts."""

    SECONDS = "seconds"
    BYTES = "bytes"
    RATIO = "ratio"
    REQUESTS = "requests"
    TASKS = "tasks"
    TOKENS = "tokens"
    VALUES = "as its label says"


@dataclass(frozen=True)
class Label:
    """A label beside SGLang's."""

    name: str
    values: tuple[str, ...] | None
    """All that it can be; None where a server's options or its state say that."""
    help: str


@dataclass(frozen=True, eq=False)
class Metric:
    """A row of the table."""

    name: str
    """Without the prefix, and of a counter without ``_total``."""
    kind: Kind
    unit: Unit
    help: str
    fed_from: str
    """What tells the exporter."""
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, without infinity."""
    unified: bool = False
    """Whether only servers that prefill and decode have it."""

    @property
    def full_name(self) -> str:
        """What it is registered as."""
        return PREFIX + self.name

    @property
    def series(self) -> str:
        """The name of its samples; of a histogram, the beginning of theirs."""
        return f"{self.full_name}_total" if self.kind is Kind.COUNTER else self.full_name

    @property
    def samples(self) -> tuple[str, ...]:
        """Every name under which Prometheus has samples of it to be asked for. The sum of values that can be negative
        is no counter, and whether it is exported depends on where the client library keeps them.
        """
        if self.kind is not Kind.HISTOGRAM:
            return (self.series,)
        parts = ("bucket", "count", "sum") if self.buckets[0] >= 0 else ("bucket", "count")
        return tuple(f"{self.full_name}_{part}" for part in parts)


CAUSES: Final[Mapping[Cause, str]] = {
    Cause.OBJECTIVE: "objective",
    Cause.LATE_ON_ARRIVAL: "late_on_arrival",
    Cause.NOT_READY: "not_ready",
    Cause.TRANSFER: "transfer",
    Cause.MISPREDICTION: "misprediction",
    Cause.OVERLOAD: "overload",
    Cause.FAILED: "failed",
}
"""Causes of misses, as values of a label. Aborts before the deadline and requests that are not valid are no misses, and
have counters of their own.
"""

CLASS: Final = Label(
    "slo_class",
    None,
    "class of the request, as the SLO policy file has it, else `default`; a server tells the first "
    f"{MOST_CLASSES} apart, and all further ones are `{OTHER}`",
)
CAUSE: Final = Label("cause", tuple(CAUSES.values()), "why, by the rules of `sgl_flowprefill/misses.py`")
FEASIBLE: Final = "feasible"
INFEASIBLE: Final = "infeasible"
NOT_JUDGED: Final = "not_judged"
NOT_READY: Final = "not_ready"
STATE: Final = Label(
    "state",
    (FEASIBLE, INFEASIBLE, NOT_JUDGED, NOT_READY),
    "`feasible` and `infeasible`: whether the policy holds that the request alone can still meet its deadline; "
    "`not_judged` under a policy that does not ask; `not_ready`: it cannot be run yet, as it waits for its decode "
    "server or for what is read from storage, or on a server that decodes for an adapter's slot or a rank's KV cache. "
    "A request whose grammar is being compiled is not counted",
)
MODEL_VALUE: Final = Label("value", None, "which part of the TTFT model's state")

SHORT_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Around the time of an operator."""
TTFT_S: Final = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 10.0, 20.0, 40.0, 60.0, 100.0)
SLACK_S: Final = (-30.0, -10.0, -5.0, -2.0, -1.0, -0.5, -0.2, -0.1, 0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SUSPENSION_S: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0)
EVENT_S: Final = (25e-6, 50e-6, 100e-6, 200e-6, 500e-6, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
ERROR_RATIO: Final = (0.5, 0.67, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)

TABLE: Final[list[Metric]] = []
"""All metrics, in the order of docs and dashboard."""


def _row(
    name: str,
    kind: Kind,
    unit: Unit,
    help: str,
    fed_from: str,
    labels: tuple[Label, ...] = (),
    buckets: tuple[float, ...] = (),
    unified: bool = False,
) -> Metric:
    TABLE.append(Metric(name, kind, unit, help, fed_from, labels, buckets, unified))
    return TABLE[-1]


TTFT_MET: Final = _row(
    "ttft_slo_met",
    Kind.COUNTER,
    Unit.REQUESTS,
    "Requests whose first token was in time.",
    "the outcome of each request that has ended",
    (CLASS,),
)
TTFT_MISSED: Final = _row(
    "ttft_slo_missed",
    Kind.COUNTER,
    Unit.REQUESTS,
    "Requests whose first token was not in time, by the cause.",
    "the outcome of each request that has ended",
    (CLASS, CAUSE),
)
ABORTED: Final = _row(
    "num_aborted_requests",
    Kind.COUNTER,
    Unit.REQUESTS,
    "Requests that were aborted before they were due, so that nothing was met or missed.",
    "the outcome of each request that has ended",
    (CLASS,),
)
INVALID: Final = _row(
    "num_invalid_requests",
    Kind.COUNTER,
    Unit.REQUESTS,
    "Requests that were refused as not valid, with status 4xx but 429 (a prompt that is too long, a grammar that does "
    "not compile), so that nothing was met or missed.",
    "the outcome of each request that has ended",
    (CLASS,),
)
TTFT: Final = _row(
    "time_to_first_token_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "From when the HTTP server had a request to when its first token was where the client is answered from: the KV "
    "cache with the decode server or, on a server that decodes, the prefill over.",
    "the outcome of each request that has ended",
    (CLASS,),
    TTFT_S,
)
SLACK: Final = _row(
    "admission_slack_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "Slack of a request when it could first be run: time until its deadline, less the predicted time of its prefill. "
    "Below 0, it could not be met any more.",
    "the outcome of each request that has ended",
    (CLASS,),
    SLACK_S,
)
SHED: Final = _row(
    "num_shed_requests",
    Kind.COUNTER,
    Unit.REQUESTS,
    "Requests that were refused because there was too much to do, with status 429 or 503 (SGLang's "
    "`--max-queued-requests`; its `--abort-on-priority-when-disabled` has the same status). They count as missed, "
    "`failed`, too.",
    "the end of each request that has failed",
    (CLASS,),
)
QUEUE: Final = _row(
    "num_queue_reqs",
    Kind.GAUGE,
    Unit.REQUESTS,
    "Requests that wait for their prefill.",
    "hub and policy, twice a second while something runs and every 5 s while nothing does",
    (STATE,),
)
LIVE_TASKS: Final = _row(
    "live_tasks",
    Kind.GAUGE,
    Unit.TASKS,
    "Prefills that run or are suspended.",
    "the hub, as often as the queue",
)
SUSPENDED_TASKS: Final = _row(
    "num_suspended_tasks", Kind.GAUGE, Unit.TASKS, "Prefills that are suspended.",
    "the hub, as often as the queue",
)  # fmt: skip
SUSPENDED_BYTES: Final = _row(
    "suspended_bytes",
    Kind.GAUGE,
    Unit.BYTES,
    "KV cache of the new tokens of suspended prefills and their activations; of one rank.",
    "the hub, as often as the queue: new tokens times the bytes of a token in SGLang's KV pool and in a forward pass",
)
OLDEST_SUSPENDED: Final = _row(
    "oldest_suspended_seconds",
    Kind.GAUGE,
    Unit.SECONDS,
    "For how long the prefill that was suspended first has been so; 0 without any.",
    "the hub, as often as the queue",
)
SUSPENSION: Final = _row(
    "suspension_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "How long a prefill was suspended, each time that it goes on.",
    "the hub, at a resume",
    buckets=SUSPENSION_S,
)
PREEMPTIONS: Final = _row(
    "preemptions",
    Kind.COUNTER,
    Unit.TASKS,
    "Running prefills suspended for others that could be run from then on.",
    "the hub, at a switch that news led to",
)
BLOCKING: Final = _row(
    "blocking_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "From when a request that wins could be read, to when it takes the place of the running prefill.",
    "the hub, at a switch that news led to",
    buckets=SHORT_S,
)
STOP_WAIT: Final = _row(
    "stop_wait_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "The part of the blocking time until the running prefill stopped, which is the wait for the next interruption "
    "point; 0 where it had stopped before.",
    "the hub, at a switch that news led to",
    buckets=SHORT_S,
)
EVENT_COST: Final = _row(
    "scheduling_event_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "Cost of an event: taking what has happened, processing results that have arrived, and choosing what runs next.",
    "the hub, each time that it has something to run",
    buckets=EVENT_S,
)
FORWARD: Final = _row(
    "forward_seconds",
    Kind.COUNTER,
    Unit.SECONDS,
    "Time in forward passes of prefills, also of those that were aborted, have failed or were given back.",
    "the hub, when a prefill goes on after a suspension, and when it ends",
)
PREDICTION_ERROR: Final = _row(
    "prediction_error_ratio",
    Kind.HISTOGRAM,
    Unit.RATIO,
    "Measured over expected time of a prefill: above 1, it took longer. Expected is without the margin.",
    "the hub, when a prefill has run",
    buckets=ERROR_RATIO,
)
TTFT_MODEL: Final = _row(
    "ttft_model",
    Kind.GAUGE,
    Unit.VALUES,
    "State of the TTFT model. Online: correction (time over the profile's; a factor that stays far from 1 says that "
    "the profile is of another machine, or of a busy one), by new tokens (correction_from_…), margin, widest_margin of "
    "a kind of batches, tasks observed. Learned: tasks and shapes explored, rows kept, refused measurements, rows "
    "explored since the start, refits, adopted, refit_at (task), judged (tasks), champion_error and challenger_error "
    "on these, was_adopted, refit_cpu_s.",
    "the TTFT model, as often as the queue, some values at each event",
    (MODEL_VALUE,),
)
EXPLORATION: Final = _row(
    "exploration_seconds",
    Kind.COUNTER,
    Unit.SECONDS,
    "Time in prefills that nobody asked for, run for their times while there was nothing to do.",
    "exploration",
)
TBT_MET: Final = _row(
    "tbt_slo_met",
    Kind.COUNTER,
    Unit.TOKENS,
    "Tokens behind the first that came within the TBT objective of their request after the one before.",
    "the decode step that computed them, or the new prefill of a stream that was retracted",
    unified=True,
)
TBT_MISSED: Final = _row(
    "tbt_slo_missed",
    Kind.COUNTER,
    Unit.TOKENS,
    "Tokens behind the first that came later than that.",
    "the decode step that computed them, or the new prefill of a stream that was retracted",
    unified=True,
)
STEP: Final = _row(
    "decode_step_seconds",
    Kind.COUNTER,
    Unit.SECONDS,
    "Time that decode steps took; what a GPU had queued before them is not counted.",
    "the decode step",
    unified=True,
)
STEP_LATENESS: Final = _row(
    "decode_step_lateness_seconds",
    Kind.HISTOGRAM,
    Unit.SECONDS,
    "How much later decode steps began than they had to, of those that did not begin before.",
    "the decode step",
    buckets=SHORT_S,
    unified=True,
)
GIVEN_BACK: Final = _row(
    "given_back",
    Kind.COUNTER,
    Unit.TASKS,
    "Started prefills given up because streams needed their KV cache or their device memory.",
    "the hub, at each",
    unified=True,
)
