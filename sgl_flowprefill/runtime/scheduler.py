"""FlowPrefillScheduler: SGLang's prefill scheduler with an event-driven loop that can suspend a running prefill.

The hub is the loop below; it runs in the main greenlet and does everything but forward passes. A forward pass runs in
its task's greenlet and comes back at a checkpoint where an event is pending, or when it is done (docs/architecture.md).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from http import HTTPStatus
from itertools import chain, islice
from typing import Any, Final

import torch
from sglang.srt.disaggregation.utils import is_aborted
from sglang.srt.managers import io_struct
from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sgl_flowprefill.deadline import received_s, slo_s
from sgl_flowprefill.policy import Job
from sgl_flowprefill.runtime.failure import Failure
from sgl_flowprefill.runtime.setup import NO_TASK, PreparedScheduler
from sgl_flowprefill.runtime.task import PrefillTask, input_logprobs
from sgl_flowprefill.runtime.waiting import WaitingRequest
from sgl_flowprefill.ttft import PrefillShape

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
IDLE_CHECK_S: Final = 5.0
"""How often an idle scheduler does SGLang's housekeeping (leak check, metrics)."""
STALL_CHECK_S: Final = 1.0
"""How often a scheduler that only waits for others looks for what sends no wake-up (a dead decode server)."""
MATCHES: Final = 1
"""Waiting requests of whose prompts more has been cached that an event matches again, besides those about to start. A
match touches the radix cache, so tensor-parallel ranks do these alone, all the same ones."""
MATCH_ROUNDS: Final = 3
"""Choices that an event makes at most because those about to start were matched again."""
STALL_CHECK_REQUESTS: Final = 512
"""Most waiting requests that are looked at then: SGLang takes about 1.5 us for each, and a prefill may be stopped."""

COMPILES_SINCE: Final = "flowprefill_compiles_since_s"
"""Attribute of SGLang's Req: when its grammar began to be compiled here."""


