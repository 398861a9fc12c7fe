"""Entry point of the SGLang general plugin: which seams are taken in which process.

SGLang calls ``load`` once in every process that it starts (HTTP server, scheduler, detokenizer). It would only log an
exception and go on without us, so a seam that does not fit ends the process instead.
"""

from __future__ import annotations

import sys

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig, is_enabled


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
    FlowPrefillConfig.from_env()
    from sgl_flowprefill.patches import request_slo

    request_slo.apply()
    if "sglang.srt.managers.scheduler" in sys.modules:
        # The scheduler module is there in the processes that run a scheduler; importing it elsewhere costs seconds.
        from sglang.srt.plugins.hook_registry import HookRegistry, HookType

        from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler

        HookRegistry.register("sglang.srt.managers.scheduler.Scheduler", FlowPrefillScheduler, HookType.REPLACE)


def _take_platform_seams() -> None:
    """Seams that serve both schedulers: the portable CPU platform's, and those that the environment asks for."""
    from sgl_flowprefill import platforms

    if platforms.is_active():
        from sgl_flowprefill.patches import nixl_dram

        nixl_dram.apply()
