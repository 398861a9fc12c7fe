"""What a prefill server knows of a request when its prefill has run, in the few integers that go to the decode server
with its KV cache (``patches/carried_report.py``).

Times are durations: each server has a clock of its own.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Final

from msgspec import Struct

from sgl_flowprefill.misses import Cause

FORMAT: Final = 0x4650_0002
"""The first word: "FP", and a number for what the others mean. Whoever changes that raises it: what has another number
counts for nothing."""
CAUSES: Final = (
    Cause.OBJECTIVE,
    Cause.LATE_ON_ARRIVAL,
    Cause.NOT_READY,
    Cause.TRANSFER,
    Cause.MISPREDICTION,
    Cause.OVERLOAD,
)
"""Why a request whose prefill has run can have missed its objective. Their order is part of the format."""
TIMES: Final = ("ttft_slo_s", "predicted_s", "slack_at_admission_s", "waited_s", "suspended_s", "blocked_s")
"""Fields of ``Carried`` that are seconds, in the order of the format."""
_FIELDS: Final = struct.Struct("<2i6fI")
_WORDS: Final = struct.Struct("<9i")
WORDS: Final = _WORDS.size // 4
"""How many signed 32-bit integers there are."""
_ROOM_BITS: Final = 0x7FFF_FFFF
"""What is compared of a bootstrap room."""
_CAUSE_BITS: Final = 8
"""Those of the last word that are the cause; the others are the suspensions."""
MOST_SUSPENSIONS: Final = (1 << 32 - _CAUSE_BITS) - 1
"""More count as so many."""


class Carried(Struct, frozen=True, kw_only=True):
    """What the decode server is told. Times are seconds, to seven digits; None for what is not known."""

    cause_if_late: Cause
    """Why the request misses its objective, if it does."""
    ttft_slo_s: float | None
    """That objective, as the prefill server had it."""
    predicted_s: float | None
    slack_at_admission_s: float | None
    waited_s: float | None
    suspended_s: float | None
    blocked_s: float | None
    suspensions: int


def encode(carried: Carried, room: int) -> tuple[int, ...]:
    """The ``WORDS`` words of the request with this bootstrap ``room``."""
    known_s: list[float | None] = [getattr(carried, name) for name in TIMES]
    times_s = (math.nan if time_s is None else time_s for time_s in known_s)
    suspensions = min(carried.suspensions, MOST_SUSPENSIONS)
    last = suspensions << _CAUSE_BITS | CAUSES.index(carried.cause_if_late)
    return _WORDS.unpack(_FIELDS.pack(FORMAT, room & _ROOM_BITS, *times_s, last))


def decode(words: Sequence[int], room: int) -> Carried | None:
    """What ``words`` say of the request with this bootstrap ``room``; None if ``encode`` has not written them of it."""
    form, of_room, *times_s, last = _FIELDS.unpack(_WORDS.pack(*words))
    suspensions, cause = divmod(last, 1 << _CAUSE_BITS)
    if (form, of_room) != (FORMAT, room & _ROOM_BITS) or cause >= len(CAUSES):
        return None
    known_s = {name: time_s if math.isfinite(time_s) else None for name, time_s in zip(TIMES, times_s, strict=True)}
    return Carried(cause_if_late=CAUSES[cause], suspensions=suspensions, **known_s)
