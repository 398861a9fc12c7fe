"""Forward passes that raised: what requests are told, where it was, on which ranks must agree, and what runs again."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Failure:
    """An exception in the forward pass of one task, without the exception itself, whose frames hold tensors."""

    kind: str
    """The exception's type."""
    place: int
    """Where it was raised, as a positive number of 62 bits: the same at two ranks that failed at the same operator."""
    id: str
    """What clients are told and the log has."""
    traceback: str

    @classmethod
    def of(cls, error: Exception, points_passed: int, rids: Sequence[str]) -> Failure:
        """``points_passed``: interruption points that the task had passed. ``rids``: its requests."""
        kind = type(error).__name__
        frames = traceback.walk_tb(error.__traceback__)
        steps = [f"{frame.f_code.co_qualname}:{line}" for frame, line in frames]
        where = repr((kind, points_passed, steps)).encode()
        place = int.from_bytes(hashlib.blake2b(where, digest_size=8).digest()) >> 2
        identifier = hashlib.blake2b(repr((place, *rids)).encode(), digest_size=6).hexdigest()
        return cls(kind, place or 1, identifier, "".join(traceback.format_exception(error)).rstrip())

    @property
    def message(self) -> str:
        """The answer to the requests."""
        return f"the prefill of this request failed ({self.kind}); the log of the prefill server has error {self.id}"


class StepOutOfMemory(Exception):
    """The device has no memory for a decode step. Nothing of it has been kept, and it can run again as it is."""

    def __init__(self, failure: Failure, streams: int) -> None:
        super().__init__(
            f"the device has no memory for a decode step of {streams} requests, and no prefill is suspended that could "
            "give its own back: lower --mem-fraction-static or --max-running-requests"
        )
        self.failure = failure
        self.streams = streams