class FlowPrefillScheduler(PreparedScheduler):
    """Takes the place of ``sglang.srt.managers.scheduler.Scheduler``; only a prefill server's loop differs."""

    # ---- the event loop -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def event_loop_normal_disagg_prefill(self) -> None:
        self._feed_watchdogs()
        with nullcontext() if self._agreement is None else self._agreement.naming_the_lost():
            while not self.gracefully_exit:
                if not self._step() and not self.gracefully_exit:
                    self._sleep()

    def _step(self) -> bool:
        """Take what has happened, pick what runs now, run it until something happens. Whether anything could run."""
        while True:
            self._take_events()
            self._finish_arrived()
            # Picking late, when the device has room for another operator, is picking with all that is known by then.
            if self._device.catch_up(self._ends_waiting):
                break
        task = None if self._engine_paused else self._pick()
        if task is not None:
            self._run(task)
            if task.done:
                self._finish_arrived()
            return True
        if self._finishing and self._events is not None:  # the other ranks wait for what the first one decides next
            self._device.wait(self._finishing[0].result.copy_done, self._events.pending)
        return bool(self._finishing)

    def event_loop_overlap_disagg_prefill(self) -> None:
        raise RuntimeError("FlowPrefill needs --disable-overlap-schedule on the prefill server.")

    def _feed_watchdogs(self) -> None:
        """SGLang's watchdogs look for forward passes that begin; here, one that gets on is a sign of life too."""
        for watchdog in (self.watchdog, getattr(self, "soft_watchdog", None)):
            if watchdog is not None:
                watchdog.get_counter = lambda: self.forward_ct + self._executor.points

    def _take_events(self) -> None:
        """Arrivals, aborts and health checks; requests that finished bootstrapping; KV transfers that ended."""
        now_s = time.monotonic()
        stalls_are_due = now_s - self._last_stall_check_s >= STALL_CHECK_S
        slowdown_percent = round(100 * self._ttft.correction)
        if self._agreement is not None:  # here the other ranks wait while the first one sleeps
            arrival = self._finishing[0].id if self._result_arrived() else NO_TASK
            agreed = self._agreement.agree([stalls_are_due, arrival, slowdown_percent])
            stalls_are_due, self._agreed_arrival, slowdown_percent = bool(agreed[0]), agreed[1], agreed[2]
        self._tiles.follow(slowdown_percent / 100)
        self._wakeup.clear()
        self._waiting.forget_news()
        self.ingest_requests()
        self.maybe_send_health_check_signal()
        if self._has_compiled_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        # What has ended gives back its metadata buffer, before those that need one are looked at.
        if self.process_disagg_prefill_inflight_queue():
            self._kv_is_short = False
        if stalls_are_due:
            self._last_stall_check_s = now_s
            self._kv_is_short = False
            self.resolve_waiting_queue_bootstrap()
            self._forget_left_requests()
            self._journal.close_lost(self._held_requests())
        self._drop_aborted_tasks()
        for req in self.disagg_prefill_bootstrap_queue.pop_bootstrapped():
            self._enqueue(req)
        self._match_again(list(islice(self._waiting.outdated(), MATCHES)))

    def _has_compiled_grammars(self) -> bool:
        """Whether SGLang would find something among the grammars: its look waits for those that are not ready.

        It gives a grammar up after so many looks. Here one that has had the time which these take at least, by this
        rank's clock, is given up; SGLang gives up at all ranks what one of them does.
        """
        grammars = self.grammar_manager
        if not grammars.has_waiting_grammars():
            return False
        most_looks = grammars.SGLANG_GRAMMAR_MAX_POLL_ITERATIONS
        too_old_s = time.monotonic() - most_looks * grammars.SGLANG_GRAMMAR_POLL_INTERVAL
        found = False
        for req in grammars.grammar_queue:
            if getattr(req, COMPILES_SINCE) < too_old_s:
                req.grammar_wait_ct = most_looks
                found = True
            found = found or req.finished() or req.grammar is None or req.grammar.done()
        return found if self._agreement is None else bool(self._agreement.agree([found])[0])

    def _sleep(self) -> None:
        """Nothing can run until something happens: housekeeping once, then sleep on the sockets."""
        self._journal.flush()
        self.cur_batch_for_debug = None
        self._sched_idled = True
        self.on_idle()
        if self._events is not None:
            self._events.sleep(IDLE_CHECK_S if self.is_fully_idle() else STALL_CHECK_S)

    # ---- picking --------------------------------------------------------------------------------------------------

    def _pick(self) -> PrefillTask | None:
        """The task that runs now: one that has started, or a new one made of waiting requests."""
        running = self._running
        if running is not None:
            self._requeue(running)
        while True:
            choice = self._choose(running) if self._agreement is None else self._agreed_choice(running)
            if choice is None or isinstance(choice, PrefillTask):
                return choice
            task = self._start(choice)
            if task is not None:
                return task
            # Its KV does not fit. Work on what holds KV, and try again when some has been freed.
            self._kv_is_short = True

    def _choose(self, running: PrefillTask | None) -> PrefillTask | list[Job[WaitingRequest]] | None:
        """The policy's choice: a task that has started, or the requests for a new one, in order of priority."""
        now_s, running_job = time.monotonic(), running.job if running else None
        for _ in range(MATCH_ROUNDS):
            job = self._policy.pick(now_s, running_job, admit=not self._kv_is_short)
            if job is None or isinstance(job.item, PrefillTask):
                break
            jobs = self._policy.batch(job, now_s, lambda waiting: waiting.shape.new_tokens, self._predict_s)
            if self._agreement is not None or not self._match_again(jobs):
                break
        if job is not None and not isinstance(job.item, PrefillTask):
            while jobs and not self._fits(jobs):
                jobs = jobs[:-1]  # the winner is the first: those that join it stay out where they do not fit beside it
            if jobs:
                return jobs
            # Its activations do not fit beside those of the tasks: work on these.
            job = self._policy.pick(now_s, running_job, admit=False)
            assert job is None or isinstance(job.item, PrefillTask)
        return None if job is None else job.item

    def _fits(self, jobs: Sequence[Job[WaitingRequest]]) -> bool:
        """Whether the activations of a task of ``jobs`` fit beside those of the live ones."""
        logprob_rows = sum(input_logprobs(job.item.req) for job in jobs)
        return self._memory.admits(
            [task.new_tokens for task in self._live],
            sum(job.item.shape.new_tokens for job in jobs),
            max([logprob_rows, *(task.logprob_rows for task in self._live)]),
        )

    def _agreed_choice(self, running: PrefillTask | None) -> PrefillTask | list[Job[WaitingRequest]] | None:
        """The choice of the first tensor-parallel rank: a task's id, or NO_TASK and the numbers of requests."""
        assert self._agreement is not None
        values: list[int] = []
        if self._events is not None:
            choice = self._choose(running)
            if isinstance(choice, PrefillTask):
                values = [choice.id]
            elif choice is not None:
                values = [NO_TASK, *(job.item.number for job in choice)]
        values = self._agreement.agree(values)
        if not values:
            return None
        if values[0] != NO_TASK:
            return next(task for task in self._live if task.id == values[0])
        return self._waiting.numbered(values[1:])

    def _start(self, jobs: Sequence[Job[WaitingRequest]]) -> PrefillTask | None:
        """A new task for the first of ``jobs`` and those that join it, or None when the first one's KV does not fit."""
        winner = jobs[0]
        batch = self._make_batch([job.item.req for job in jobs])
        if batch is None:
            return None
        shapes = _shapes(batch)
        members = self._waiting.take(batch.reqs)
        for member in members:
            self._policy.requests.remove(member)
        task = PrefillTask(
            id=self._tasks_started,
            batch=batch,
            arrival_s=min(member.arrival_s for member in members),
            deadline_s=winner.deadline_s,
            readable_s=winner.item.readable_s,
            predicted_s=self._ttft.predict_s(shapes),
            attention_share=0.5 if self._operators is None else self._operators.attention_share(shapes),
            attn_backend=self._slots.take(),
        )
        task.job.number = winner.number
        task.job.pace = self._ttft.pace(shapes)
        task.job.remaining_s = task.predicted_s
        self._tasks_started += 1
        self._live.append(task)
        self._policy.tasks.add(task.job)
        return task

    def _make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """SGLang's own admission (prefix match, KV and slot allocation) for ``reqs`` alone, in their order, and what
        its loop does with a new batch.
        """
        chosen = set(reqs)
        others = [req for req in self.waiting_queue if req not in chosen]
        self.waiting_queue = list(reqs)
        # SGLang would wait for grammars that are not compiled yet. The hub has taken those that are.
        compiling, self.grammar_manager.grammar_queue = self.grammar_manager.grammar_queue, []
        self.running_batch.batch_is_full = False
        batch = self.get_new_batch_prefill(self.running_batch).batch_to_run
        self.grammar_manager.grammar_queue = compiling
        self.waiting_queue = self.waiting_queue + others
        batch = self.ngram_embedding_manager.prepare_for_forward(batch, chunked_req=self.chunked_req)
        if batch is not None and self.enable_staging:
            self.maybe_prefetch_staging_for_batch(batch)
        return batch

    # ---- running --------------------------------------------------------------------------------------------------

    def _run(self, task: PrefillTask) -> None:
        """Execute ``task`` until it is done or an event is pending, suspending the one that ran before."""
        now_s = time.monotonic()
        if task is not self._running:
            if self._running is not None:
                self._journal.suspended(self._running, task, self._stopped_s, now_s, self._waiting.news_readable_s)
            self._journal.resumed(task, now_s)
            self._running = task
        self.cur_batch_for_debug = task.batch
        self._execute(task)
        self._stopped_s = time.monotonic()

    def _execute(self, task: PrefillTask) -> None:
        """Run ``task`` until an event is pending or it is over: its result is on its way then, or it has failed."""
        self._executor.run(task, self._forward)
        if task.failure is not None:
            self._fail(task, task.failure)
        elif task.done:
            self._retire(task)
            self._finishing.append(task)

    def _forward(self, batch: Any) -> Any:
        """In the task's greenlet: the whole forward pass, and the way back of its result."""
        result = self.run_batch(batch)
        self._device.fetch(batch, result)
        return result

    def _finish_arrived(self) -> None:
        """Finish the tasks whose results are on the host. One of the others may wait while the device runs the next.

        Of several ranks, the first decides: what it has is on its way at all of them, behind the same kernels.
        """
        while self._finishing:
            task = self._finishing[0]
            copy_done = task.result.copy_done
            if copy_done is not None:
                arrived = copy_done.query() if self._agreement is None else task.id == self._agreed_arrival
                if not arrived and len(self._finishing) == 1:
                    return
                self._device.wait(copy_done, lambda: False)
            self._finish(self._finishing.popleft())

    def _finish(self, task: PrefillTask) -> None:
        """Send the KV of a task that is done and answer its requests."""
        self._slots.give_back(task.attn_backend)
        self._progress.passed_all(task.checkpoint)
        prediction = self._ttft.observe(_shapes(task.batch), task.executed_s)
        self._journal.completed(task, prediction, self._ttft, len(self._live))
        self.process_batch_result(task.batch, task.result)
        self._waiting.cached(req.origin_input_ids for req in task.batch.reqs)
        if self._ttft.follow():
            for live in self._live:
                live.predicted_s = self._ttft.predict_s(_shapes(live.batch))
            self._policy.repaced()

    def checkpoint_disagg_prefill(self, req: Any) -> None:
        """SGLang gives the KV of ``req``, whose prefill has run, to the radix cache. What another has put there since
        ``req`` started takes the place of its own: SGLang frees that, and queues the new KV indices.
        """
        others = self._cached_tokens() - req.kv.cache_protected_len
        super().checkpoint_disagg_prefill(req)
        if self._cached_tokens() - req.kv.cache_protected_len != others:
            self._reindexed = req

    def _cached_tokens(self) -> int:
        return int(self.tree_cache.evictable_size() + self.tree_cache.protected_size())

    def send_kv_chunk(self, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
        """SGLang reads the KV indices of ``req`` back: beside the queue, where its prefill has run with them."""
        beside = last_chunk and req is not self._reindexed
        with self._device.beside_the_queue() if beside else nullcontext():
            super().send_kv_chunk(req, last_chunk, end_idx)

    def _retire(self, task: PrefillTask) -> None:
        """Forget a task that is done or dropped."""
        self._policy.tasks.remove(task.job)
        self._live.remove(task)
        self._kv_is_short = False
        if self._running is task:
            self._running = None

    def _requeue(self, task: PrefillTask) -> None:
        """Tell the policy how much of a task that has run is left."""
        self._policy.tasks.remove(task.job)
        task.job.remaining_s = self._remaining_s(task)
        self._policy.tasks.add(task.job)

    def _remaining_s(self, task: PrefillTask) -> float:
        """Predicted time left, from the checkpoints that the task has passed and not from wall time."""
        if not self._progress.checkpoints:
            return max(0.0, task.predicted_s - task.executed_s)
        return task.predicted_s * self._progress.left(task.checkpoint, task.attention_share)

    # ---- requests that come and go --------------------------------------------------------------------------------

    def process_input_requests(self, recv_reqs: list[Any]) -> None:
        """A request whose grammar is not compiled yet will come with an event of its own. Before the weights change,
        started tasks run to their end.
        """
        if self._is_on and any(isinstance(message, CHANGES_WEIGHTS) for message in recv_reqs):
            self._finish_started()
        compiling = len(self.grammar_manager.grammar_queue)
        super().process_input_requests(recv_reqs)
        for req in self.grammar_manager.grammar_queue[compiling:]:
            setattr(req, COMPILES_SINCE, time.monotonic())
            if self._is_on and req.grammar is not None:
                req.grammar.add_done_callback(lambda _: self._wakeup.notify())

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        if self._is_on:
            self._journal.arrived(req, received_s(req), self._slo_s(req))
        super()._add_request_to_queue(req, is_retracted)

    def _enqueue(self, req: Any) -> None:
        """A request that finished bootstrapping waits for its turn."""
        self.waiting_queue.append(req)
        # Only to know how much of it is cached: what a start copies of a hybrid model's state takes a slot.
        req.init_next_round_input(self.tree_cache, cow_mamba=False)
        job = self._waiting.add(req, received_s(req), self._slo_s(req), self._predict_s, self._ttft.pace)
        self._policy.requests.add(job)

    def _match_again(self, jobs: Iterable[Job[WaitingRequest]]) -> bool:
        """Match those of ``jobs`` again of whose prompts more has been cached since. Whether there were any."""
        outdated = [job for job in jobs if self._waiting.is_outdated(job)]
        for job in outdated:
            self._policy.requests.remove(job)
            job.item.req.init_next_round_input(self.tree_cache, cow_mamba=False)
            self._waiting.matched(job, self._predict_s, self._ttft.pace)
            self._policy.requests.add(job)
        return bool(outdated)

    def abort_request(self, recv_req: Any) -> None:
        if self._is_on:
            reqs = chain(self._held_requests(), self.grammar_manager.grammar_queue)
            self._journal.abort_asked(req for req in reqs if recv_req.abort_all or req.rid.startswith(recv_req.rid))
        super().abort_request(recv_req)
        if self._is_on:
            self._forget_left_requests()

    def send_abort_output(self, abort_req: Any, req: Any) -> None:
        """SGLang's other way to end a request, past the output streamer."""
        super().send_abort_output(abort_req, req)
        if self._is_on:
            reason = abort_req.finished_reason or {}
            self._journal.answered(req, str(reason.get("message")), reason.get("status_code"))

    def _held_requests(self) -> list[Any]:
        """All requests that have arrived here and whose prefill has not run."""
        of_tasks = chain.from_iterable(task.batch.reqs for task in chain(self._live, self._finishing))
        return [*self.disagg_prefill_bootstrap_queue.queue, *self.waiting_queue, *of_tasks]

    def _forget_left_requests(self) -> None:
        """Drop the jobs of requests that SGLang has taken off the waiting queue (aborted, decode server gone)."""
        for job in self._waiting.take_all_but(self.waiting_queue):
            self._policy.requests.remove(job)

    def resolve_waiting_queue_bootstrap(self) -> None:
        """SGLang drops waiting requests whose decode server is gone; here a part of them each time, in turns."""
        later = self.waiting_queue[STALL_CHECK_REQUESTS:]
        self.waiting_queue = self.waiting_queue[:STALL_CHECK_REQUESTS]
        super().resolve_waiting_queue_bootstrap()
        self.waiting_queue = later + self.waiting_queue

    def _drop_aborted_tasks(self) -> None:
        """Drop the tasks that nobody waits for any more.

        A request that leaves a batch in which others stay is computed to the end with it, and freed with the result:
        its rows are in every tensor that the suspended forward pass holds, and in the plan of its attention. At most
        ``max_batch_tokens`` are computed in vain.
        """
        for task in list(self._live):
            if all(is_aborted(req) for req in task.batch.reqs):
                self._journal.dropped(task)
                self._drop(task)

    def _fail(self, task: PrefillTask, failure: Failure) -> None:
        """Answer the requests of a task whose forward pass has raised with an error. The others are not concerned."""
        logger.error("FlowPrefill: error %s in the prefill of %s:\n%s", failure.id, task.rids, failure.traceback)
        if self._agreement is not None:
            self._agreement.agree(failed_at=failure.place)
        for req in task.batch.reqs:
            if not is_aborted(req):
                req.to_finish = FINISH_ABORT(failure.message, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")
        self._journal.failed(task, failure.message, HTTPStatus.INTERNAL_SERVER_ERROR)
        self._drop(task)

    def _drop(self, task: PrefillTask) -> None:
        """End a task whose requests have all been given up: unwind its forward pass, free what it holds, and answer.

        Its KV cache is not computed, and so never becomes a cached prefix.
        """
        self._executor.cancel(task)
        self._retire(task)
        self._slots.give_back(task.attn_backend)
        dropped = [req for req in task.batch.reqs if self._retire_aborted_prefill_result(req)]
        for req in dropped:
            req.time_stats.set_completion_time()
        self.output_streamer.stream_output(dropped, any(req.return_logprob for req in dropped))
        self._maybe_clear_mm_inputs(task.batch)

    def _finish_started(self) -> None:
        """Run the tasks that have started to their ends, and process their results."""
        while self._live:
            if self._agreement is not None:
                self._agreement.agree()
            self._execute(self._live[0])
        while self._finishing:
            self._finish(self._finishing.popleft())

    def pause_generation(self, recv_req: Any) -> None:
        """Started tasks run to their end first: a pause may be there to change the weights under them."""
        self._finish_started()
        super().pause_generation(recv_req)

    # ---- what SGLang asks a scheduler ------------------------------------------------------------------------------

    def is_fully_idle(self, *args: Any, **kwargs: Any) -> bool:
        return super().is_fully_idle(*args, **kwargs) and not self._live and not self._finishing

    def _collect_inflight_batches(self) -> list[Any]:
        tasks = chain(self._live, self._finishing)
        return [*super()._collect_inflight_batches(), *(task.batch for task in tasks)]

    def get_internal_state(self, recv_req: Any) -> Any:
        """What ``/server_info`` shows, with the state of the TTFT correction."""
        output = super().get_internal_state(recv_req)
        if self._is_on:
            output.internal_state["flowprefill_ttft"] = self._ttft.state()
        return output

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _predict_s(self, requests: Sequence[WaitingRequest]) -> float:
        return self._ttft.predict_s([request.shape for request in requests])

    def _slo_s(self, req: Any) -> float:
        return slo_s(req, self._config.default_ttft_slo)


def _shapes(batch: Any) -> list[PrefillShape]:
    """What a started batch computes, with the cached prefixes that its admission found."""
    return [PrefillShape(*lengths) for lengths in zip(batch.extend_lens, batch.prefix_lens, strict=True)]
