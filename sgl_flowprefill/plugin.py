"""Entry point of the SGLang general plugin: which seams are taken in which process.

SGLang calls ``load`` once in every process that it starts (HTTP server, scheduler, detokenizer). It would only log an
exception and go on without us, so a seam that does not fit ends the process instead.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Final

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig, is_enabled
from sgl_flowprefill.contract import SeamError, expect, installed, is_supported, supported

logger = logging.getLogger(__name__)

SCHEDULER_PARTS: Final = (
    "hooks",
    "loop",
    "scheduler",
    "requests",
    "request_spans",
    "disaggregation",
    "caches",
    "host_cache",
    "forward_state",
    "model",
    "profile",
    "unified",
)
"""Parts of the contract that the scheduler works with, beside those of the seams, which check their own."""
BEFORE_IT_IS_MADE: Final = "sglang.srt.managers.scheduler.configure_scheduler_process"
"""What SGLang calls before it makes its scheduler, and with the options of the server."""
ENGINE: Final = "sglang.srt.entrypoints.engine"
"""What a process has imported that starts the others of a server."""
SAYS_ROLE: Final = "sglang.srt.runtime_context.publish"
"""What SGLang calls in each of its processes, with the role that it has, before it makes anything there."""
HTTP_ROLE: Final = "tokenizer"
"""The role of the process that serves HTTP, or has an engine in Python, and has started the others."""


def load() -> None:
    """Take the seams that the environment asks for. Ends the process with one line when that is not possible."""
    with _ending_in_one_line():
        _load()


@contextmanager
def _ending_in_one_line() -> Iterator[None]:
    try:
        yield
    except (ConfigError, SeamError) as error:
        raise SystemExit(f"sgl-flowprefill: {error}") from error


def _load() -> None:
    _take_platform_seams()
    if not is_enabled():
        return
    config = FlowPrefillConfig.from_env()
    runs_scheduler = "sglang.srt.managers.scheduler" in sys.modules
    if runs_scheduler:
        from sgl_flowprefill import platforms
        from sgl_flowprefill.patches import before_0_5_23

        before_0_5_23.apply()
        if not platforms.is_active():
            from sgl_flowprefill.runtime import kv_share

            kv_share.apply()
    if multiprocessing.parent_process() is None:
        _take_option_seams()
        _take_http_seams(config)
        return
    if runs_scheduler:
        take_scheduler_seams(config)
    if ENGINE in sys.modules:
        _take_option_seams()
        _take_http_seams_when_it_is_one(config)


def _take_option_seams() -> None:
    """Options are made in the process that starts the others."""
    from sgl_flowprefill import platforms
    from sgl_flowprefill.patches import attention_choice, options, static_memory

    expect("hooks")
    options.apply()
    if not platforms.is_active():
        static_memory.apply()
        attention_choice.apply()


def _take_http_seams_when_it_is_one(config: FlowPrefillConfig) -> None:
    """A process that another one has started may be a server's first, too, as SGLang's ``launch_server_process`` starts
    it, or a scheduler's whose program imports the engine. SGLang says which before it makes anything there.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    @cache
    def take() -> None:
        with _ending_in_one_line():
            _take_http_seams(config)
        HookRegistry.apply_hooks()

    def take_at_the_start(*_args: Any, role: str, **_options: Any) -> None:
        if role == HTTP_ROLE:
            take()

    HookRegistry.register(SAYS_ROLE, take_at_the_start, HookType.BEFORE)


def _take_http_seams(config: FlowPrefillConfig) -> None:
    """Requests and health checks enter in the process that starts the others."""
    from sgl_flowprefill.patches import answer_report, closing, health, live, overload, request_slo, request_times

    if not is_supported(installed()):
        logger.warning(
            "SGLang %s is outside of %s, the versions that this release of sgl-flowprefill supports; what it works "
            "with is as expected",
            installed(),
            supported(),
        )
    request_times.apply()
    request_slo.apply(config)
    health.apply()
    live.apply(config)
    closing.apply()
    if config.answer_report:
        answer_report.apply()
    if config.refuses:
        overload.apply()


def take_scheduler_seams(config: FlowPrefillConfig) -> None:
    """Processes that run a scheduler have imported SGLang's before they load plugins, in which this is called."""
    # SGLang's eager runner copies a batch's inputs into buffers that the next forward overwrites, unless told not to.
    os.environ["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sgl_flowprefill import platforms
    from sgl_flowprefill.patches import carried_report, decode_order, handed_back, page_indices, request_times

    expect(*SCHEDULER_PARTS, *(() if platforms.is_active() else ("attention",)))
    request_times.apply()
    handed_back.apply()
    page_indices.apply()
    if config.answer_report:
        carried_report.apply()
    if config.policy != "fcfs":
        decode_order.apply(config)
    HookRegistry.register(BEFORE_IT_IS_MADE, _choose_scheduler, HookType.BEFORE)


def _choose_scheduler(server_args: Any, *_args: Any, **_kwargs: Any) -> None:
    """A prefill server and one without disaggregation get our schedulers, and a decode server SGLang's own, whose
    answers may have reports and whose requests may be in an event log.
    """
    from sglang.srt.managers import scheduler as scheduler_module

    config = FlowPrefillConfig.from_env()
    if server_args.disaggregation_mode == "prefill":
        from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

        scheduler_module.Scheduler = FlowPrefillScheduler
    elif server_args.disaggregation_mode == "null":
        from sgl_flowprefill.runtime.unified_scheduler import UnifiedScheduler

        scheduler_module.Scheduler = UnifiedScheduler
    elif config.answer_report or config.event_log is not None:
        from sgl_flowprefill.runtime.decode_scheduler import DecodeScheduler

        scheduler_module.Scheduler = DecodeScheduler


def _take_platform_seams() -> None:
    """Seams that serve both schedulers: the portable CPU platform's, and those that the environment asks for."""
    from sgl_flowprefill import platforms
    from sgl_flowprefill.patches import lone_prefill, made_weights

    if platforms.is_active():
        expect("hooks", "platform")
        if not lone_prefill.is_enabled():
            from sgl_flowprefill.patches import nixl_dram, nixl_sleep

            nixl_dram.apply()
            nixl_sleep.apply()
        if multiprocessing.parent_process() is None:
            from sgl_flowprefill.patches import token_ids

            token_ids.apply()
    if "sglang.srt.managers.scheduler" in sys.modules:
        if platforms.is_active():
            from sgl_flowprefill.patches import cpu_tp, dp_attention_cpu, draft_cpu, experts_cpu, hicache_cpu, lora_cpu

            expect("cpu_attention")
            cpu_tp.apply()
            draft_cpu.apply()
            experts_cpu.apply()
            hicache_cpu.apply()
            lora_cpu.apply()
            dp_attention_cpu.apply()
        from sgl_flowprefill.patches import affinity, decode_idle, wakeups

        if is_enabled() or decode_idle.is_enabled():
            wakeups.apply()
        if lone_prefill.is_enabled():
            lone_prefill.apply()
        if made_weights.is_enabled():
            made_weights.apply()
        if affinity.is_enabled():
            affinity.apply()
        if decode_idle.is_enabled():
            decode_idle.apply()
