"""The current CUDA stream as a device, and which device a server has."""

from __future__ import annotations

import ctypes
import time
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import torch

from sgl_flowprefill.hub.device import POLL_S, CpuDevice, Device, QueueDevice

PR_SET_TIMERSLACK: Final = 29
"""Of Linux (prctl.h)."""


@dataclass(frozen=True, slots=True)
class CudaStamp:
    """A timed event of its own: stamps are kept until their task is done."""

    event: torch.cuda.Event

    def query(self) -> bool:
        return bool(self.event.query())

    def seconds_until(self, later: CudaStamp) -> float:
        later.event.synchronize()  # it may be the next thing behind what told that its task is done
        return float(self.event.elapsed_time(later.event)) * 1e-3


class CudaDevice(QueueDevice):
    """The current CUDA stream.

    The host waits by asking and sleeping in turns, not in ``cudaEventSynchronize``, which no arrival can interrupt: a
    sleep lets go of the GIL, so that the transfer and bootstrap threads run, and what the hub should look at is seen
    ``POLL_S`` later at the latest.
    """

    def fetch(self, batch: Any, result: Any) -> None:
        # SGLang does this in its overlap mode only, and otherwise blocks in ``next_token_ids.tolist()``.
        if result.copy_done is None:
            result.copy_done = torch.cuda.Event()
            result.copy_to_cpu(return_logprob=batch.return_logprob, return_hidden_states=batch.return_hidden_states)
        self.record()

    def stamp(self) -> CudaStamp:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return CudaStamp(event)

    def beside_the_queue(self) -> AbstractContextManager[Any]:
        stream: AbstractContextManager[Any] = torch.cuda.stream(self._beside)
        return stream

    @cached_property
    def _beside(self) -> torch.cuda.Stream:
        # PyTorch hands out streams of one priority in turns, and may hand out that of the queue once more.
        return torch.cuda.Stream(priority=-1)

    def _new_event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def _pause(self) -> None:
        time.sleep(POLL_S)


def make_device(device_type: str, lookahead: int) -> Device:
    """The device that SGLang calls ``device_type``, for the thread that calls this to wait for."""
    if device_type != "cuda":
        return CpuDevice()
    sleep_no_longer()
    return CudaDevice(lookahead)


def sleep_no_longer() -> None:
    """Let sleeps of this thread, and of those that it starts from now on, end when they are to: Linux adds up to 50 us
    to each, to wake several threads at once. Elsewhere nothing changes.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
