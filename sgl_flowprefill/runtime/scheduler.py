"""FlowPrefillScheduler: SGLang's prefill scheduler with an event-driven loop that can suspend a running prefill.

The hub is the loop below; it runs in the main greenlet and does everything but forward passes. A forward pass runs in
its task's greenlet and comes back at a checkpoint where an event is pending, or when it is done (docs/architecture.md).
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NoReturn

import torch
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.utils import DisaggregationMode, is_aborted
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.utils import is_health_check_generate_req
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.network import get_local_ip_auto

from sgl_flowprefill.compat import unchecked_attention_backend
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import EventLog
from sgl_flowprefill.patches import wakeups
from sgl_flowprefill.policy import Job, Limits, PrefillPolicy, make_policy
from sgl_flowprefill.runtime.agreement import Agreement
from sgl_flowprefill.runtime.checkpoints import Progress, find_decoder_layers, install_checkpoints
from sgl_flowprefill.runtime.device import CpuDevice, Device, make_device
from sgl_flowprefill.runtime.memory import TaskMemory
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.profile import load_or_measure
from sgl_flowprefill.runtime.task import AttentionSlots, Executor, PrefillTask
from sgl_flowprefill.runtime.tiles import WHOLE, plan_tiles, tile_around_attention, tile_mlps
from sgl_flowprefill.runtime.wakeup import Wakeup, scheduler_events
from sgl_flowprefill.slo import ttft_slo_s
from sgl_flowprefill.ttft import PrefillShape
from sgl_flowprefill.ttft.budget import throughput_budget_tokens

logger = logging.getLogger(__name__)

HEALTH_CHECK_SLO_S: Final = 0.5
"""Objective of SGLang's health-check request, which runs as a one-token prefill when the server is idle."""
IDLE_CHECK_S: Final = 5.0
"""How often an idle scheduler does SGLang's housekeeping (leak check, metrics)."""
STALL_CHECK_S: Final = 1.0
"""How often a scheduler that only waits for others looks for what sends no wake-up (a dead decode server)."""
LONGEST_BATCH_TOKENS: Final = 8192
"""Upper end of the search for the batch size that throughput needs."""
GRAMMAR_POLL_S: Final = 0.01
"""How often a compiling grammar is asked whether it is ready: SGLang's grammar workers send no wake-up."""


@dataclass(eq=False)
class WaitingRequest:
    """A request that could be started now."""

    req: Any
    """SGLang's Req."""
    number: int
    """Counts the requests that could be started; the same on all tensor-parallel ranks."""
    shape: PrefillShape
    """Its cost as the prefix match at its arrival left it."""
    readable_s: float
    """When this process could first have read that it can be run: it was sent here, and it has bootstrapped."""


