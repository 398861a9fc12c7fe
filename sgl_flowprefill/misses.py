"""Why a request missed its objective: a pure function of when what happened to it.

The causes are looked for along the way of a request, and the first that suffices is named: one without which, all else
as it was, the first token could have come in time. What remains is overload: others ran while it waited.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import NamedTuple

from msgspec import Struct


class Cause(StrEnum):
    """What a miss is put down to."""

    ABORTED = "aborted"
    """Somebody asked for it before the deadline, so there is nothing to miss."""
    FAILED = "failed"
    """It was refused, lost on the way, or its forward pass raised, before the deadline."""
    INVALID = "invalid"
    """It was refused because it cannot be served as it is, with status 4xx but 429, so there is nothing to miss."""
    OBJECTIVE = "objective shorter than its prefill"
    """An idle server would not have been in time either."""
    LATE_ON_ARRIVAL = "late on arrival"
    """It would have been in time, but for the time that passed until the scheduler took it: its way there, and the
    compiling of its grammar.
    """
    NOT_READY = "not ready"
    """It could be run too late, or never: it waited for KV cache at the decode server or for a prefix from storage;
    on a server that decodes, for its prefix, for the slot of its adapter, or for KV cache of its rank.
    """
    TRANSFER = "transfer"
    """Its prefill was over in time, and its KV cache reached the decode server too late."""
    MISPREDICTION = "misprediction"
    """Its prefill was predicted to take longer than there was time, and took less, so that it was given up too soon; or
    as long as predicted, it and the prefills that ran while it waited would have left enough time.
    """
    OVERLOAD = "overload"
    """Others ran while it waited."""


class Course(Struct, frozen=True, kw_only=True):
    """When what happened to a request, in seconds of one clock; None for what has not happened."""

    received_s: float
    """When the HTTP server had it: its objective counts from then."""
    deadline_s: float
    arrived_s: float
    """When the scheduler took it, its grammar compiled."""
    ready_s: float | None = None
    """When it could first have been run."""
    started_s: float | None = None
    """When its prefill began, the first one of several."""
    alone_s: float | None = None
    """How long its prefill was predicted to take by itself, with margin."""
    took_s: float | None = None
    """How long its prefill ran, if it ran by itself and to its end."""
    computed_s: float | None = None
    """When its prefill was over."""
    first_token_s: float | None = None
    """When its first token was where the client is answered from: the KV cache has reached the decode server, or, on a
    server that decodes, the prefill was over."""
    overrun_s: float = 0.0
    """By how much its own prefill, and those that ran between ``ready_s`` and ``computed_s``, together took longer than
    they were predicted to."""
    ended_s: float | None = None
    """When it was aborted or has failed."""
    failed: bool = False
    """Whether this end was a failure."""
    invalid: bool = False
    """Whether the failure is put down to the client (``is_clients_mistake``)."""


def is_clients_mistake(http_status: int | None) -> bool:
    """Whether a request that was refused with this status was not valid: 4xx, but for 429, of which too much to do is
    the reason.
    """
    return http_status is not None and 400 <= http_status < 500 and http_status != HTTPStatus.TOO_MANY_REQUESTS


class Verdict(NamedTuple):
    """Whether a request met its objective, and why not."""

    met: bool | None
    """None for one that is under way and not late yet, that was aborted before it was due, or that was not valid."""
    cause: Cause | None = None
    """None for a request that met its objective or is under way."""


def judge(course: Course, now_s: float) -> Verdict:
    """What there is to say about a request at ``now_s``, such as the end of a log."""
    if course.invalid:
        return Verdict(None, Cause.INVALID)
    if course.first_token_s is not None and course.first_token_s <= course.deadline_s:
        return Verdict(met=True)
    if course.ended_s is not None and course.ended_s <= course.deadline_s:
        return Verdict(False, Cause.FAILED) if course.failed else Verdict(None, Cause.ABORTED)
    if course.first_token_s is None and course.ended_s is None and now_s <= course.deadline_s:
        return Verdict(met=None)
    return Verdict(False, _cause(course))


def _cause(course: Course) -> Cause:
    """What a request whose deadline has passed was late for."""
    deadline_s, predicted_s = course.deadline_s, course.alone_s or 0.0
    needs_s = predicted_s if course.took_s is None else min(predicted_s, course.took_s)
    if course.received_s + needs_s > deadline_s:
        return Cause.OBJECTIVE
    if course.arrived_s + needs_s > deadline_s:
        return Cause.LATE_ON_ARRIVAL
    if course.ready_s is None or course.ready_s + needs_s > deadline_s:
        return Cause.NOT_READY
    if course.computed_s is None:
        return Cause.OVERLOAD
    if course.computed_s <= deadline_s:
        return Cause.TRANSFER
    given_up = course.ready_s + predicted_s > deadline_s
    overran = course.computed_s - course.overrun_s <= deadline_s
    return Cause.MISPREDICTION if given_up or overran else Cause.OVERLOAD
