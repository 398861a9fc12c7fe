"""The role of a prefill server by itself, with as much of SGLang's scheduler as a test gives it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from sglang.srt.constrained.grammar_manager import GrammarManager

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import CpuDevice
from sgl_flowprefill.hub.parts import OneRank
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.wakeup import Wakeup


def with_role(**attributes: Any) -> Any:
    """A scheduler of which only its role and ``attributes`` are there."""
    scheduler: Any = FlowPrefillScheduler.__new__(FlowPrefillScheduler)
    scheduler.__dict__.update({"enable_hierarchical_cache": False} | attributes)
    slo_s = FlowPrefillConfig().default_ttft_slo
    agreement = OneRank(lambda: False)
    scheduler.role = PrefillRole(scheduler, slo_s, Tasks(), Wakeup(), CpuDevice(), agreement, EventRecorder(None))
    return scheduler


class Grammars(GrammarManager):
    """SGLang's queue of requests whose grammars are compiled, without a backend."""

    def __init__(self) -> None:
        self.grammar_queue = []
        self.grammar_backend = SimpleNamespace(set_cache=lambda key, grammar: None)
        self.pp_rank, self.pp_size, self.grammar_sync_size = 0, 1, 1
        self.SGLANG_GRAMMAR_POLL_INTERVAL = 0.005
        self.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS = 10_000

    def request(self, received_s: float | None = None) -> Any:
        stats = SimpleNamespace(flowprefill_received_s=time.monotonic() if received_s is None else received_s)
        req = SimpleNamespace(grammar=Future(), grammar_key=("regex", ""), grammar_wait_ct=0, time_stats=stats)
        req.finished, req.failures = lambda: False, []
        req.set_finish_with_abort = req.failures.append
        return req
