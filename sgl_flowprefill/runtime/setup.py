"""What FlowPrefill adds to SGLang's scheduler, made and connected when a prefill server starts."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NoReturn

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.runtime_context import get_disagg, get_parallel
from sglang.srt.utils.network import get_local_ip_auto

from sgl_flowprefill.compat import incompatible_option, unchecked_attention_backend
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.patches import wakeups
from sgl_flowprefill.policy import Limits, Policy, make_policy
from sgl_flowprefill.runtime.agreement import Agreement
from sgl_flowprefill.runtime.checkpoints import Progress, find_decoder_layers, install_checkpoints
from sgl_flowprefill.runtime.device import CpuDevice, Device, make_device
from sgl_flowprefill.runtime.journal import Journal, JournalledStreamer
from sgl_flowprefill.runtime.memory import TaskMemory
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.profile import load_or_measure
from sgl_flowprefill.runtime.task import AttentionSlots, Executor, PrefillTask
from sgl_flowprefill.runtime.tiles import WHOLE, TileSizes, find_norms, plan_tiles, tile_layers
from sgl_flowprefill.runtime.waiting import WaitingRequest, WaitingRequests
from sgl_flowprefill.runtime.wakeup import Wakeup, scheduler_events
from sgl_flowprefill.ttft.budget import throughput_budget_tokens

logger = logging.getLogger(__name__)

OUTSTANDING_REQUESTS: Final = 8192
"""Requests that may wait, run and be sent at a time, at least. Each holds a metadata buffer from the end of its
bootstrap on, and one that finds none is not seen by the policy."""
NO_TASK: Final = -1
"""In place of a task's id."""


