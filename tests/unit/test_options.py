"""A server that cannot work is refused where it is started, however that is, and again in its scheduler."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.plugins.hook_registry import HookRegistry

from sgl_flowprefill.patches import options
from sgl_flowprefill.patches.base import SeamError
from sgl_flowprefill.runtime.setup import PreparedScheduler
from tests.unit.test_compat import WORKS


class OtherEngine(Engine):
    """Starts its processes as ``sglang.srt.ray.engine.RayEngine`` does."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The options of the servers that were started instead of refused."""
    servers: list[Any] = []

    def launch(cls: type, server_args: Any, **kwargs: Any) -> None:
        servers.append(server_args)

    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(Engine, "_launch_subprocesses", classmethod(launch))
    options.apply()
    HookRegistry.apply_hooks()
    return servers


@pytest.mark.parametrize("engine", [Engine, OtherEngine])
def test_it_is_refused_before_it_starts_processes(
    engine: type[Engine], started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        engine._launch_subprocesses(server_args=SimpleNamespace(**{**WORKS, "chunked_prefill_size": None}))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sgl-flowprefill: FlowPrefill needs --chunked-prefill-size -1")
    assert not started


def test_what_works_starts_and_a_decode_server_may_have_any_options(started: list[Any]) -> None:
    servers = [SimpleNamespace(**WORKS), SimpleNamespace(disaggregation_mode="decode", chunked_prefill_size=2048)]
    for server_args in servers:
        Engine._launch_subprocesses(server_args=server_args)
    assert started == servers


def test_a_changed_target_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_launch_subprocesses", lambda *anything: None)
    with pytest.raises(SeamError, match="_launch_subprocesses"):
        options.apply()


@pytest.mark.parametrize(
    ("given", "resolved", "text"),
    [
        ({"disable_overlap_schedule": False}, {}, "FlowPrefill needs --disable-overlap-schedule"),
        ({"chunked_prefill_size": None}, {"chunked_prefill_size": 8192}, "--chunked-prefill-size -1, not 8192"),
        ({}, {"attn_dp_size": 2}, "--attn-dp-size 2 cannot work with FlowPrefill"),
    ],
)
def test_a_scheduler_that_was_started_past_the_seam_ends_its_server(
    given: dict[str, Any], resolved: dict[str, Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    def init(_scheduler: Any, *args: Any) -> None:
        made.append(args)

    monkeypatch.setattr(PreparedScheduler.__base__, "__init__", init)
    server_args = SimpleNamespace(**{**WORKS, **given}, _resolved_overrides=[("a hook of SGLang", resolved)])
    with pytest.raises(SystemExit, match=f"^sgl-flowprefill: .*{text}"):
        PreparedScheduler(server_args, "ports")
    assert not made