class FlowPrefillScheduler(Scheduler):
    """Takes the place of ``sglang.srt.managers.scheduler.Scheduler``; only a prefill server's loop differs."""

    waiting_queue: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # What Scheduler.__init__ may already ask for, before the rest of our state can exist.
        self._policy: PrefillPolicy[WaitingRequest, PrefillTask] | None = None
        self._live: list[PrefillTask] = []
        """Tasks that have started and are not done, in the order of their start, which is the same on all ranks."""
        self._finishing: deque[PrefillTask] = deque()
        """Tasks that are done, whose results are on their way from the device."""
        super().__init__(*args, **kwargs)
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            try:
                self._init_flowprefill(FlowPrefillConfig.from_env())
            except SystemExit as refusal:
                _end_server(refusal)

    def _init_flowprefill(self, config: FlowPrefillConfig) -> None:
        model_runner = self.tp_worker.model_runner
        self._config = config = self.tp_group.broadcast_object(config)  # the environment of another node may differ
        unchecked = unchecked_attention_backend(model_runner.prefill_attention_backend_str)
        if unchecked is not None:
            raise SystemExit(f"sgl-flowprefill: {unchecked}")
        self._device: Device = make_device(self.device, config.lookahead)
        self._wakeup = Wakeup()
        self._bootstrapped_s: dict[int, float] = {}
        wakeups.expect_applied()
        wakeups.subscribe(self._on_transfer_status)
        # Of several tensor-parallel ranks, the first alone looks at sockets and clocks, and decides.
        self._events = scheduler_events(self, self._wakeup) if self.tp_group.rank_in_group == 0 else None
        pending = None if self._events is None else self._events.pending
        self._agreement = self._agree_with_ranks(pending) if self.tp_group.world_size > 1 else None
        if self._agreement is not None:
            # Nothing ends a rank's wait for its device early, or ranks would not do the same.
            self._ends_waiting: Callable[[], bool] = _never
            self._executor = Executor(model_runner, self._agreement.interrupted, self._device, _never)
        else:
            assert pending is not None
            self._ends_waiting = pending if isinstance(self._device, CpuDevice) else self._has_news
            self._executor = Executor(model_runner, self._ends_waiting, self._device)
        self._progress = Progress([])
        layers = [] if config.granularity == "chunk" else find_decoder_layers(model_runner.model)
        self._waiting: dict[Any, Job[WaitingRequest]] = {}
        self._enqueued = 0
        self._running: PrefillTask | None = None
        self._tasks_started = 0
        self._kv_is_short = False
        self._last_stall_check_s = 0.0
        self._news_readable_s = math.inf
        """When the first of the requests that the hub just found could have been read."""
        self._ttft, self._operators = load_or_measure(self, config)
        batch_tokens = config.max_batch_tokens or throughput_budget_tokens(self._ttft, LONGEST_BATCH_TOKENS)
        limits = Limits(max_suspended=config.max_suspended, max_batch_tokens=batch_tokens)
        self._policy = make_policy(config.policy, limits, config.max_starvation_s)
        between_tiles, tiles = None, WHOLE
        if config.granularity == "operator":
            between_tiles = self._executor.between_tiles
            tiles = plan_tiles(config.max_blocking_ms / 1e3, len(layers), self._ttft, self._operators)
            tiled = tile_mlps(model_runner.model, chain(*(layer.mlp for layer in layers)), tiles.rows, between_tiles)
            attention = chain(*(layer.attention for layer in layers))
            tiled += tile_around_attention(model_runner.model, attention, tiles.rows, between_tiles)
            logger.info("FlowPrefill runs %d modules in tiles, MLPs in those of %d tokens", tiled, tiles.rows)
        if config.granularity != "chunk":
            self._progress = install_checkpoints(
                model_runner.model, layers, config.granularity, self._executor.checkpoint
            )
        self._slots = AttentionSlots(model_runner, between_tiles, tiles.pairs)
        self._memory = TaskMemory.plan(model_runner, self._slots, config.max_suspended, tiles.rows)
        self._log = EventLog(None if self._events is None else config.event_log)
        self._metrics: Metrics | None = None
        if self._events is not None and self.metrics_collector_context.enable_metrics:
            self._metrics = Metrics(self.metrics_collector.labels)
        logger.info(
            "FlowPrefill is on: policy %s, %d checkpoints in a forward pass, at most %d suspended tasks, batches of up "
            "to %d tokens",
            config.policy,
            self._progress.checkpoints,
            config.max_suspended,
            batch_tokens,
        )

    def _agree_with_ranks(self, pending: Callable[[], bool] | None) -> Agreement:
        nodes = get_parallel().nnodes
        host = get_local_ip_auto() if nodes > 1 else "127.0.0.1"
        lookahead = 0 if isinstance(self._device, CpuDevice) else self._config.lookahead
        return Agreement(self.tp_cpu_group, self._wakeup, pending, lookahead=lookahead, nodes=nodes, host=host)

    # ---- the event loop -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def event_loop_normal_disagg_prefill(self) -> None:
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
                self._retire(task)
                self._finishing.append(task)
                self._finish_arrived()
            return True
        if self._finishing:
            self._device.wait(self._finishing[0].result.copy_done, self._ends_waiting)
        return bool(self._finishing)

    def _has_news(self) -> bool:
        """Whether the hub has something to look at: an event, or a result that has arrived from the device."""
        assert self._events is not None
        return self._events.pending() or (bool(self._finishing) and self._finishing[0].result.copy_done.query())

    def event_loop_overlap_disagg_prefill(self) -> None:
        raise RuntimeError("FlowPrefill needs --disable-overlap-schedule on the prefill server.")

    def _take_events(self) -> None:
        """Arrivals, aborts and health checks; requests that finished bootstrapping; KV transfers that ended."""
        now_s = time.monotonic()
        stalls_are_due = now_s - self._last_stall_check_s >= STALL_CHECK_S
        if self._agreement is not None:  # here the other ranks wait while the first one sleeps
            stalls_are_due = bool(self._agreement.agree([stalls_are_due])[0])
        self._wakeup.clear()
        self._news_readable_s = math.inf
        self.ingest_requests()
        self.maybe_send_health_check_signal()
        if self.grammar_manager.has_waiting_grammars():
            for req in self.grammar_manager.get_ready_grammar_requests():
                self._add_request_to_queue(req)
        for req in self.disagg_prefill_bootstrap_queue.pop_bootstrapped():
            self._enqueue(req)
        if self.process_disagg_prefill_inflight_queue():
            self._kv_is_short = False
        if stalls_are_due:
            self._last_stall_check_s = now_s
            self._kv_is_short = False
            self.resolve_waiting_queue_bootstrap()
            self._forget_left_requests()
        self._drop_aborted_tasks()

    def _sleep(self) -> None:
        """Nothing can run until something happens: housekeeping once, then sleep on the sockets."""
        self._log.flush()
        self.cur_batch_for_debug = None
        self._sched_idled = True
        self.on_idle()
        if self.grammar_manager.has_waiting_grammars():
            timeout_s = GRAMMAR_POLL_S
        elif self.is_fully_idle():
            timeout_s = IDLE_CHECK_S
        else:
            timeout_s = STALL_CHECK_S
        if self._events is not None:
            self._events.sleep(timeout_s)

    # ---- picking --------------------------------------------------------------------------------------------------

    def _pick(self) -> PrefillTask | None:
        """The task that runs now: one that has started, or a new one made of waiting requests."""
        assert self._policy is not None
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
        assert self._policy is not None
        now_s, running_job = time.monotonic(), running.job if running else None
        job = self._policy.pick(now_s, running_job, admit=not self._kv_is_short)
        if job is not None and not isinstance(job.item, PrefillTask):
            jobs = self._policy.batch(job, now_s, lambda waiting: waiting.shape.new_tokens, self._predict_s)
            new_tokens = sum(member.item.shape.new_tokens for member in jobs)
            if self._memory.admits([task.new_tokens for task in self._live], new_tokens):
                return jobs
            # Its activations do not fit beside those of the tasks: work on these.
            job = self._policy.pick(now_s, running_job, admit=False)
            assert job is None or isinstance(job.item, PrefillTask)
        return None if job is None else job.item

    def _agreed_choice(self, running: PrefillTask | None) -> PrefillTask | list[Job[WaitingRequest]] | None:
        """The choice of the first tensor-parallel rank: a task's id, or minus one and the numbers of requests."""
        assert self._agreement is not None
        values: list[int] = []
        if self._events is not None:
            choice = self._choose(running)
            if isinstance(choice, PrefillTask):
                values = [choice.id]
            elif choice is not None:
                values = [-1, *(job.item.number for job in choice)]
        values = self._agreement.agree(values)
        if not values:
            return None
        if values[0] >= 0:
            return next(task for task in self._live if task.id == values[0])
        by_number = {job.item.number: job for job in self._waiting.values()}
        return [by_number[number] for number in values[1:]]

    def _start(self, jobs: Sequence[Job[WaitingRequest]]) -> PrefillTask | None:
        """A new task for the first of ``jobs`` and those that join it, or None when the first one's KV does not fit."""
        assert self._policy is not None
        winner = jobs[0]
        batch = self._make_batch([job.item.req for job in jobs])
        if batch is None:
            return None
        shapes = _shapes(batch)
        members = [self._waiting.pop(req) for req in batch.reqs]
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
        self._tasks_started += 1
        self._live.append(task)
        self._policy.tasks.add(task.job)
        return task

    def _make_batch(self, reqs: Sequence[Any]) -> Any | None:
        """SGLang's own admission (prefix match, KV and slot allocation) for ``reqs`` alone, in their order."""
        chosen = set(reqs)
        others = [req for req in self.waiting_queue if req not in chosen]
        self.waiting_queue = list(reqs)
        self.running_batch.batch_is_full = False
        batch = self.get_new_batch_prefill(self.running_batch).batch_to_run
        self.waiting_queue = self.waiting_queue + others
        return batch

    # ---- running --------------------------------------------------------------------------------------------------

    def _run(self, task: PrefillTask) -> None:
        """Execute ``task`` until it is done or an event is pending, suspending the one that ran before."""
        now_s = time.monotonic()
        if task is not self._running:
            if self._running is not None:
                self._log_suspend(self._running, task, now_s)
            if task.started:
                self._log.write("resume", now_s, task=task.id, rids=task.rids, checkpoint=task.checkpoint)
            else:
                cached_tokens = sum(req.prefix_len for req in task.batch.reqs)
                self._log.write(
                    "start",
                    now_s,
                    task=task.id,
                    rids=task.rids,
                    new_tokens=task.new_tokens,
                    cached_tokens=cached_tokens,
                    predicted_s=round(task.predicted_s, 6),
                )
            self._running = task
        self.cur_batch_for_debug = task.batch
        self._executor.run(task, self._forward)

    def _forward(self, batch: Any) -> Any:
        """In the task's greenlet: the whole forward pass, and the way back of its result."""
        result = self.run_batch(batch)
        self._device.fetch(batch, result)
        return result

    def _finish_arrived(self) -> None:
        """Finish the tasks whose results are on the host. One of the others may wait while the device
        runs the next; not with several ranks, which would have to agree on when it arrived.
        """
        while self._finishing:
            copy_done = self._finishing[0].result.copy_done
            may_wait = self._agreement is None and copy_done is not None and len(self._finishing) == 1
            if may_wait and not copy_done.query():
                return
            self._finish(self._finishing.popleft())

    def _finish(self, task: PrefillTask) -> None:
        """Send the KV of a task that is done and answer its requests."""
        assert self._policy is not None
        self._slots.give_back(task.attn_backend)
        self._progress.passed_all(task.checkpoint)
        prediction = self._ttft.observe(_shapes(task.batch), task.executed_s)
        self._log.write(
            "complete",
            time.monotonic(),
            task=task.id,
            rids=task.rids,
            checkpoint=task.checkpoint,
            forward_s=round(task.executed_s, 6),
            predicted_s=round(task.predicted_s, 6),
            expected_s=round(prediction.expected_s, 6),
            profiled_s=round(prediction.raw_s, 6),
        )
        if self._metrics is not None:
            self._metrics.completed(self._ttft.state(), len(self._live))
        self.process_batch_result(task.batch, task.result)

    def send_kv_chunk(self, req: Any, last_chunk: bool = False, end_idx: int | None = None) -> None:
        """SGLang reads the KV indices of ``req`` back. Where its prefill has run, that need not wait for others'."""
        with self._device.beside_the_queue() if last_chunk else nullcontext():
            super().send_kv_chunk(req, last_chunk, end_idx)

    def _retire(self, task: PrefillTask) -> None:
        """Forget a task that is done or dropped."""
        assert self._policy is not None
        self._policy.tasks.remove(task.job)
        self._live.remove(task)
        self._kv_is_short = False
        if self._running is task:
            self._running = None

    def _requeue(self, task: PrefillTask) -> None:
        """Tell the policy how much of a task that has run is left."""
        assert self._policy is not None
        self._policy.tasks.remove(task.job)
        task.job.remaining_s = self._remaining_s(task)
        self._policy.tasks.add(task.job)

    def _remaining_s(self, task: PrefillTask) -> float:
        """Predicted time left, from the checkpoints that the task has passed and not from wall time."""
        if not self._progress.checkpoints:
            return max(0.0, task.predicted_s - task.executed_s)
        return task.predicted_s * self._progress.left(task.checkpoint, task.attention_share)

    # ---- requests that come and go --------------------------------------------------------------------------------

    def _add_request_to_queue(self, req: Any, is_retracted: bool = False) -> None:
        super()._add_request_to_queue(req, is_retracted)
        if self._policy is not None and not is_health_check_generate_req(req):
            received_s, slo_s = _received_s(req), self._slo_s(req)
            self._log.write(
                "arrival",
                time.monotonic(),
                rid=req.rid,
                prompt_tokens=len(req.origin_input_ids),
                ttft_slo_s=slo_s,
                deadline_s=round(received_s + slo_s, 6),
                received_s=round(received_s, 6),
            )

    def _enqueue(self, req: Any) -> None:
        """A request that finished bootstrapping waits for its turn."""
        assert self._policy is not None
        self.waiting_queue.append(req)
        req.init_next_round_input(self.tree_cache)
        readable_s = max(req.time_stats.api_server_dispatch_time, self._bootstrapped_s.pop(req.bootstrap_room, 0.0))
        self._news_readable_s = min(self._news_readable_s, readable_s)
        shape = PrefillShape(len(req.origin_input_ids) - req.prefix_len, req.prefix_len)
        waiting = WaitingRequest(req, self._enqueued, shape, readable_s)
        self._enqueued += 1
        arrival_s = _received_s(req)
        job = Job(waiting, arrival_s, arrival_s + self._slo_s(req), self._predict_s([waiting]))
        self._waiting[req] = job
        self._policy.requests.add(job)

    def _on_transfer_status(self, bootstrap_room: int, status: Any) -> None:
        """On a transfer thread: a bootstrap is complete, or a transfer has ended."""
        if status == KVPoll.WaitingForInput:
            self._bootstrapped_s[bootstrap_room] = time.monotonic()
        elif status == KVPoll.Failed:
            self._bootstrapped_s.pop(bootstrap_room, None)
        self._wakeup.notify()

    def abort_request(self, recv_req: Any) -> None:
        super().abort_request(recv_req)
        if self._policy is not None:
            self._forget_left_requests()

    def _forget_left_requests(self) -> None:
        """Drop the jobs of requests that SGLang has taken off the waiting queue (aborted, decode server gone)."""
        assert self._policy is not None
        if len(self._waiting) == len(self.waiting_queue):
            return
        still_waiting = set(self.waiting_queue)
        for req in [req for req in self._waiting if req not in still_waiting]:
            self._policy.requests.remove(self._waiting.pop(req))
            self._log.write("abort", time.monotonic(), rids=[req.rid])

    def _drop_aborted_tasks(self) -> None:
        """Unwind tasks that nobody waits for any more and free what they hold."""
        for task in list(self._live):
            if not all(is_aborted(req) for req in task.batch.reqs):
                continue
            self._executor.cancel(task)
            self._retire(task)
            self._slots.give_back(task.attn_backend)
            self._log.write("abort", time.monotonic(), task=task.id, rids=task.rids, checkpoint=task.checkpoint)
            dropped = [req for req in task.batch.reqs if self._retire_aborted_prefill_result(req)]
            for req in dropped:
                req.time_stats.set_completion_time()
            self.output_streamer.stream_output(dropped, any(req.return_logprob for req in dropped))

    def pause_generation(self, recv_req: Any) -> None:
        """Started tasks run to their end first: a pause may be there to change the weights under them."""
        for task in list(self._live):
            while not task.done:
                if self._agreement is not None:
                    self._agreement.agree()
                self._executor.run(task, self._forward)
            self._retire(task)
            self._finishing.append(task)
        while self._finishing:
            self._finish(self._finishing.popleft())
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
        if self._policy is not None:
            output.internal_state["flowprefill_ttft"] = self._ttft.state()
        return output

    # ---- helpers --------------------------------------------------------------------------------------------------

    def _predict_s(self, requests: Sequence[WaitingRequest]) -> float:
        return self._ttft.predict_s([request.shape for request in requests])

    def _slo_s(self, req: Any) -> float:
        if is_health_check_generate_req(req):
            return HEALTH_CHECK_SLO_S
        return ttft_slo_s(req.sampling_params.custom_params, self._config.default_ttft_slo)

    def _log_suspend(self, suspended: PrefillTask, winner: PrefillTask, now_s: float) -> None:
        # A winner that lost an earlier decision wins because of what has happened since, and waits for it from then on.
        readable_s = min(now_s, max(winner.readable_s, self._news_readable_s))
        blocking_s = max(0.0, now_s - readable_s)
        if self._metrics is not None:
            self._metrics.preempted(blocking_s)
        self._log.write(
            "suspend",
            now_s,
            task=suspended.id,
            rids=suspended.rids,
            checkpoint=suspended.checkpoint,
            for_rids=winner.rids,
            readable_s=round(readable_s, 6),
            blocking_s=round(blocking_s, 6),
        )


def _end_server(refusal: SystemExit) -> NoReturn:
    """End the server with one line. The transfer threads that SGLang has started by now would outlive this thread."""
    if multiprocessing.parent_process() is None:
        raise refusal
    print(refusal, file=sys.stderr, flush=True)
    os.kill(os.getppid(), signal.SIGQUIT)  # what SGLang's schedulers do when they cannot go on
    os._exit(1)


def _never() -> bool:
    return False


def _received_s(req: Any) -> float:
    """When the HTTP server received the request; for one that came another way, when the scheduler did."""
    return float(req.time_stats.created_time or req.time_stats.scheduler_recv_time or time.monotonic())


def _shapes(batch: Any) -> list[PrefillShape]:
    """What a started batch computes, with the cached prefixes that its admission found."""
    return [PrefillShape(*lengths) for lengths in zip(batch.extend_lens, batch.prefix_lens, strict=True)]
