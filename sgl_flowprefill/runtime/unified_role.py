"""SGLang's scheduler as a server that prefills and decodes: prefills become streams, which get their tokens in steps.

A stream is a request whose prefill has run. The requests of a batch whose prefill has run are *joining* until the next
step, in which SGLang's own code merges them into its running batch: from the begin of a step until its result has been
processed, and between two steps, nothing else touches that. A step that is queued behind the one in flight prepares it
anew; each of the two has what its result is processed with in a copy.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from http import HTTPStatus
from itertools import chain
from typing import Any, Final

import torch
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_batch import release_req
from sglang.srt.managers.schedule_policy import PrefillAdder
from sglang.srt.mem_cache.common import release_kv_cache

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.deadline import objective, received_s, sent_s
from sgl_flowprefill.hub.device import QueueDevice, never
from sgl_flowprefill.hub.failure import Failure, StepOutOfMemory
from sgl_flowprefill.hub.role import Arrival, Decoder
from sgl_flowprefill.hub.task import DecodeStep, PrefillTask
from sgl_flowprefill.hub.waiting import WaitingRequest
from sgl_flowprefill.patches.overload import RETRY_AFTER
from sgl_flowprefill.policy import ColocatedPolicy, DecodeLimits, Policy, Stream
from sgl_flowprefill.profiling.steps import LearnedSteps
from sgl_flowprefill.runtime.adapters import LoRA
from sgl_flowprefill.runtime.ahead import most_streams, needs_last_tokens
from sgl_flowprefill.runtime.memory import writes_kv_alone
from sgl_flowprefill.runtime.scheduler_role import (
    SchedulerRole,
    Without,
    fail_unless_aborted,
    input_logprobs,
    noticed_s,
)
from sgl_flowprefill.runtime.step_profile import load_or_measure_steps

GIVEN_BACK: Final = "flowprefill_given_back"
"""Attribute of SGLang's Req: its number, if a prefill of it has begun, and was given back."""
LAST_TOKEN_S: Final = "flowprefill_last_token_s"
"""Attribute of SGLang's Req: when the last token came before it lost its KV cache as a stream."""
WITHOUT_MEMORY_STEPS: Final = 100
"""For how many steps a prefill does not start again that gave its memory back, unless there are fewer streams then. Not
for how long: clocks of several ranks differ.
"""
SHED: Final = "The server is overloaded: {why}. Try again after {retry_after_s} s."


@dataclass
class InFlight:
    """Requests that hold KV cache and are not in SGLang's running batch, as SGLang's checks read a batch."""

    reqs: list[Any]


