"""A forward pass that raises: whether its task alone is to blame, and where it was, on which ranks have to agree."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import distributed as dist

DEVICE_ERRORS: Final = ("CUDA error", "CUDA driver error", "device-side assert", "NCCL error", "cuDNN error")
"""In the messages of errors after which a CUDA context or a communicator may be unusable."""


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


def ends_server(error: Exception) -> bool:
    """Whether ``error`` says more about the process than about one prefill: nothing that runs after it can be trusted.

    Out of memory is not of that kind: PyTorch has raised it before a kernel was queued.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, (torch.AcceleratorError, dist.DistError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERRORS)
