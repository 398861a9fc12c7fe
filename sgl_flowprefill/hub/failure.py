"""A forward pass that raised: where it was, on which ranks have to agree, and what its requests are told."""

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
    def of(cls, error: Exception, points: int, rids: Sequence[str]) -> Failure:
        """``points``: interruption points that the task had passed. ``rids``: its requests."""
        kind = type(error).__name__
        frames = traceback.walk_tb(error.__traceback__)
        steps = [f"{frame.f_code.co_qualname}:{line}" for frame, line in frames]
        place = int.from_bytes(hashlib.blake2b(repr((kind, points, steps)).encode(), digest_size=8).digest()) >> 2
        identifier = hashlib.blake2b(repr((place, *rids)).encode(), digest_size=6).hexdigest()
        return cls(kind, place or 1, identifier, "".join(traceback.format_exception(error)).rstrip())

    @property
    def message(self) -> str:
        """The answer to the requests."""
        return f"the prefill of this request failed ({self.kind}); the log of the prefill server has error {self.id}"
