"""A server that cannot work is refused where it is started, however that is, and again in its scheduler."""

from __future__ import annotations

import logging
import pickle
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.io_struct import AttachHiCacheStorageReqInput, AttachHiCacheStorageReqOutput
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

from sgl_flowprefill.compat import incompatible_option
from sgl_flowprefill.compat.pairs import COMPARED, RANKS, STORAGE
from sgl_flowprefill.model import embedded_model_path
from sgl_flowprefill.patches import options
from sgl_flowprefill.patches.base import SeamError
from sgl_flowprefill.runtime.scheduler import FlowPrefillScheduler
from tests.roles import with_role
from tests.unit.test_compat import WORKS


def resolved(**options: Any) -> Any:
    """Options that FlowPrefill works with, but for ``options``, which SGLang has resolved."""
    return SimpleNamespace(**(WORKS | options), resolve_once=lambda: None)


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
    monkeypatch.setattr(ServerArgs, "resolve_once", ServerArgs.resolve_once)  # without the hook again afterwards
    options.apply()
    HookRegistry.apply_hooks()
    return servers


@pytest.mark.parametrize("engine", [Engine, OtherEngine])
def test_it_is_refused_before_it_starts_processes(
    engine: type[Engine], started: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        engine._launch_subprocesses(server_args=resolved(chunked_prefill_size=None))
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sgl-flowprefill: FlowPrefill needs --chunked-prefill-size -1")
    assert not started


def test_what_works_starts_and_a_decode_server_may_have_any_options(started: list[Any]) -> None:
    servers = [resolved(), SimpleNamespace(disaggregation_mode="decode", chunked_prefill_size=2048)]
    for server_args in servers:
        Engine._launch_subprocesses(server_args=server_args)
    assert started == servers


def test_an_engine_in_python_is_judged_by_what_its_options_become(started: list[Any]) -> None:
    server_args = resolved(chunked_prefill_size=None)
    server_args.resolve_once = lambda: setattr(server_args, "chunked_prefill_size", -1)
    Engine._launch_subprocesses(server_args=server_args)
    assert started == [server_args]


STOCK = {
    "disable_overlap_schedule": False,
    "chunked_prefill_size": 4096,
    "cuda_graph_backend_prefill": "breakable",
    "schedule_policy": "lpm",
}
"""What users of stock SGLang ask for or leave as it is."""


def test_a_prefill_server_gets_the_options_that_it_needs_whatever_was_asked_for(
    started: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    given = ServerArgs(
        model_path=str(embedded_model_path()),
        disaggregation_mode="prefill",
        disaggregation_transfer_backend="nixl",
        cuda_graph_config={"prefill": {"backend": "full", "max_bs": 64}},
        **STOCK,
    )
    with caplog.at_level(logging.INFO):
        given.resolve_once()
        given.resolve_once()  # as launchers do: it says nothing the second time
    resolved = resolving_view(given)
    assert resolved.disable_overlap_schedule
    assert resolved.chunked_prefill_size == -1
    assert resolved.schedule_policy == "fcfs"
    assert resolved.cuda_graph_config.prefill.backend == "disabled"
    assert incompatible_option(resolved) is None
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("FlowPrefill: --")]
    assert len(lines) == 5
    assert lines[1] == (
        "FlowPrefill: --chunked-prefill-size is -1 (was 4096): "
        "a prompt is prefilled whole and suspended when it has to wait"
    )
    pickle.loads(pickle.dumps(given)).resolve_once()


def test_a_decode_server_keeps_what_prefill_servers_are_changed_for(started: list[Any]) -> None:
    given = SimpleNamespace(disaggregation_mode="decode", **STOCK)
    options.resolve(lambda server_args: None, given)
    assert {name: getattr(given, name) for name in STOCK} == STOCK


def test_a_decode_server_gets_one_tokenizer_worker_and_keeps_its_other_options(
    caplog: pytest.LogCaptureFixture,
) -> None:
    given = ServerArgs(
        model_path=str(embedded_model_path()),
        disaggregation_mode="decode",
        tokenizer_worker_num=4,
        chunked_prefill_size=2048,
    )
    with caplog.at_level(logging.INFO):
        options.resolve(lambda server_args: None, given)
    assert (given.tokenizer_worker_num, given.chunked_prefill_size) == (1, 2048)
    [line] = [record for record in caplog.records if record.getMessage().startswith("FlowPrefill: ")]
    assert line.levelno == logging.WARNING
    assert line.getMessage() == (
        "FlowPrefill: --tokenizer-worker-num is 1 (was 4): "
        "workers load no plugins: a request that comes by one would have neither a deadline nor a report"
    )


def test_a_server_that_starts_with_what_has_not_been_compared_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPREFILL_UNCOMPARED", "True")
    options.resolve(lambda server_args: None, SimpleNamespace(**(WORKS | {"enable_lora": True, "tp_size": 2})))
    [told] = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert told.startswith("FlowPrefill: --enable-lora with --tp-size 2 has not been compared")


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

    monkeypatch.setattr(Scheduler, "__init__", init)
    server_args = SimpleNamespace(**{**WORKS, **given}, _resolved_overrides=[("a hook of SGLang", resolved)])
    with pytest.raises(SystemExit, match=f"^sgl-flowprefill: .*{text}"):
        FlowPrefillScheduler(server_args, "ports")
    assert not made


@pytest.mark.parametrize(
    ("given", "pair"),
    [
        ({}, ""),
        ({"enable_lora": True}, ""),
        ({"tp_size": 2}, ""),
        ({"tp_size": 2}, "--hicache-storage-backend file with --tp-size 2"),
    ],
)
def test_a_storage_comes_to_a_running_server_that_could_have_started_with_it(
    given: dict[str, Any], pair: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def attach(self: Any, recv_req: Any) -> AttachHiCacheStorageReqOutput:  # which has SGLang's parameters
        return AttachHiCacheStorageReqOutput(success=True)

    monkeypatch.setattr(Scheduler, "attach_hicache_storage_wrapped", attach)
    monkeypatch.delenv("FLOWPREFILL_UNCOMPARED", raising=False)
    if pair:
        monkeypatch.delitem(COMPARED, (STORAGE, RANKS))  # type: ignore[arg-type]
    server_args = resolved(enable_hierarchical_cache=True, **given)
    assert incompatible_option(server_args) is None
    scheduler, asked = with_role(server_args=server_args), AttachHiCacheStorageReqInput(hicache_storage_backend="file")
    attached = scheduler.attach_hicache_storage_wrapped(asked)
    assert attached.success == (not pair)
    assert attached.message.startswith(f"{pair} is refused by FlowPrefill" if pair else "")
    monkeypatch.setenv("FLOWPREFILL_UNCOMPARED", "True")
    assert scheduler.attach_hicache_storage_wrapped(asked).success
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(line.startswith(f"FlowPrefill: {pair} has not been compared") for line in told)
    assert len(told) == bool(pair)