@dataclass(eq=False)
class UnifiedRole(SchedulerRole):
    """What the hub asks of a server that prefills and decodes."""

    policy: ColocatedPolicy[WaitingRequest, PrefillTask] = field(init=False)
    """There from ``decide`` on: it knows how long steps take, which is measured with this role."""
    step_model: LearnedSteps = field(init=False)
    joining: list[Any] = field(default_factory=list, init=False)
    """Batches whose prefills have run, of which at least one request has not ended, in that order."""
    is_admitting: bool = field(default=False, init=False)
    """Whether a batch is being made for the hub: nobody else may start a prefill."""
    steps: int = field(default=0, init=False)
    """Decode steps so far."""
    step_s: float = field(default=0.0, init=False)
    """Time that they took."""
    retractions: int = field(default=0, init=False)
    """Streams that lost their KV cache to others so far."""
    given_back: int = field(default=0, init=False)
    """Tasks that gave theirs back so far."""
    streams: dict[Any, Stream] = field(default_factory=dict, init=False)
    """What the policy knows of each request that is a stream."""
    not_told: list[Any] = field(default_factory=list, init=False)
    """Requests in SGLang's waiting queue that the hub has not been told of."""
    held_back: list[Any] = field(default_factory=list, init=False)
    """Requests in SGLang's waiting queue whose tasks were given back: they come again when KV cache has been freed by
    something else.
    """
    kept_out: list[Any] = field(default_factory=list, init=False)
    """Requests in SGLang's waiting queue, unknown to the hub: their adapters find no slot beside those of streams, or
    this is one of several ranks and has no KV cache for them. They come again when there is some.
    """
    _to_run_again: Any | None = field(default=None, init=False)
    """The batch of a step that has begun, and for which the device had no memory."""
    _without_memory: tuple[int, int] = field(default=(0, 0), init=False)
    """How many streams that step had, and how many steps there were before."""
    _held_adapters: set[str | None] = field(default_factory=set, init=False)
    """Those of the streams, at the last look."""
    _has_freed: bool = field(default=False, init=False)
    """Whether KV cache has been freed since the last look."""

    # ---- what its hub is made of ------------------------------------------------------------------------------------

    def decide(
        self, prefills: Policy[WaitingRequest, PrefillTask], config: FlowPrefillConfig
    ) -> ColocatedPolicy[WaitingRequest, PrefillTask]:
        limits = DecodeLimits(max_share=config.max_decode_share)
        self.step_model = load_or_measure_steps(self, config.learning)
        self.policy = ColocatedPolicy(prefills, self.step_model, limits)
        return self.policy

    @property
    def decoder(self) -> Decoder:
        return self

    @property
    def steps_ahead(self) -> bool:
        """Not where a device keeps no queue, or has nothing queued behind what it runs, nor where a step changes more
        than KV cache: one that is computed for a stream that has ended changes what is cached of it then.
        """
        has_queue = isinstance(self.device, QueueDevice) and self.device.lookahead > 0
        return has_queue and writes_kv_alone(self.scheduler.tp_worker.model_runner)

    # ---- what the hub asks ----------------------------------------------------------------------------------------

    def take_news(self, stalls_due: bool) -> bool:
        """Messages. KV cache is freed by what happens between two looks."""
        if envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY.get():
            self.scheduler.invariant_checker.self_check_during_busy()
        if self.take_messages():
            self._freed()
        self._forget_ended()
        self.not_told = list(self.may_start(self.not_told))
        if stalls_due:
            self.recorder.close_lost(self.held())
        if isinstance(self.adapters, LoRA):
            self._keep_out(self.adapters)
        has_freed, self._has_freed = self._has_freed, False
        return has_freed

    def _keep_out(self, adapters: LoRA) -> None:
        """Streams may hold slots for long: requests that need one of these must not stand in the way of others."""
        held = {req.lora_id for req in self.streams}
        if held == self._held_adapters and not self.not_told and not self.kept_out:
            return
        self._held_adapters = held
        unknown, was_out = {*self.held_back, *self.reads.awaited}, set(self.kept_out)
        queue = [req for req in self.scheduler.waiting_queue if req not in unknown]
        out = adapters.kept_out(queue, self.streams)
        come_again = [req for req in queue if req not in out and req in was_out]
        self.not_told = [req for req in self.not_told if req not in out] + come_again
        self.kept_out = [req for req in queue if req in out]
        self.scheduler.hub.work.set_aside(self.kept_out, come_again)

    def arrived(self) -> Iterator[Arrival]:
        if self.held_back and not (self.streams or any(batch.reqs for batch in self.in_flight())):
            self._freed()  # nobody is left who could free some
        queued, self.not_told = self.not_told, []
        yield from map(self.as_arrival, queued)

    def as_arrival(self, req: Any) -> Arrival:
        """A request that was a stream before has part of its answer, and is due one objective from now on: its old
        deadline would make it infeasible. One that was given back is due when it was, and news now.
        """
        is_retracted, number = len(req.output_ids) > 0, getattr(req, GIVEN_BACK, None)
        arrived_s, promised, now_s = received_s(req), objective(req, self.resolver), time.monotonic()
        since_s = now_s if is_retracted else arrived_s
        return Arrival(
            req=req,
            shape=self.match(req),
            prompt=array("q", [*req.origin_input_ids, *req.output_ids]) if is_retracted else req.origin_input_ids,
            received_s=since_s,
            deadline_s=since_s + promised.ttft_s,
            readable_s=max(sent_s(req) or arrived_s, noticed_s(req)) if number is None and not is_retracted else now_s,
            logprob_rows=input_logprobs(req),
            retracted=is_retracted,
            objective=promised,
            number=number,
        )

    def waiting(self) -> Collection[Any]:
        unknown = {*self.not_told, *self.held_back, *self.kept_out, *self.reads.awaited}
        return Without(self.scheduler.waiting_queue, unknown)

    def make_batch(self, reqs: Sequence[Any]) -> Any | None:
        self.is_admitting = True
        try:
            return super().make_batch(reqs)
        finally:
            self.is_admitting = False

    def finish(self, task: PrefillTask) -> None:
        """The first tokens; requests that have not ended with these are streams from now on."""
        self.tell_policy(joined=self.new_streams(task))

    def new_streams(self, task: PrefillTask) -> list[Stream]:
        """The streams that ``task`` leaves, once its result has been processed."""
        scheduler, batch = self.scheduler, task.batch
        # SGLang counts as prefill time what has passed since the launch: here, steps and other prefills among it.
        batch.launch_ts = time.monotonic() - task.executed_s
        scheduler._prev_prefill_end_ts = None
        SchedulerRole.finish(self, task)
        batch.hicache_consumer_index = -1  # its load is over, and its decode steps would wait for those of others
        now_s = time.monotonic()
        self.note_gaps(
            [
                now_s - getattr(req, LAST_TOKEN_S) > objective(req, self.resolver).tbt_s
                for req in batch.reqs
                if hasattr(req, LAST_TOKEN_S)
            ]
        )
        members = len(batch.reqs)
        batch.filter_batch()
        if len(batch.reqs) < members:
            self._freed()
        if batch.is_empty():
            return []
        self.joining.append(batch)
        joined = {req: Stream(objective(req, self.resolver).tbt_s, req.seqlen, now_s) for req in batch.reqs}
        self.streams |= joined
        return list(joined.values())

    def note_gaps(self, late: Sequence[bool]) -> None:
        """Streams that were retracted have got their next tokens; whether each was ``late`` by its objective."""
        if late:
            self.recorder.got_tokens(len(late), sum(late))

    def tell_policy(self, joined: Sequence[Stream] = (), left: Sequence[Stream] = ()) -> None:
        """Streams have joined, or left outside a step."""
        if joined:
            self.policy.joined(joined)
        if left:
            self.policy.left(left)

    def note_paused(self) -> None:
        """SGLang has paused, and may have retracted streams."""
        self._freed()

    def drop(self, task: PrefillTask) -> None:
        fail_unless_aborted(task.batch.reqs, task.failure)
        self._end(task.batch.reqs)
        self.scheduler._maybe_clear_mm_inputs(task.batch)
        self._freed()

    def retire(self, req: Any) -> None:
        self.scheduler.retire_unadmitted_request(req)

    def answer_tokens(self, req: Any) -> int:
        return max(0, int(req.sampling_params.max_new_tokens) - len(req.output_ids))

    # ---- decode steps -----------------------------------------------------------------------------------------------

    def step(self) -> DecodeStep | None:
        begin, in_flight = self.device.stamp(), self.tasks.step
        batch, self._to_run_again = self._to_run_again, None
        if in_flight is not None and in_flight.batch is self.scheduler.running_batch:
            in_flight.batch = in_flight.batch.copy()  # as SGLang's overlap schedule keeps what it processes later
        if batch is None:
            batch = self._next_step()
        if batch is None:
            return None
        result = self._run(batch)
        self.device.fetch(batch, result)
        if result.logits_output is not None:  # a step ahead makes its own, and nobody reads these (as SGLang's overlap)
            result.logits_output.next_token_logits = None
        # SGLang learns what decoding costs from launch to launch of steps between which nothing else ran.
        batch.after_idle_gap = batch.after_idle_gap or bool(self.tasks.live)
        # Streams that end with the step in flight leave the running batch, and not this step.
        step_batch = batch if in_flight is None else batch.copy()
        return DecodeStep(result, step_batch, [(begin, self.device.stamp())])

    def can_step_ahead(self) -> bool:
        batches = [batch for batch in (self.scheduler.running_batch, *self.joining) if not batch.is_empty()]
        if any(map(needs_last_tokens, batches)) or sum(len(batch.reqs) for batch in batches) > self._most_streams:
            return False
        in_flight = self.scheduler.running_batch.reqs  # those that join are not in that step
        if self.scheduler.waiting_queue and any(req.next_output_finishes_by_length() for req in in_flight):
            return False  # what it makes room for starts before another step
        return bool(self.joining) or not all(req.next_output_finishes_by_length() for req in in_flight)

    @cached_property
    def _most_streams(self) -> float:
        return most_streams(self.scheduler.tp_worker.model_runner)

    def _next_step(self) -> Any | None:
        """The streams as a batch that is ready for its forward pass: a step has begun. None without any."""
        scheduler, begin_s = self.scheduler, time.monotonic()
        plan = scheduler.get_next_batch_to_run(scheduler.running_batch, self.join())
        scheduler.running_batch, batch = plan.running_batch, plan.batch_to_run
        self.tell_policy(left=self._take_ended() if batch is None else ())
        if batch is None:
            return None
        self.policy.began(begin_s)
        scheduler.cur_batch_for_debug = batch
        return batch

    def _run(self, batch: Any) -> Any:
        """The forward pass of a step, with its sampling. It can run again while its tokens have not been put where the
        next step finds them: what it reads is as it was, and what it wrote it writes again, into the same slots.
        """
        scheduler = self.scheduler
        try:
            with scheduler.hub.executor.restoring():
                return scheduler.run_batch(batch)
        except torch.OutOfMemoryError as error:
            # SGLang takes the input from the batch when the tokens are in their place, and before they are asked for.
            if batch.input_ids is None or not writes_kv_alone(scheduler.tp_worker.model_runner):
                raise
            failure = Failure.of(error, 0, [req.rid for req in batch.reqs])
            self._to_run_again, self._without_memory = batch, (len(batch.reqs), self.steps)
            scheduler._sched_idled = True  # the time from this launch to the next says nothing
            # The next plan of its attention overwrites host buffers that queued copies may still read.
            self.device.wait(self.device.stamp(), never)
            raise StepOutOfMemory(failure, len(batch.reqs)) from error

    def finish_step(self, step: DecodeStep) -> None:
        arrived_s, begun = time.monotonic(), self.policy.step
        assert begun is not None, "a step that ends has begun"
        self.scheduler.process_batch_result(step.batch, step.result)
        self.scheduler.running_batch.filter_batch()
        end_s = time.monotonic()
        until_told_s = step.executed_s + end_s - arrived_s
        # Where the next step runs meanwhile, nobody else waits for what the host does about this one.
        took_s = until_told_s if self.tasks.step is None else step.executed_s
        tokens, late = self.policy.streams.late_tokens(end_s)
        self.recorder.stepped(begun.requests, begun.begin_s, end_s, begun.load.start_by_s, took_s, tokens, late)
        self.policy.stepped(end_s, self.ended_streams(), took_s=until_told_s)
        self.steps += 1
        self.step_s += took_s

    def ended_streams(self) -> list[Stream]:
        """The streams for which the step that has run was the last."""
        return self._take_ended()

    def _take_ended(self) -> list[Stream]:
        """The streams that are over, with the KV cache that they held."""
        going_on = set(chain.from_iterable(batch.reqs for batch in (self.scheduler.running_batch, *self.joining)))
        ended = [self.streams.pop(req) for req in list(self.streams) if req not in going_on]
        if ended:
            self._freed()
        return ended

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
        numbers = {member.req: member.number for member in task.members}
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
                req.retraction_count -= 1  # clients are told of streams that were retracted: this is none
                # Not by _add_request_to_queue: a full queue would refuse what it had let in.
                scheduler.waiting_queue.append(req)
                req.time_stats.set_wait_queue_entry_time()
                self.held_back.append(req)
                setattr(req, GIVEN_BACK, numbers[req])
        self.given_back += 1

    def shed(self, reasons: Mapping[Any, str], retry_after_s: int) -> None:
        scheduler = self.scheduler
        scheduler.waiting_queue = [req for req in scheduler.waiting_queue if req not in reasons]
        for req, why in reasons.items():
            reason = {
                "type": "abort",
                "status_code": HTTPStatus.TOO_MANY_REQUESTS,
                "message": SHED.format(why=why, retry_after_s=retry_after_s),
                RETRY_AFTER: retry_after_s,
            }
            scheduler._release_aborted_request(req)
            scheduler.send_abort_output(AbortReq(rid=req.rid, finished_reason=reason), req)
            req.time_stats.trace_ctx.abort(abort_info={"reason": reason["message"]})

    # ---- what SGLang's scheduler tells ------------------------------------------------------------------------------

    def note_arrival(self, req: Any) -> None:
        """``req`` has come, or comes back: it was retracted."""
        if req in self.streams:
            self.retractions += 1
            stream = self.streams.pop(req)
            setattr(req, LAST_TOKEN_S, self.policy.streams.last_token_s(stream))
            self.note_retracted(stream)
        if not req.is_retracted:
            super().note_arrival(req)

    def note_retracted(self, stream: Stream) -> None:
        """``stream`` has lost its KV cache."""
        self.policy.left([stream])

    def note_queued(self, req: Any) -> None:
        """``req`` is in SGLang's waiting queue."""
        self.not_told.append(req)

    # ---- what SGLang asks -------------------------------------------------------------------------------------------

    def leaving(self) -> Iterable[Any]:
        return list(self.streams)

    def computed(self) -> Iterable[Any]:
        return chain.from_iterable(batch.reqs for batch in (*self.in_flight(), self.scheduler.running_batch))

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
            **self.step_model.state(),
        }

    # ---- the rest ---------------------------------------------------------------------------------------------------

    @property
    def not_ready(self) -> int:
        return super().not_ready + len(self.held_back) + len(self.kept_out)

    def _forget_ended(self) -> None:
        """Requests of which the hub has not been told may have been aborted or refused."""
        self.reads.forget_all_but(self.scheduler.waiting_queue)
        ended = {*self.not_told, *self.held_back}
        for req in reversed(self.scheduler.waiting_queue):  # near its end, where requests are put
            if not ended:
                return
            ended.discard(req)
        self.not_told = [req for req in self.not_told if req not in ended]
        self.held_back = [req for req in self.held_back if req not in ended]

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
        """KV cache has been freed, and not by giving a task back. Where the device had no memory beside so many streams
        a moment ago, what gave its own back stays away for now: it would do so again.
        """
        self._has_freed = True
        streams, steps = self._without_memory
        if len(self.streams) >= streams > 0 and self.steps < steps + WITHOUT_MEMORY_STEPS:
            return
        self.not_told += self.held_back
        self.held_back.clear()


class ReservingAdder(PrefillAdder):
    """SGLang's admission, with KV cache reserved for the answers of ``others`` beside those of the running batch."""

    def __init__(self, *args: Any, others: Sequence[Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.memory_budget.total_offset += sum(map(self._get_running_request_total_token_offset, others))
