"""SGLang's scheduler as a server that prefills and decodes: prefills become streams, which get their tokens in steps.

A stream is a request whose prefill has run. The requests of a batch whose prefill has run are *joining* until the next
step, in which SGLang's own code merges them into its running batch: between two steps, nothing touches that.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from sglang.srt.environ import envs
from sglang.srt.managers.schedule_batch import release_req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.common import release_kv_cache

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import received_s, sent_s, slo_s, tbt_slo_s
from sgl_flowprefill.hub.role import Arrival
from sgl_flowprefill.hub.task import PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.policy import ColocatedPolicy, Stream
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole, fail_unless_aborted, input_logprobs


@dataclass
class InFlight:
    """Requests that hold KV cache and are not in SGLang's running batch, as SGLang's checks read a batch."""

    reqs: list[Any]


@dataclass(eq=False)
class UnifiedRole(SchedulerRole):
    """What the hub asks of a server that prefills and decodes."""

    default_tbt_slo_s: float = 0.1
    policy: ColocatedPolicy[WaitingRequest, PrefillTask] = field(init=False)
    """Set when it is made: it knows how long steps take, which is measured with this role."""
    joining: list[Any] = field(default_factory=list, init=False)
    """Batches whose prefills have run, of which at least one request has not ended, in that order."""
    is_admitting: bool = field(default=False, init=False)
    """Whether a batch is being made for the hub: nobody else may start a prefill."""
    steps: int = field(default=0, init=False)
    """Decode steps so far."""
    step_s: float = field(default=0.0, init=False)
    """Time in them."""
    retractions: int = field(default=0, init=False)
    """Streams that lost their KV cache to others so far."""
    given_back: int = field(default=0, init=False)
    """Tasks that gave theirs back so far."""
    streams: dict[Any, Stream] = field(default_factory=dict, init=False)
    """What the policy knows of each request that is a stream."""
    come: list[Any] = field(default_factory=list, init=False)
    """Requests in SGLang's waiting queue that the hub has not been told of."""
    held_back: list[Any] = field(default_factory=list, init=False)
    """Requests in SGLang's waiting queue whose tasks were given back: they come again when KV cache has been freed by
    something else.
    """
    _has_freed: bool = field(default=False, init=False)
    """Whether KV cache has been freed since the last look."""

    @classmethod
    def make(cls, config: FlowPrefillConfig, scheduler: Any, *parts: Any) -> Self:
        role = super().make(config, scheduler, *parts)
        role.default_tbt_slo_s = config.default_tbt_slo
        return role

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        """Messages. KV cache is freed by what happens between two looks."""
        if envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            self.scheduler.invariant_checker.self_check_during_busy()
        self.take_messages()
        if stalls_due:
            self.recorder.close_lost(self.held())
        has_freed, self._has_freed = self._has_freed, False
        return has_freed

    def arrived(self) -> Iterator[Arrival]:
        if self.held_back and not (self.tasks.live or self.tasks.finishing or self.streams):
            self._freed()  # nobody is left who could free some
        if not self.come:
            return
        come, self.come = self.come, []
        waiting = set(self.scheduler.waiting_queue)
        for req in come:
            if req in waiting:  # not aborted meanwhile
                yield self._arrival(req)

    def _arrival(self, req: Any) -> Arrival:
        """A request that was a stream before has part of its answer, and is due one objective from now on: its old
        deadline would make it hopeless.
        """
        is_retracted = len(req.output_ids) > 0
        come_s = received_s(req)
        since_s = time.monotonic() if is_retracted else come_s
        return Arrival(
            req=req,
            shape=self.match(req),
            prompt=array("q", [*req.origin_input_ids, *req.output_ids]) if is_retracted else req.origin_input_ids,
            received_s=since_s,
            deadline_s=since_s + slo_s(req, self.default_slo_s),
            readable_s=since_s if is_retracted else sent_s(req) or come_s,
            logprob_rows=input_logprobs(req),
            retracted=is_retracted,
        )

    def waiting(self) -> Collection[Any]:
        queue = super().waiting()
        if not self.come and not self.held_back:
            return queue
        untold = {*self.come, *self.held_back}
        return [req for req in queue if req not in untold]

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        self.is_admitting = True
        try:
            return super().make_batch(reqs)
        finally:
            self.is_admitting = False

    def finish(self, task: PrefillTask) -> None:
        """The first tokens; requests that have not ended with these are streams from now on."""
        scheduler, batch = self.scheduler, task.batch
        # SGLang counts as prefill time what has passed since the launch: here, steps and other prefills among it.
        batch.launch_ts = time.monotonic() - task.executed_s
        scheduler._prev_prefill_end_ts = None
        super().finish(task)
        members = len(batch.reqs)
        batch.filter_batch()
        if not batch.is_empty():
            now_s = time.monotonic()
            self.joining.append(batch)
            joined = {req: Stream(tbt_slo_s(req, self.default_tbt_slo_s), req.seqlen, now_s) for req in batch.reqs}
            self.streams |= joined
            self.policy.joined(joined.values())
        if len(batch.reqs) < members:
            self._freed()

    def drop(self, task: PrefillTask) -> None:
        fail_unless_aborted(task.batch.reqs, task.failure)
        self._end(task.batch.reqs)
        self.scheduler._maybe_clear_mm_inputs(task.batch)
        self._freed()

    # ---- decode steps -----------------------------------------------------------------------------------------------

    def step(self) -> None:
        scheduler, begin_s = self.scheduler, time.monotonic()
        plan = scheduler.get_next_batch_to_run(scheduler.running_batch, self.join())
        running_batch = scheduler.running_batch = plan.running_batch
        batch = plan.batch_to_run
        if batch is not None:
            scheduler.cur_batch_for_debug = batch
            result = scheduler.run_batch(batch)
            # SGLang learns what decoding costs from launch to launch of steps between which nothing else ran.
            batch.after_idle_gap = batch.after_idle_gap or bool(self.tasks.live)
            scheduler.process_batch_result(batch, result)
            running_batch.filter_batch()
        going_on = set(running_batch.reqs)
        ended = [self.streams.pop(req) for req in list(self.streams) if req not in going_on]
        if batch is None:
            self.policy.left(ended)
        else:
            end_s, load = time.monotonic(), self.policy.load
            self.recorder.stepped(self.policy.streams.requests, begin_s, end_s, load.start_by_s)
            self.policy.stepped(begin_s, end_s, ended)
            self.steps += 1
            self.step_s += end_s - begin_s
        if ended:
            self._freed()

    def join(self) -> Any | None:
        """The joining batches as one, for SGLang to merge into its running batch."""
        joined, self.joining = self.joining, []
        for batch in joined[1:]:
            joined[0].merge_batch(batch)
        return joined[0] if joined else None

    def missing_tokens(self) -> int:
        allocator = self.scheduler.token_to_kv_pool_allocator
        batches = [batch for batch in (self.scheduler.running_batch, *self.joining) if not batch.is_empty()]
        needed_tokens: int = sum(batch.new_tokens_required_next_decode() for batch in batches)
        if allocator.check_decode_capacity(
            num_tokens=needed_tokens,
            tree_cache=self.scheduler.tree_cache,
            requests=[req for batch in batches for req in batch.reqs],
            spec_algorithm=self.scheduler.spec_algorithm,
        ):
            return 0
        return max(1, needed_tokens - int(allocator.available_size()))

    def give_back(self, task: PrefillTask) -> None:
        scheduler, reqs = self.scheduler, task.batch.reqs
        self._end([req for req in reqs if req.to_finish is not None])
        for req in reqs:
            if not req.finished():
                release_req(
                    req=req,
                    remaing_req_count=0,
                    req_to_token_pool=scheduler.req_to_token_pool,
                    token_to_kv_pool_allocator=scheduler.token_to_kv_pool_allocator,
                    tree_cache=scheduler.tree_cache,
                    hisparse_coordinator=None,
                    offload_kv=False,
                )
                # Not by _add_request_to_queue: a full queue would refuse what it had let in.
                scheduler.waiting_queue.append(req)
                req.time_stats.set_wait_queue_entry_time()
                self.held_back.append(req)
        self.given_back += 1

    # ---- what SGLang's scheduler tells ------------------------------------------------------------------------------

    def note_arrival(self, req: Any) -> None:
        """``req`` has come, or comes back: it was retracted."""
        if req in self.streams:
            self.retractions += 1
            self.policy.left([self.streams.pop(req)])
        if not req.is_retracted:
            super().note_arrival(req)

    def note_queued(self, req: Any) -> None:
        """``req`` is in SGLang's waiting queue."""
        self.come.append(req)

    # ---- what SGLang asks -------------------------------------------------------------------------------------------

    def in_flight(self) -> list[Any]:
        return [*super().in_flight(), *self.joining]

    def state(self) -> dict[str, float]:
        """What ``/server_info`` shows."""
        return {
            "steps": self.steps,
            "step_s": self.step_s,
            "streams": len(self.streams),
            "retractions": self.retractions,
            "given_back": self.given_back,
            "margin_s": self.policy.margin_s,
        }

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def _end(self, reqs: Sequence[Any]) -> None:
        """Answer ``reqs``, which are to end although their prefill has not run, and free what they hold. Their KV cache
        is not computed, so it must not become a cached prefix.
        """
        scheduler = self.scheduler
        for req in reqs:
            req.update_finish_state()
            scheduler._release_aborted_request(req)
            release_kv_cache(req, scheduler.tree_cache, checkpoint=False)
            req.time_stats.set_completion_time()
        if reqs:
            scheduler.output_streamer.stream_output(reqs, any(req.return_logprob for req in reqs))

    def _freed(self) -> None:
        """KV cache has been freed, and not by giving a task back."""
        self._has_freed = True
        self.come += self.held_back
        self.held_back.clear()


class ReservingAdder(PrefillAdder):
    """SGLang's admission, with KV cache reserved for the answers of ``others`` beside those of the running batch."""

    def __init__(self, *args: Any, others: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_budget.total_offset += sum(map(self._get_running_request_total_token_offset, others))
