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


def chosen(mode: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """The scheduler of a server, by the function that SGLang calls before it makes its scheduler."""
    from sglang.srt.managers import scheduler as sglang_scheduler
    from sglang.srt.plugins.hook_registry import HookRegistry

    hooks: dict[str, Any] = {}
    monkeypatch.setattr(plugin, "expect", lambda *parts: None)  # of what is not SGLang's own here
    monkeypatch.setattr(HookRegistry, "register", lambda target, hook, kind: hooks.setdefault(target, hook))
    monkeypatch.setattr(sglang_scheduler, "Scheduler", Scheduler)
    monkeypatch.setenv("SGLANG_EAGER_INPUT_NO_COPY", "1")
    plugin.take_scheduler_seams(FlowPrefillConfig())
    hooks[plugin.BEFORE_IT_IS_MADE](SimpleNamespace(disaggregation_mode=mode), gpu_id=0)
    made: type = sglang_scheduler.Scheduler
    return made


@pytest.mark.parametrize(
    ("mode", "expected"), [("prefill", FlowPrefillScheduler), ("null", UnifiedScheduler), ("decode", DecodeScheduler)]
)
def test_servers_that_prefill_get_another_scheduler_than_sglangs(
    mode: str, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chosen(mode, monkeypatch) is expected


@pytest.mark.parametrize(("event_log", "expected"), [(None, Scheduler), ("events.jsonl", DecodeScheduler)])
def test_a_decode_server_without_reports_has_sglangs_unless_it_writes_an_event_log(
    event_log: str | None, expected: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_ANSWER_REPORT", "false")
    if event_log is not None:
        monkeypatch.setenv("FLOWPREFILL_EVENT_LOG", event_log)
    assert chosen("decode", monkeypatch) is expected
