"""The hub of a server, made of its parts when the server starts."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final, NoReturn, TypeVar

from sglang.srt.observability.trace import get_global_tracing_enabled
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils.network import get_local_ip_auto

from sgl_flowprefill.compat import unchecked_attention_backend
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import RecentEvents
from sgl_flowprefill.hub.ahead import StepAhead
from sgl_flowprefill.hub.device import CpuDevice, Device
from sgl_flowprefill.hub.loop import MATCH_ROUNDS, Hub
from sgl_flowprefill.hub.parts import Exploration, Learning, OneRank
from sgl_flowprefill.hub.progress import Progress
from sgl_flowprefill.hub.shedding import Shedding
from sgl_flowprefill.hub.task import Tasks
from sgl_flowprefill.hub.work import Work, half
from sgl_flowprefill.policy import Limits, make_policy
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.runtime.agreement import Agreement
from sgl_flowprefill.runtime.checkpoints import find_decoder_layers, install_checkpoints
from sgl_flowprefill.runtime.cuda_device import make_device
from sgl_flowprefill.runtime.data_parallel import JointRole, check_idle_pass
from sgl_flowprefill.runtime.draft_model import draft_runner, kept_hidden_states, whole_model
from sgl_flowprefill.runtime.event_recorder import AnswerReports, EventRecorder
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.experts import uncounted
from sgl_flowprefill.runtime.exploration import Explorer
from sgl_flowprefill.runtime.forward_state import ForwardState
from sgl_flowprefill.runtime.learner import LearningTTFT
from sgl_flowprefill.runtime.memory import TaskMemory
from sgl_flowprefill.runtime.metrics import Metrics
from sgl_flowprefill.runtime.module_state import check_modules
from sgl_flowprefill.runtime.point_log import PointLog
from sgl_flowprefill.runtime.profile import load_or_measure
from sgl_flowprefill.runtime.request_spans import SpanRecorder
from sgl_flowprefill.runtime.scheduler_role import SchedulerRole, tell_of_evictions
from sgl_flowprefill.runtime.slots import AttentionSlots
from sgl_flowprefill.runtime.tiles import (
    WHOLE,
    TilePlan,
    TileSizes,
    find_norms,
    has_dense_mlps,
    has_whole_mlps,
    tile_layers,
)
from sgl_flowprefill.runtime.wakeup import CalledEvents, CallingEvents, EventSource, Wakeup, Woken, scheduler_events
from sgl_flowprefill.shadow import Shadows
from sgl_flowprefill.slo.policy import PolicyError
from sgl_flowprefill.slo.policy_file import read_policy
from sgl_flowprefill.slo.priorities import PriorityClasses, is_low_first
from sgl_flowprefill.ttft.budget import throughput_budget_tokens

logger = logging.getLogger(__name__)

RoleT = TypeVar("RoleT", bound=SchedulerRole)

GIB: Final = 1 << 30
UNUSED_PRIORITIES: Final = (
    "FlowPrefill: --enable-priority-scheduling does not change the order of prefills while neither "
    "--flowprefill-priority-ttft-slo nor the priorities of --flowprefill-slo-policy say which objectives priorities "
    "stand for"
)
OPPOSITE_PRIORITIES: Final = (
    "FlowPrefill: prefills of %s priorities go first, as FlowPrefill's options say, though SGLang is started %s "
    "--schedule-low-priority-values-first; by that go only --max-queued-requests and --retraction-policy priority"
)
NO_PREFILL_LENGTHS: Final = (
    "sgl-flowprefill: --attention-backend fa3 cannot work with this model on a server that prefills and decodes: each "
    "task notes how long its prompts are in an attention backend of its own, and decode steps, which attend to the "
    "whole prompt beside a window of the answer, look into another; serve it without FlowPrefill"
)


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
    draft, model = draft_runner(scheduler), whole_model(scheduler)
    of_steps = [model_runner.decode_attention_backend_str] if decodes else []
    check_modules(model_runner.model, config.granularity, [model_runner.prefill_attention_backend_str, *of_steps])
    check_settings(scheduler, config, decodes, (model_runner,) if draft is None else (model_runner, draft))
    wakeup = Wakeup()
    device = make_device(scheduler.device, config.lookahead)
    is_joint = bool(scheduler.attn_dp_enabled)  # each rank has requests of its own, and all compute them together
    events = _events(scheduler, wakeup, is_joint)
    agreement = _meet_ranks(scheduler, config, wakeup, device, news=lambda: hub.has_news())
    if is_joint:
        assert isinstance(agreement, Agreement)
        called = agreement.exchange(events.address if isinstance(events, CalledEvents) else None)
        if isinstance(events, CallingEvents):
            events.ranks = [address for address in called if address is not None]
    recorder = _recorder(scheduler, config, agreement.decides, decodes)
    role = scheduler.role = make_role(config, scheduler, tasks, wakeup, device, agreement, recorder)
    loads = scheduler.tp_worker.hicache_layer_transfer_counter
    capture = partial(ForwardState.capture, loads=loads, draft_runner=draft, gathers=is_joint)
    interrupted = agreement.interrupted
    if isinstance(events, CalledEvents):
        interrupted = events.telling(interrupted)
    executor = Executor(model_runner, interrupted, device, agreement.ends_waiting, capture)

    # A rank that is idle in a joint pass skips attention, and no layer; and tiles are as many as a rank has tokens.
    granularity = "layer" if is_joint and config.granularity == "operator" else config.granularity
    layers = [] if granularity == "chunk" else find_decoder_layers(model)
    ttft, operators = load_or_measure(role, config)
    between_tiles, tiles, progress = None, TileSizes(lambda yardstick_s: WHOLE), Progress([])
    if granularity == "operator":
        between_tiles = executor.between_tiles
        norms = find_norms(model, layers)
        plan = TilePlan.of(model, layers, norms, config.max_blocking_ms / 1e3, operators)
        tiles = TileSizes(plan.tiles, ttft.yardstick_s)
        tile_layers(model, layers, norms, tiles, between_tiles)
    if granularity != "chunk":
        progress = install_checkpoints(model, layers, granularity, executor.checkpoint)
    slots = AttentionSlots(
        model_runner, between_tiles, lambda: tiles.now.pairs, with_main=not decodes, draft_runner=draft
    )
    mlp_rows = None if has_whole_mlps(model, layers) else lambda: tiles.now.rows
    dp_ranks = scheduler.tp_size if is_joint else 1
    kept, streams = kept_hidden_states(scheduler), scheduler.max_running_requests if decodes else 0
    shared = 1 if is_joint else scheduler.tp_size
    inside, in_mlps = granularity == "operator", has_dense_mlps(model, layers)
    memory = TaskMemory.plan(
        model_runner, slots, config.max_suspended, mlp_rows, kept, dp_ranks, streams, shared, inside, in_mlps
    )

    def batch_tokens() -> int:
        return config.max_batch_tokens or throughput_budget_tokens(ttft.model)

    limits = Limits(max_suspended=config.max_suspended, max_batch_tokens=batch_tokens())
    policy = make_policy(config.order, limits, config.max_starvation_s)
    attention_share = half if operators is None else operators.attention_share
    shedding = None
    if config.refuses and agreement.decides:
        shedding = Shedding(config.overload == "shed", config.queue_limits)
        scheduler.shadows = Shadows()
        recorder.listen(scheduler.shadows.read)
    work = Work(
        role.decide(policy, config),
        ttft,
        memory,
        progress,
        tasks,
        attention_share,
        shedding=shedding,
        fitting=role.fitting,
        held_tokens=role.held_tokens,
        batch_tokens=batch_tokens,
        dp_ranks=dp_ranks,
    )
    recorder.watch(work, kv_token_bytes(model_runner) + memory.activations.checkpoint_bytes(1))
    exploration = Exploration()
    learning = ttft if isinstance(ttft, LearningTTFT) else None
    if learning is not None:
        learning.start()
    if config.learning and config.exploration_share and not is_joint:
        exploration = Explorer(
            SchedulerEngine(role),
            executor,
            slots,
            device,
            learning,
            recorder,
            agreement,
            pending=lambda: hub.has_news(),
            share=config.exploration_share,
            uncounted=uncounted,
        )
    hub = Hub(
        role,
        work,
        executor,
        slots,
        device,
        agreement,
        events,
        recorder,
        tiles,
        learning=ttft if isinstance(ttft, Learning) else Learning(),
        exploration=exploration,
        decoder=role.decoder,
        ahead=StepAhead() if config.step_ahead and role.steps_ahead else None,
        sheds=config.refuses,
        refuse=role.shed,
        match_rounds=1 if is_joint else MATCH_ROUNDS,  # each rank matches its own requests
    )
    tell_of_evictions(scheduler.tree_cache, work.waiting.evicted)
    if isinstance(role, JointRole):
        check_idle_pass(role, executor, progress.checkpoints)
    scheduler.output_streamer.recorder = recorder
    if config.event_points and config.events_file is not None and agreement.decides:
        executor.point_log = PointLog(recorder, progress)
    # Other ranks answer requests of their own, or send KV cache and tell a decode server with it. On another node their
    # clock is not the one by which requests were received.
    tells = agreement.decides or ((is_joint or not decodes) and get_parallel().nnodes == 1)
    if config.answer_report and tells:
        scheduler.output_streamer.reports = AnswerReports(recorder)
    # A full collection of all that has been imported would stop a prefill for half a second.
    gc.collect()
    gc.freeze()
    logger.info(
        "FlowPrefill is on: policy %s, %d preemption checkpoints in a forward pass, at most %d suspended tasks, "
        "batches of up to %d tokens",
        config.order,
        progress.checkpoints,
        config.max_suspended,
        limits.max_batch_tokens,
    )
    return hub


def check_settings(scheduler: Any, config: FlowPrefillConfig, decodes: bool, model_runners: Iterable[Any]) -> None:
    """Raises SystemExit with one line for settings that cannot be served together, of which the command line alone does
    not tell."""
    for runner in model_runners:
        unchecked = unchecked_attention_backend(runner.prefill_attention_backend_str)
        if unchecked is not None:
            raise SystemExit(f"sgl-flowprefill: {unchecked}")
        if decodes and runner.prefill_attention_backend_str == "fa3" and getattr(runner, "prefill_aware_swa", False):
            raise SystemExit(NO_PREFILL_LENGTHS)
    is_joint = config.refuses and bool(scheduler.attn_dp_enabled)
    problem = config.refusing_problem(decodes=decodes, is_joint=is_joint)
    if problem is not None:
        raise SystemExit(f"sgl-flowprefill: {problem}")
    if scheduler.enable_priority_scheduling:
        _tell_of_priorities(config, bool(scheduler.schedule_low_priority_values_first))


def _tell_of_priorities(config: FlowPrefillConfig, low_first: bool) -> None:
    """Warn where the priorities of requests stand for nothing, or for other objectives than SGLang's direction says."""
    numbers: tuple[int, ...] = ()
    if config.priority_ttft_slo is not None:
        numbers = PriorityClasses.parse(config.priority_ttft_slo).numbers
    elif config.slo_policy is not None:
        try:
            numbers = tuple(read_policy(config.slo_policy).priorities)
        except PolicyError:  # by the file of the HTTP process, which may be on another node, requests go
            return
    if not numbers:
        logger.warning(UNUSED_PRIORITIES)
    elif len(numbers) > 1 and is_low_first(numbers) != low_first:
        logger.warning(OPPOSITE_PRIORITIES, "high" if low_first else "low", "with" if low_first else "without")


