"""The hub of a server, made of its parts when the server starts."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.network import get_local_ip_auto

from sgl_flowprefill.compat import unchecked_attention_backend
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.device import CpuDevice, Device
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.hub.parts import Learning, OneRank
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.hub.work import Work, half
from sgl_flowprefill.policy import Limits, make_policy
from sgl_flowprefill.runtime.agreement import Agreement
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers, install_checkpoints
from sgl_flowprefill.runtime.cuda_device import make_device
from sgl_flowprefill.runtime.event_recorder import EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.learner import LearningTTFT
from sgl_flowprefill.runtime.memory import TaskMemory
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.profile import load_or_measure
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole
from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.runtime.tiles import WHOLE, TileSizes, find_norms, plan_tiles, tile_layers
from sgl_flowprefill.runtime.wakeup import Wakeup, Woken, scheduler_events
from sgl_flowprefill.ttft.budget import throughput_budget_tokens

logger = logging.getLogger(__name__)

RoleT = TypeVar("RoleT", bound=SchedulerRole)


def build(
    scheduler: Any, config: FlowPrefillConfig, make_role: Callable[..., RoleT], decodes: bool = False
) -> Hub[RoleT]:
    """The hub of SGLang's ``scheduler``, which ``decodes`` between the operators of prefills or does not. Raises
    SystemExit with one line for what cannot be served.

    ``make_role`` is called as ``SchedulerRole.make`` is.
    """
    hub: Hub[RoleT]
    tasks = Tasks()
    model_runner = scheduler.tp_worker.model_runner
    unchecked = unchecked_attention_backend(model_runner.prefill_attention_backend_str)
    if unchecked is not None:
        raise SystemExit(f"sgl-flowprefill: {unchecked}")
    wakeup = Wakeup()
    device = make_device(scheduler.device, config.lookahead)
    events = scheduler_events(scheduler, wakeup) if scheduler.tp_group.rank_in_group == 0 else Woken(wakeup)
    if decodes:
        news = lambda: hub.has_news()  # noqa: E731 - also that it is time for a step
    elif isinstance(device, CpuDevice):
        news = events.pending
    else:
        news = lambda: events.pending() or tasks.result_arrived()  # noqa: E731
    agreement = _meet_ranks(scheduler, config, wakeup, device, news)
    recorder = _recorder(scheduler, config, agreement.decides)
    role = scheduler.role = make_role(config, scheduler, tasks, wakeup, device, agreement, recorder)
    executor = Executor(model_runner, agreement.interrupted, device, agreement.ends_waiting)

    layers = [] if config.granularity == "chunk" else find_decoder_layers(model_runner.model)
    ttft, operators = load_or_measure(role, config)
    between_tiles, tiles, progress = None, TileSizes(WHOLE), Progress([])
    if config.granularity == "operator":
        between_tiles = executor.between_tiles
        norms = find_norms(model_runner.model, layers)
        tiles = TileSizes(plan_tiles(config.max_blocking_ms / 1e3, len(layers), len(norms), ttft.model, operators))
        tile_layers(model_runner.model, layers, norms, tiles, between_tiles)
    if config.granularity != "chunk":
        progress = install_checkpoints(model_runner.model, layers, config.granularity, executor.checkpoint)
    slots = AttentionSlots(model_runner, between_tiles, lambda: tiles.now.pairs, with_main=not decodes)
    memory = TaskMemory.plan(model_runner, slots, config.max_suspended, tiles.now.rows)

    batch_tokens = config.max_batch_tokens or throughput_budget_tokens(ttft.model)
    limits = Limits(max_suspended=config.max_suspended, max_batch_tokens=batch_tokens)
    policy = make_policy(config.policy, limits, config.max_starvation_s)
    attention_share = half if operators is None else operators.attention_share
    work = Work(policy, ttft, memory, progress, tasks, attention_share)
    if isinstance(ttft, LearningTTFT):
        ttft.start()
    learning: Learning = ttft if isinstance(ttft, Learning) else Learning()
    hub = Hub(role, work, executor, slots, device, agreement, events, recorder, tiles, learning=learning)
    scheduler.output_streamer.recorder = recorder
    # A full collection of all that has been imported would stop a prefill for half a second.
    gc.collect()
    gc.freeze()
    logger.info(
        "FlowPrefill is on: policy %s, %d preemption checkpoints in a forward pass, at most %d suspended tasks, "
        "batches of up to %d tokens",
        config.policy,
        progress.checkpoints,
        config.max_suspended,
        batch_tokens,
    )
    return hub


def _meet_ranks(
    scheduler: Any, config: FlowPrefillConfig, wakeup: Wakeup, device: Device, news: Callable[[], bool]
) -> Agreement | OneRank:
    """How this rank agrees with the others: the first alone looks at ``news``, sockets and clocks among it."""
    ranks = scheduler.tp_group
    if ranks.world_size == 1:
        return OneRank(news)
    nodes = get_parallel().nnodes
    host = get_local_ip_auto() if nodes > 1 else "127.0.0.1"
    lookahead = 0 if isinstance(device, CpuDevice) else config.lookahead
    first_news = news if ranks.rank_in_group == 0 else None
    return Agreement(scheduler.tp_cpu_group, wakeup, first_news, lookahead=lookahead, nodes=nodes, host=host)


def _recorder(scheduler: Any, config: FlowPrefillConfig, is_first: bool) -> EventRecorder:
    with_metrics = is_first and scheduler.metrics_collector_context.enable_metrics
    metrics = Metrics(scheduler.metrics_collector.labels) if with_metrics else None
    return EventRecorder(config.event_log if is_first else None, metrics)


def end_server(refusal: SystemExit) -> NoReturn:
    """End the server with one line. Transfer threads that SGLang may have started by now would outlive this thread."""
    if multiprocessing.parent_process() is None:
        raise refusal
    print(refusal, file=sys.stderr, flush=True)
    os.kill(os.getppid(), signal.SIGQUIT)  # what SGLang's schedulers do when they cannot go on
    os._exit(1)
