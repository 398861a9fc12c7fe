"""Requests of a prefill server and of its decode server, which know the same one by its bootstrap room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Final, NamedTuple

import msgspec
from msgspec import UNSET

from sgl_flowprefill.events import Decoded
from sgl_flowprefill.timeline.history import DecodedRequest, History, Request

TIMES: Final = ("t_s", "received_s", "queued_s", "place_s", "kv_s", "first_token_s")
"""Fields of ``Decoded``."""


class Prefilled(NamedTuple):
    """A request at a prefill server."""

    request: Request
    boot: str
    """The machine of that server, as its log has it."""


def by_room(histories: Sequence[History]) -> dict[int, Prefilled]:
    """The requests of prefill servers, by their bootstrap rooms; of several with one room, the last. 0 is the room of
    the requests with which each server warms up by itself.
    """
    return {
        request.arrival.bootstrap_room: Prefilled(request, history.boot)
        for history in histories
        for request in history.requests
        if request.arrival.bootstrap_room
    }


def clock_behind_s(history: History, prefilled: Mapping[int, Prefilled]) -> float | None:
    """By how much the clock of a decode server, whose ``history`` it is, is behind that of its prefill servers, where
    all of these are on other machines: both see when a KV cache has come, and this is the median of what they say. 0 on
    one machine, and where it cannot be known; None where its prefill servers are on several, which have no one clock.
    """
    pairs = [
        (one.event, prefilled[one.event.bootstrap_room])
        for one in history.decoded
        if one.event.bootstrap_room is not None and one.event.bootstrap_room in prefilled
    ]
    boots = {pair.boot for _, pair in pairs}
    if len(boots - {""}) > 1:
        return None
    if not history.boot or boots & {"", history.boot}:
        return 0.0
    apart_s = [
        leave.t_s - event.kv_s
        for event, pair in pairs
        if (leave := pair.request.leave) is not None and leave.reason is UNSET and event.kv_s is not None
    ]
    return median(apart_s) if apart_s else 0.0


def later(request: DecodedRequest, by_s: float) -> DecodedRequest:
    """``request`` by a clock that shows ``by_s`` more."""
    times_s = {name: getattr(request.event, name) for name in TIMES}
    shown_s = {name: time_s + by_s for name, time_s in times_s.items() if time_s is not None}
    event: Decoded = msgspec.structs.replace(request.event, **shown_s)
    return DecodedRequest(event)
