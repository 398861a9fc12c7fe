"""SGLang's priorities stand for objectives, in both directions."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler

from sgl_flowprefill.config import ConfigError, FlowPrefillConfig
from sgl_flowprefill.deadline import objective, resolver
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from sgl_flowprefill.runtime.setup import check_settings
from sgl_flowprefill.slo import PriorityClasses

HIGH_FIRST = "10:0.5,0:2,-10:30"
LOW_FIRST = "0:0.5,10:2,20:30"


@pytest.mark.parametrize(
    ("text", "priority", "slo"),
    [
        *((HIGH_FIRST, priority, 0.5) for priority in (10, 11, 10**12)),
        *((HIGH_FIRST, priority, 2.0) for priority in (9, 1, 0)),
        *((HIGH_FIRST, priority, 30.0) for priority in (-1, -10, -11, -(10**12))),
        *((LOW_FIRST, priority, 0.5) for priority in (0, -1, -(10**12))),
        *((LOW_FIRST, priority, 2.0) for priority in (1, 9, 10)),
        *((LOW_FIRST, priority, 30.0) for priority in (11, 20, 21)),
        ("5:1", 3, 1.0),
        (" -10:30, 10:.5 ,0:2", 4, 2.0),
    ],
)
def test_a_priority_belongs_to_the_most_urgent_class_that_it_reaches(text: str, priority: int, slo: float) -> None:
    assert PriorityClasses.parse(text).slo_s(priority) == slo


@pytest.mark.parametrize(
    "text",
    ["", "10", "10:", ":1", "high:1", "1.5:1", "1:-2", "1:nan", "1:0", "1:1e3", "1:2,1:3", "1:2,2:2", "0:1,1:3,2:2"],
)
def test_what_is_no_order_of_classes_is_refused_with_the_value(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--flowprefill-priority-ttft-slo ") as error:
        FlowPrefillConfig.parse({"priority_ttft_slo": text})
    assert f" {text}: " in str(error.value)


def request(priority: int | None, **custom_params: Any) -> Any:
    return SimpleNamespace(
        rid="r", priority=priority, sampling_params=SimpleNamespace(custom_params=custom_params), input_text=None
    )


def test_an_objective_of_the_request_counts_before_its_priority_and_that_before_the_default() -> None:
    config = FlowPrefillConfig(priority_ttft_slo=HIGH_FIRST, default_ttft_slo=4.0)
    defaults = resolver(FlowPrefillConfig.from_env(config.to_env()))
    assert objective(request(10, ttft_slo=0.25), defaults).ttft_s == 0.25
    assert objective(request(10), defaults).ttft_s == 0.5
    for none in (None, sys.maxsize, -sys.maxsize - 1):  # what SGLang has for a request without one
        assert objective(request(none), defaults).ttft_s == 4.0


def test_without_classes_a_priority_says_nothing() -> None:
    assert objective(request(10), resolver(FlowPrefillConfig(default_ttft_slo=4.0))).ttft_s == 4.0


@pytest.mark.parametrize(
    ("mapping", "low_first", "told"),
    [
        ("", False, "neither --flowprefill-priority-ttft-slo nor the priorities of --flowprefill-slo-policy"),
        ("file without", False, "neither --flowprefill-priority-ttft-slo nor the priorities"),
        (HIGH_FIRST, False, ""),
        (LOW_FIRST, True, ""),
        ("5:1", True, ""),
        ("file", False, ""),
        (HIGH_FIRST, True, "prefills of high priorities go first, .* is started with --schedule-low-priority"),
        (LOW_FIRST, False, "prefills of low priorities go first, .* is started without --schedule-low-priority"),
        ("file", True, "prefills of high priorities go first"),
        ("file of another node", True, ""),
    ],
)
def test_a_server_says_at_its_start_when_priorities_stand_for_nothing_or_for_the_opposite(
    mapping: str, low_first: bool, told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"priority_ttft_slo": mapping} if ":" in mapping else {}
    if mapping.startswith("file"):
        path = tmp_path / "policy.yaml"
        path.write_text("classes: {a: {ttft_s: 1}, b: {ttft_s: 9}}\n")
        if mapping == "file":
            path.write_text(path.read_text() + "priorities: {10: a, 0: b}\n")
        options["slo_policy"] = str(path)
    scheduler = SimpleNamespace(
        attn_dp_enabled=False, enable_priority_scheduling=True, schedule_low_priority_values_first=low_first
    )
    config = FlowPrefillConfig.parse(options)
    if mapping == "file of another node":
        path.unlink()
    check_settings(scheduler, config, True, [])
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(told)
    assert all(re.search(told, warning) for warning in warnings)


def test_sglang_does_not_sort_the_requests_of_a_batch_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def init_schedule_policy(scheduler: Any) -> None:
        scheduler.policy = SimpleNamespace(enable_priority_scheduling=True)

    monkeypatch.setattr(Scheduler, "init_schedule_policy", init_schedule_policy)
    scheduler = FlowPrefillScheduler.__new__(FlowPrefillScheduler)
    scheduler.init_schedule_policy()
    assert scheduler.policy.enable_priority_scheduling is False
