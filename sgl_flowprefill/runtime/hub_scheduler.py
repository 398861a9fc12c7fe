"""HubScheduler: SGLang's scheduler with the hub's loop, as far as prefill servers and unified servers are alike."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import Any, Final

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.managers import io_struct
from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.compat import WithStorage, incompatible_option, risks
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.contract import SeamError, expect
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.live.ask import KEY, MOST_EVENTS, Ask
from sgl_flowprefill.live.state import Answer, encode_answer
from sgl_flowprefill.runtime.event_recorder import RecordedStreamer
from sgl_flowprefill.runtime.experts import keep_whole_passes, uncounted
from sgl_flowprefill.runtime.memory import EmptyPool, sliding_window_limit
from sgl_flowprefill.runtime.setup import end_server
from sgl_flowprefill.shadow import Shadows

logger = logging.getLogger(__name__)

CHANGES_WEIGHTS: Final = (
    io_struct.BeginWeightUpdateReqInput,
    io_struct.CheckWeightsReqInput,
    io_struct.EndWeightUpdateReqInput,
    io_struct.ReleaseMemoryOccupationReqInput,
    io_struct.ResumeMemoryOccupationReqInput,
    io_struct.RpcReqInput,
    io_struct.UpdateWeightFromDiskReqInput,
    io_struct.UpdateWeightsFromDistributedReqInput,
    io_struct.UpdateWeightsFromIPCReqInput,
    io_struct.UpdateWeightsFromTensorReqInput,
)
"""Messages that may put other weights or none where a prefill reads them (a check may overwrite them, a remote call may
do anything). Others that do are refused with what they belong to (``compat``)."""
NEVER_FITS: Final = (
    "The KV cache of this server never has room for this request: its prompt has {prompt_tokens} tokens, its answer "
    "may have {answer_tokens}, and there is room for {pool_tokens} tokens in pages of {page_tokens}, of which some "
    "stay free. Shorten the prompt or lower max_tokens; a server holds more with a higher --mem-fraction-static or "
    "--max-total-tokens."
)
ASKS_FOR_WHOLE_PASSES: Final = (*CHANGES_WEIGHTS, io_struct.ExpertDistributionReq)
"""Messages before which started tasks run to their ends. The last one begins, ends or writes a record of experts, which
is of whole forward passes."""


class HubScheduler(Scheduler):
    """SGLang's scheduler, whose event loop is the hub's and whose overrides hand on to the role."""

    waiting_queue: list[Any]
    max_running_requests: int
    max_req_input_len: int
    token_to_kv_pool_allocator: Any
    tree_cache: Any
    max_total_num_tokens: int
    empty_pool: EmptyPool
    hub: Hub[Any]
    shadows: Shadows | None = None
    """What would have become of shed requests, on a server that sheds."""
    role: Any = None
    """The hub's, and there before it. None while SGLang makes its own scheduler, and asks some of what is below."""

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        refusal = incompatible_option(resolving_view(server_args))
        if refusal is not None:  # of a server that was started past patches.options
            end_server(SystemExit(f"sgl-flowprefill: {refusal}"))
        super().__init__(server_args, *args, **kwargs)
        # SGLang refuses prompts of so many tokens, and tells its tokenizer process.
        limit = sliding_window_limit(self.token_to_kv_pool_allocator)
        self.max_req_input_len = int(min(self.max_req_input_len, limit))
        self.empty_pool = EmptyPool.of(self.token_to_kv_pool_allocator)
        try:
            # The environment of another node may differ.
            keep_whole_passes()
            with uncounted():
                self.hub = self.build_hub(self.tp_group.broadcast_object(FlowPrefillConfig.from_env()))
        except SystemExit as impossible:
            end_server(impossible)
        feed_watchdogs(self)

    def init_schedule_policy(self) -> None:
        """The requests of a batch keep the hub's order; SGLang's policy would sort them by priority."""
        super().init_schedule_policy()
        self.policy.enable_priority_scheduling = False

    @abstractmethod
    def build_hub(self, config: FlowPrefillConfig) -> Hub[Any]:
        """Raises SystemExit with one line for what cannot be served."""

    # ---- requests that come and go --------------------------------------------------------------------------------

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """A request whose grammar is not compiled yet will come with an event of its own. Before the weights change,
        and before a record of experts begins or ends, started tasks run to their end.
        """
        if any(isinstance(message, ASKS_FOR_WHOLE_PASSES) for message in recv_reqs):
            self.finish_started()
        compiling = len(self.grammar_manager.grammar_queue)
        super().process_input_requests(recv_reqs)
        self.role.note_compiling(self.grammar_manager.grammar_queue[compiling:])

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        self.refuse_what_never_fits(req)
        self.role.note_arrival(req)
        super()._add_request_to_queue(req, is_retracted)

    def refuse_what_never_fits(self, req: Any) -> None:
        """``req``, which arrives, ends with an error if it would wait for ever, and others behind it."""
        if is_aborted(req) or req.is_retracted:
            return
        is_fixed = req.sampling_params.ignore_eos and getattr(self.tree_cache, "disable", True)
        if not self.empty_pool.takes(req.seqlen, self.role.answer_tokens(req), is_fixed):
            req.set_finish_with_abort(self.never_fits(req))

    def never_fits(self, req: Any) -> str:
        """What the client of ``req`` is told, for which there is no room on an empty server."""
        return NEVER_FITS.format(
            prompt_tokens=req.seqlen,
            answer_tokens=self.role.answer_tokens(req),
            pool_tokens=self.max_total_num_tokens,
            page_tokens=self.empty_pool.page_tokens,
        )

    def abort_request(self, recv_req: Any) -> None:
        self.role.note_abort(recv_req.rid, recv_req.abort_all)
        super().abort_request(recv_req)

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        """SGLang's other way to end a request, past the output streamer."""
        super().send_abort_output(abort_req, req)
        self.role.note_refusal(req, abort_req.finished_reason)

    def pause_generation(self, recv_req: Any) -> None:
        """Started tasks run to their end first: a pause may be there to change the weights under them."""
        self.finish_started()
        super().pause_generation(recv_req)

    def finish_started(self) -> None:
        """Run all started tasks to their ends, and move experts then, if they are to."""
        self.hub.finish_started()
        self.role.rebalancing.move()

    # ---- prefixes in storage --------------------------------------------------------------------------------------

    def attach_hicache_storage_wrapped(self, recv_req: Any) -> Any:
        """A storage that comes to a running server is one to listen to, if the server could have started with it."""
        asked: io_struct.AttachHiCacheStorageReqInput = recv_req
        options = WithStorage(resolving_view(self.server_args), asked.hicache_storage_backend)
        refusal = incompatible_option(options)
        if refusal is not None:
            return io_struct.AttachHiCacheStorageReqOutput(success=False, message=refusal)
        try:
            expect("storage")
        except SeamError as error:
            return io_struct.AttachHiCacheStorageReqOutput(success=False, message=str(error))
        attached = super().attach_hicache_storage_wrapped(recv_req)
        if attached.success:
            for risk in risks(options):
                logger.warning("FlowPrefill: %s", risk)
            self.role.reads.listen()
        return attached

    def _process_storage_prefetch_retries(self) -> None:
        """Of the requests that the hub knows: the others wait for storage already, or for something else. Some may have
        left since the last look, and are not counted.
        """
        waiting_queue, self.waiting_queue = self.waiting_queue, list(iter(self.role.own_waiting()))
        super()._process_storage_prefetch_retries()
        self.waiting_queue = waiting_queue

    def _retry_storage_prefetch(self, req: Any, storage_hit_end: int | None = None) -> None:
        super()._retry_storage_prefetch(req, storage_hit_end)
        self.role.reads.begun_again(req)

    # ---- what SGLang asks a scheduler -----------------------------------------------------------------------------

    def get_output_streamer_class(self) -> type[RecordedStreamer]:
        """SGLang's hook for what its scheduler hands answers to."""
        return RecordedStreamer

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        """A step may be in flight, too, whose streams have all ended."""
        in_flight = self._in_flight() or (self.role is not None and self.role.tasks.step is not None)
        return super().is_fully_idle(*args, **kwargs) and not in_flight

    def _collect_inflight_batches(self) -> list[Any]:
        return [*super()._collect_inflight_batches(), *self._in_flight()]

    def _in_flight(self) -> list[Any]:
        """The batches that SGLang's own scheduler would not know of."""
        return [] if self.role is None else list(self.role.in_flight())

    def get_internal_state(self, recv_req: Any) -> Any:
        """What ``/server_info`` shows, with the state of the TTFT model and of exploration; or, to those who watch,
        what they ask for and nothing else.
        """
        ask = Ask.from_rid(recv_req.rid)
        if ask is not None:
            return io_struct.GetInternalStateReqOutput(internal_state={KEY: encode_answer(self._answer(ask))})
        output = super().get_internal_state(recv_req)
        output.internal_state["flowprefill_ttft"] = self.hub.work.ttft.state()
        output.internal_state["flowprefill_exploration"] = self.hub.exploration.state()
        if self.shadows is not None:
            output.internal_state["flowprefill_overload"] = self.shadows.state()
        return output

    def _answer(self, ask: Ask) -> Answer:
        """What has happened since the last answer and is kept, and what runs and waits now."""
        hub, recent = self.hub, self.role.recorder.recent
        now_s = hub.now_s()
        state = self.role.snapshot(hub.work, now_s, hub.kv_is_short) if ask.with_state and recent is not None else None
        if recent is None:  # a rank that does not decide, whose answer nobody reads, or a server that keeps no events
            return Answer(now_s, 0, 0, 0, b"", state)
        first, following, lines = recent.since(ask.since, MOST_EVENTS)
        return Answer(now_s, first, following, recent.written, lines, state, recent.head)


def feed_watchdogs(scheduler: Any) -> None:
    """SGLang's watchdogs look for forward passes that begin; here, one that gets on is a sign of life too."""
    for watchdog in (scheduler.watchdog, getattr(scheduler, "soft_watchdog", None)):
        if watchdog is not None:
            watchdog.get_counter = lambda: scheduler.forward_ct + scheduler.hub.executor.points_passed
