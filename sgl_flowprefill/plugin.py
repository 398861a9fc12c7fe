"""Entry point of the SGLang general plugin: which seams are taken in which process.

SGLang calls ``load`` once in every process that it starts (HTTP server, scheduler, detokenizer). It would only log an
exception and go on without us, so a seam that does not fit ends the process instead.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from typing import Any, Final

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig, is_enabled

LOOP: Final = "sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin.event_loop_normal_disagg_prefill"
LOOP_CALLS: Final = (
    "self.ingest_requests()",
    "self.disagg_prefill_bootstrap_queue.pop_bootstrapped()",
    "self.waiting_queue.extend(",
    "self.get_next_disagg_prefill_batch_to_run(",
    "self.ngram_embedding_manager.prepare_for_forward(",
    "self.maybe_prefetch_staging_for_batch(batch)",
    "self.run_batch(batch)",
    "self.process_batch_result(batch, result)",
    "self.on_idle()",
    "self.process_disagg_prefill_inflight_queue()",
)
"""What SGLang's loop calls, all of which ``runtime.prefill_role`` does too, in an order of its own."""
MAKER: Final = "sglang.srt.managers.scheduler.run_scheduler_process"
BEFORE_IT_IS_MADE: Final = "sglang.srt.managers.scheduler.configure_scheduler_process"
"""What SGLang calls before it makes its scheduler, and with the options of the server."""


def load() -> None:
    """Take the seams that the environment asks for. Ends the process with one line when that is not possible."""
    from sgl_flowprefill.patches.base import SeamError

    try:
        _load()
    except (ConfigError, SeamError) as error:
        raise SystemExit(f"sgl-flowprefill: {error}") from error


def _load() -> None:
    _take_platform_seams()
    if not is_enabled():
        return
    config = FlowPrefillConfig.from_env()
    if multiprocessing.parent_process() is None:
        _take_http_seams()
    elif "sglang.srt.managers.scheduler" in sys.modules:
        _take_scheduler_seams(config)


def _take_http_seams() -> None:
    """Requests and health checks enter in the process that SGLang was started as."""
    from sgl_flowprefill.patches import health, options, request_slo, request_times

    options.apply()
    request_times.apply()
    request_slo.apply()
    health.apply()


def _take_scheduler_seams(config: FlowPrefillConfig) -> None:
    """Of the processes that SGLang spawns, those that run a scheduler have imported it before they load plugins."""
    # SGLang's eager runner copies a batch's inputs into buffers that the next forward overwrites, unless told not to.
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_flowprefill.patches import decode_order, request_times
    from sgl_flowprefill.patches.base import expect_parameters, expect_source

    expect_source("scheduler", LOOP, *LOOP_CALLS)
    expect_parameters("scheduler", BEFORE_IT_IS_MADE, ("server_args", "gpu_id"))
    expect_source("scheduler", MAKER, "configure_scheduler_process(", "scheduler = Scheduler(server_args, port_args)")
    request_times.apply()
    if config.policy != "fcfs":
        decode_order.apply(config)
    HookRegistry.register(BEFORE_IT_IS_MADE, _choose_scheduler, HookType.BEFORE)


def _choose_scheduler(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """A prefill server gets our scheduler, and every other server SGLang's own."""
    if server_args.disaggregation_mode == "prefill":
        from sglang.srt.managers import scheduler

        from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

        scheduler.Scheduler = FlowPrefillScheduler


def _take_platform_seams() -> None:
    """Seams that serve both schedulers: the portable CPU platform's, and those that the environment asks for."""
    from sgl_flowprefill import platforms
    from sgl_flowprefill.patches import lone_prefill, made_weights

    if platforms.is_active():
        if not lone_prefill.is_enabled():
            from sgl_flowprefill.patches import nixl_dram, nixl_sleep

            nixl_dram.apply()
            nixl_sleep.apply()
        if multiprocessing.parent_process() is None:
            from sgl_flowprefill.patches import token_ids

            token_ids.apply()
    if "sglang.srt.managers.scheduler" in sys.modules:
        if platforms.is_active():
            from sgl_flowprefill.patches import cpu_tp

            cpu_tp.apply()
        from sgl_flowprefill.patches import affinity, decode_idle, wakeups

        wakeups.apply()
        if lone_prefill.is_enabled():
            lone_prefill.apply()
        if made_weights.is_enabled():
            made_weights.apply()
        if affinity.is_enabled():
            affinity.apply()
        if decode_idle.is_enabled():
            decode_idle.apply()
