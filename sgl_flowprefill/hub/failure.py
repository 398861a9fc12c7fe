"""A forward pass that raised: what its requests are told, and the place of the error, on which all ranks must agree."""

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