def _events(scheduler: Any, wakeup: Wakeup, is_joint: bool) -> EventSource | Woken:
    """What wakes this rank. The first one has the sockets; all have some where each has requests of its own."""
    is_first = scheduler.tp_group.rank_in_group == 0
    if not is_joint:
        return scheduler_events(scheduler, wakeup) if is_first else Woken(wakeup)
    return scheduler_events(scheduler, wakeup, CallingEvents if is_first else CalledEvents)


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


def _recorder(scheduler: Any, config: FlowPrefillConfig, is_first: bool, decodes: bool) -> EventRecorder:
    with_metrics = is_first and scheduler.metrics_collector_context.enable_metrics
    metrics = Metrics(scheduler.metrics_collector.labels, decodes=decodes) if with_metrics else None
    recent = RecentEvents(config.recent_events) if is_first and config.recent_events else None
    kind = SpanRecorder if get_global_tracing_enabled() else EventRecorder
    recorder = kind(config.events_file if is_first else None, metrics, decodes, recent)
    recorder.begin(decodes)
    return recorder


def kv_token_bytes(model_runner: Any) -> float:
    """What a token takes in SGLang's KV pool."""
    token_to_kv_pool = model_runner.token_to_kv_pool
    return float(token_to_kv_pool.mem_usage * GIB / token_to_kv_pool.size)


def end_server(refusal: SystemExit) -> NoReturn:
    """End the server with one line. Transfer threads that SGLang may have started by now would outlive this thread."""
    if multiprocessing.parent_process() is None:
        raise refusal
    print(refusal, file=sys.stderr, flush=True)
    os.kill(os.getppid(), signal.SIGQUIT)  # what SGLang's schedulers do when they cannot go on
    os._exit(1)
