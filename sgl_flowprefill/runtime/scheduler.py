"""FlowPrefillScheduler: SGLang's scheduler on a prefill server."""

from __future__ import annotations

from typing import Any, Final

import torch

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.contract import require
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.patches import carried_report, wakeups
from sgl_flowprefill.runtime.data_parallel import DataParallelRole
from sgl_flowprefill.runtime.hub_scheduler import HubScheduler
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.setup import build

OUTSTANDING_REQUESTS: Final = 8192
"""Requests that may wait, run and be sent at a time, at least. Each holds a metadata buffer from the end of its
bootstrap on, and one that finds none is not seen by the policy."""


class FlowPrefillScheduler(HubScheduler):
    """The scheduler of a prefill server: takes the place of ``sglang.srt.managers.scheduler.Scheduler`` there."""

    role: PrefillRole

    def build_hub(self, config: FlowPrefillConfig) -> Hub[PrefillRole]:
        wakeups.expect_applied()
        role: type[PrefillRole] = PrefillRole
        if self.draft_worker is not None:
            require("draft_model")
        if self.attn_dp_enabled:
            require("data_parallel")
            role = DataParallelRole
        hub = build(self, config, role.make)
        wakeups.subscribe(hub.role.note_transfer_status)
        return hub

    @torch.no_grad()
    def event_loop_normal_disagg_prefill(self) -> None:
        self.hub.serve()

    def event_loop_overlap_disagg_prefill(self) -> None:
        raise RuntimeError("FlowPrefill needs --disable-overlap-schedule on the prefill server.")

    # ---- KV that is sent ------------------------------------------------------------------------------------------

    def checkpoint_disagg_prefill(self, req: Any) -> None:
        with self.role.noticing_new_indices(req):
            super().checkpoint_disagg_prefill(req)

    def send_kv_chunk(self, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
        with self.role.reading_indices(req, has_run=last_chunk):
            reports = self.output_streamer.reports
            if last_chunk and reports is not None:
                carried_report.write(self.disagg_metadata_buffers, req, reports.to_carry(req))
            super().send_kv_chunk(req, last_chunk, end_idx)

    def init_disaggregation(self) -> None:
        """SGLang makes metadata buffers for twice the requests that may run at a time. A buffer takes a few kilobytes,
        and a request that may run a row as long as the context.
        """
        may_run: int = self.max_running_requests
        self.max_running_requests = max(may_run, OUTSTANDING_REQUESTS // 2)
        super().init_disaggregation()
        self.max_running_requests = may_run
