"""What a server does now, as its scheduler tells it, and what those who watch are told. Times are seconds from now on,
and negative for what is past, so that no reader needs the server's clock.
"""

from __future__ import annotations

from typing import Final

import msgspec
from msgspec import Struct

MOST_WAITING: Final = 50
"""Waiting requests that are told of, the first of their order."""
MOST_RIDS: Final = 3
"""Requests of a task that are named."""


class Task(Struct):
    """A prefill that runs or is suspended."""

    task: int
    rids: list[str]
    """The first of its requests."""
    requests: int
    new_tokens: int
    cached_tokens: int
    runs: bool
    done: float
    """Share of its predicted time that it has behind it."""
    left_s: float
    """Predicted time that is left, with margin."""
    due_s: float
    """Until the deadline of the request that it was started for."""
    standing: str
    """``policy.Standing``"""
    slo_class: str = ""
    """Of the first request."""

    @property
    def slack_s(self) -> float:
        return self.due_s - self.left_s


class Waiting(Struct):
    """A request that could run now."""

    rid: str
    new_tokens: int
    cached_tokens: int
    waits_s: float
    """Since the HTTP server received it."""
    needs_s: float
    """Predicted time of its prefill, with margin."""
    due_s: float
    """Until its deadline."""
    standing: str
    """``policy.Standing``"""
    slo_class: str = ""

    @property
    def slack_s(self) -> float:
        return self.due_s - self.needs_s


class State(Struct):
    """What a scheduler does now."""

    policy: str
    decodes: bool
    """Whether it decodes as well."""
    is_paused: bool
    kv_is_short: bool
    """Whether the KV cache of the request that would start does not fit."""
    correction: float
    """Measured over profiled time of the last prefills: above 1 on a machine that is slower than its profile."""
    tasks: list[Task]
    """The running one first, then the others in the order of their start."""
    waiting: list[Waiting]
    """The first in the order in which they would run now."""
    waiting_requests: int
    """All that wait."""
    not_ready: int
    """Requests that cannot be run yet: they wait for a decode server's KV cache or a prefix from storage, or, on a
    server that decodes, for KV cache to be freed or an adapter's slot."""
    streams: int = 0
    step_runs: bool = False
    """Whether a decode step is on the device."""
    step_due_s: float | None = None
    """Until the next decode step has to begin; None without one."""


class Answer(Struct):
    """What a scheduler answers to who watches: its state, and what has happened since the last answer."""

    now_s: float
    """By the clock of the events."""
    first: int
    """Number of the first event."""
    next: int
    """Number of the event that follows: what to ask for next."""
    written: int
    """Events so far: more than ``next`` where not all fitted."""
    lines: bytes
    """Lines of an event log."""
    state: State | None = None
    head: bytes = b""
    """The first line of the log."""


class ClassAttainment(Struct):
    """How the requests of a class fared in the last minutes."""

    slo_class: str
    met: int
    missed: int
    ttft_p50_s: float | None
    ttft_p99_s: float | None
    last_minute: float | None
    """Attainment; None without requests."""
    bins: list[float | None]
    """Attainment of each stretch of ``Document.bin_s``, the present one last."""


class Miss(Struct):
    """A request that missed its objective."""

    rid: str
    slo_class: str
    slo_source: str
    cause: str
    ended_s: float
    """Negative: how long ago its outcome was known."""
    ttft_slo_s: float
    ttft_s: float | None
    """None without a first token."""
    predicted_s: float | None
    waited_s: float | None
    slack_at_admission_s: float | None
    blocked_s: float
    suspensions: int
    suspended_s: float
    prompt_tokens: int
    reason: str | None = None


class Server(Struct):
    """A server and what became of its requests."""

    name: str
    state: State | None = None
    """None before its scheduler has answered."""
    age_s: float = 0.0
    """How old the state is."""
    attainment: list[ClassAttainment] = []
    misses: list[Miss] = []
    """The last ones, the newest first."""
    error: str | None = None
    """Why nothing is heard of it."""


class Document(Struct):
    """What those who watch are told."""

    servers: list[Server]
    window_s: float
    """Past that attainment is of."""
    bin_s: float
    url: str = ""


encode_answer: Final = msgspec.msgpack.Encoder().encode
decode_answer: Final = msgspec.msgpack.Decoder(Answer).decode
encode_document: Final = msgspec.json.Encoder().encode
decode_document: Final = msgspec.json.Decoder(Document).decode
