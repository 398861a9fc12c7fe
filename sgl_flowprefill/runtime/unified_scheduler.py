"""UnifiedScheduler: SGLang's scheduler on a server that prefills and decodes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from http import HTTPStatus
from itertools import chain
from typing import Any, Final

import torch
from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.managers.schedule_batch import FINISH_ABORT
from sglang.srt.managers.scheduler import NextBatchPlan

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.contract import require
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.runtime.hub_scheduler import HubScheduler
from sgl_flowprefill.runtime.joint_unified import JointUnifiedRole
from sgl_flowprefill.runtime.setup import build
from sgl_flowprefill.runtime.unified_role import InFlight, ReservingAdder, UnifiedRole

BEAMS: Final = (
    "FlowPrefill cannot run beam search: its beams take rows that started prefills have been promised. Leave "
    "beam_width out, or set it to 1."
)


class UnifiedScheduler(HubScheduler):
    """The scheduler of a server without disaggregation: takes the place of SGLang's there."""

    role: UnifiedRole
    running_batch: Any
    last_batch: Any
    batch_result_processor: Any
    load_inquirer: Any

    def build_hub(self, config: FlowPrefillConfig) -> Hub[UnifiedRole]:
        role: type[UnifiedRole] = UnifiedRole
        if self.attn_dp_enabled:
            require("data_parallel")
            role = JointUnifiedRole
        return build(self, config, role.make, decodes=True)

    @torch.no_grad()
    def event_loop_normal(self) -> None:
        self.hub.serve()

    def event_loop_overlap(self) -> None:
        raise RuntimeError("FlowPrefill needs --disable-overlap-schedule.")

    # ---- requests that come and go --------------------------------------------------------------------------------

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        """A request that was refused ends here, as on a prefill server: SGLang would prefill a token first."""
        if req.beam_group is not None:
            req.to_finish = FINISH_ABORT(BEAMS, HTTPStatus.BAD_REQUEST, "BadRequestError")
        self.refuse_what_never_fits(req)
        if is_aborted(req) and not is_retracted:
            self.role.note_arrival(req)
            self.retire_unadmitted_request(req)
            return
        super()._add_request_to_queue(req, is_retracted)
        if self.waiting_queue and self.waiting_queue[-1] is req:  # SGLang may have refused it
            self.role.note_queued(req)

    def pause_generation(self, recv_req: Any) -> None:
        """Requests that were about to join the running batch are retracted with it, where that is asked for."""
        self.finish_started()
        self.last_batch = self.role.join()
        super().pause_generation(recv_req)
        if self.last_batch is not None:  # a pause in place leaves all where it is
            self.role.joining.append(self.last_batch)
            self.last_batch = None
        self.role.note_paused()

    # ---- admission: the hub's alone -------------------------------------------------------------------------------

    def get_new_batch_prefill(self, running_batch: Any) -> NextBatchPlan:
        """A decode step finds no prefill."""
        if not self.role.is_admitting:
            return NextBatchPlan(batch_to_run=None, running_batch=running_batch)
        return super().get_new_batch_prefill(running_batch)

    def get_prefill_adder_class(self) -> Any:
        """SGLang's hook for its admission, which knows of the running batch alone."""
        return partial(ReservingAdder, others=self.in_flight_reqs())

    def get_num_allocatable_reqs(self, running_bs: int, *args: Any, **kwargs: Any) -> int:
        """All that run or will run with the running batch count, and not these alone."""
        others = len(self.in_flight_reqs())
        return int(super().get_num_allocatable_reqs(running_bs + others, *args, **kwargs))

    # ---- what SGLang asks a scheduler -----------------------------------------------------------------------------

    def init_batch_result_processor(self) -> None:
        """A step that was queued behind another has computed a token for streams that ended with the tokens of that
        one, too: SGLang passes over these, as in its overlap schedule.
        """
        super().init_batch_result_processor()
        self.batch_result_processor = replace(self.batch_result_processor, enable_overlap=True)

    def init_invariant_checker(self) -> None:
        """SGLang's checks take the requests of the last batch into account: here, all that are in flight."""
        super().init_invariant_checker()
        self.invariant_checker.get_last_batch = lambda: InFlight(self.in_flight_reqs())

    def init_load_inquirer(self) -> None:
        """Prefills that have started count as running requests."""
        super().init_load_inquirer()
        running = lambda: InFlight([*self.running_batch.reqs, *self.in_flight_reqs()])  # noqa: E731
        self.load_inquirer = replace(self.load_inquirer, get_running_batch=running)

    def in_flight_reqs(self) -> list[Any]:
        """Requests of the prefills that have been started."""
        return list(chain.from_iterable(batch.reqs for batch in self._in_flight()))

    def get_internal_state(self, recv_req: Any) -> Any:
        output = super().get_internal_state(recv_req)
        output.internal_state["flowprefill_decode"] = self.role.state()
        return output
