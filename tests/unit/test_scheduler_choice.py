"""Which scheduler a server gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill import plugin
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.runtime.decode_scheduler import DecodeScheduler
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.unified_scheduler import UnifiedScheduler


@pytest.mark.parametrize(
    ("mode", "expected"), [("prefill", FlowPrefillScheduler), ("null", UnifiedScheduler), ("decode", DecodeScheduler)]
)
def test_servers_that_prefill_get_another_scheduler_than_sglangs(
    mode: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the function that SGLang calls before it makes its scheduler."""
    from sglang.srt.managers import scheduler as sglang_scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: dict[str, Any] = {}
    monkeypatch.setattr(plugin, "expect", lambda *parts: None)  # of what is not SGLang's own here
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.setdefault(target, hook))
    monkeypatch.setattr(sglang_scheduler, "Scheduler", Scheduler)
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "1")
    plugin.take_scheduler_seams(FlowPrefillConfig())
    hooks[plugin.BEFORE_IT_IS_MADE](SimpleNamespace(disaggregation_mode=mode), gpu_id=0)
    assert sglang_scheduler.Scheduler is expected