class PreparedScheduler(Scheduler):
    """SGLang's scheduler and, on a prefill server, all that the hub works with (``runtime.scheduler``)."""

    waiting_queue: list[Any]
    max_running_requests: int

    def __init__(self, server_args: Any, *args: Any, **kwargs: Any) -> None:
        if server_args.disaggregation_mode == DisaggregationMode.PREFILL.value:
            refusal = incompatible_option(resolving_view(server_args))
            if refusal is not None:  # of a server that was started past patches.options
                _end_server(SystemExit(f"sgl-flowprefill: {refusal}"))
        # What Scheduler.__init__ may already ask for, before the rest of our state can exist.
        self._is_on = False
        """Whether this is the scheduler of a prefill server, ready to serve."""
        self._live: list[PrefillTask] = []
        """Tasks that have started and are not done, in the order of their start, which is the same on all ranks."""
        self._finishing: deque[PrefillTask] = deque()
        """Tasks that are done, whose results are on their way from the device."""
        self._reindexed: Any = None
        """The last request whose KV indices were queued again after its prefill had run."""
        super().__init__(server_args, *args, **kwargs)
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            try:
                self._prepare(FlowPrefillConfig.from_env())
            except SystemExit as refusal:
                _end_server(refusal)

    def init_disaggregation(self) -> None:
        """SGLang makes metadata buffers for twice the requests that may run at a time. A buffer takes a few kilobytes,
        and a request that may run a row as long as the context.
        """
        may_run: int = self.max_running_requests
        if get_disagg().disaggregation_mode == DisaggregationMode.PREFILL.value:
            self.max_running_requests = max(may_run, OUTSTANDING_REQUESTS // 2)
        super().init_disaggregation()
        self.max_running_requests = may_run

    def _prepare(self, config: FlowPrefillConfig) -> None:
        self._config = config = self.tp_group.broadcast_object(config)  # the environment of another node may differ
        model_runner = self.tp_worker.model_runner
        unchecked = unchecked_attention_backend(model_runner.prefill_attention_backend_str)
        if unchecked is not None:
            raise SystemExit(f"sgl-flowprefill: {unchecked}")
        self._running: PrefillTask | None = None
        """The live task that ran last, and has not been suspended for another."""
        self._stopped_s = 0.0
        """When a task was last done or interrupted."""
        self._tasks_started = 0
        self._kv_is_short = False
        """Whether KV for a new task was asked for in vain, and none has been freed since."""
        self._last_stall_check_s = 0.0
        self._waiting = WaitingRequests()
        self._wakeup = Wakeup()
        wakeups.expect_applied()
        wakeups.subscribe(self._on_transfer_status)
        self._device: Device = make_device(self.device, config.lookahead)
        # Of several tensor-parallel ranks, the first alone looks at sockets and clocks, and decides.
        self._events = scheduler_events(self, self._wakeup) if self.tp_group.rank_in_group == 0 else None
        news = None
        if self._events is not None:
            news = self._events.pending if isinstance(self._device, CpuDevice) else self._has_news
        self._agreement = self._agree_with_ranks(news) if self.tp_group.world_size > 1 else None
        self._agreed_arrival = NO_TASK
        """Of several ranks: id of the task that finishes next, if rank 0 had its result when they last met."""
        if self._agreement is not None:
            # Nothing ends a rank's wait for its device early, or ranks would not do the same.
            self._ends_waiting: Callable[[], bool] = _never
            self._executor = Executor(model_runner, self._agreement.interrupted, self._device, _never)
        else:
            assert news is not None
            self._ends_waiting = news
            self._executor = Executor(model_runner, news, self._device)

        self._progress = Progress([])
        layers = [] if config.granularity == "chunk" else find_decoder_layers(model_runner.model)
        self._ttft, self._operators = load_or_measure(self, config)
        between_tiles = None
        self._tiles = TileSizes(WHOLE)
        if config.granularity == "operator":
            between_tiles = self._executor.between_tiles
            norms = find_norms(model_runner.model, layers)
            self._tiles = TileSizes(
                plan_tiles(config.max_blocking_ms / 1e3, len(layers), len(norms), self._ttft, self._operators)
            )
            tile_layers(model_runner.model, layers, norms, self._tiles, between_tiles)
        if config.granularity != "chunk":
            self._progress = install_checkpoints(
                model_runner.model, layers, config.granularity, self._executor.checkpoint
            )
        self._slots = AttentionSlots(model_runner, between_tiles, lambda: self._tiles.now.pairs)
        self._memory = TaskMemory.plan(model_runner, self._slots, config.max_suspended, self._tiles.now.rows)

        batch_tokens = config.max_batch_tokens or throughput_budget_tokens(self._ttft)
        limits = Limits(max_suspended=config.max_suspended, max_batch_tokens=batch_tokens)
        self._policy: Policy[WaitingRequest, PrefillTask]
        self._policy = make_policy(config.policy, limits, config.max_starvation_s)
        is_first, with_metrics = self._events is not None, self.metrics_collector_context.enable_metrics
        metrics = Metrics(self.metrics_collector.labels) if is_first and with_metrics else None
        self._journal = Journal(config.event_log if is_first else None, metrics)
        self.output_streamer.journal = self._journal
        # A full collection of all that has been imported would stop a prefill for half a second.
        gc.collect()
        gc.freeze()
        self._is_on = True
        logger.info(
            "FlowPrefill is on: policy %s, %d checkpoints in a forward pass, at most %d suspended tasks, batches of up "
            "to %d tokens",
            config.policy,
            self._progress.checkpoints,
            config.max_suspended,
            batch_tokens,
        )

    def get_output_streamer_class(self) -> type[JournalledStreamer]:
        """SGLang's hook for what its scheduler hands answers to."""
        return JournalledStreamer

    def _agree_with_ranks(self, news: Callable[[], bool] | None) -> Agreement:
        nodes = get_parallel().nnodes
        host = get_local_ip_auto() if nodes > 1 else "127.0.0.1"
        lookahead = 0 if isinstance(self._device, CpuDevice) else self._config.lookahead
        return Agreement(self.tp_cpu_group, self._wakeup, news, lookahead=lookahead, nodes=nodes, host=host)

    def _has_news(self) -> bool:
        """Whether the hub has something to look at: an event, or a result that has arrived from the device."""
        assert self._events is not None
        return self._events.pending() or self._result_arrived()

    def _result_arrived(self) -> bool:
        """Whether the task that finishes next has its result on the host."""
        return bool(self._finishing) and self._finishing[0].result.copy_done.query()

    def _on_transfer_status(self, bootstrap_room: int, status: Any) -> None:
        """On a transfer thread: a bootstrap is complete, or a transfer has ended."""
        self._waiting.note_bootstrap(bootstrap_room, status)
        self._wakeup.notify()


def _end_server(refusal: SystemExit) -> NoReturn:
    """End the server with one line. Transfer threads that SGLang may have started by now would outlive this thread."""
    if multiprocessing.parent_process() is None:
        raise refusal
    print(refusal, file=sys.stderr, flush=True)
    os.kill(os.getppid(), signal.SIGQUIT)  # what SGLang's schedulers do when they cannot go on
    os._exit(1)


def _never() -> bool:
    return False
