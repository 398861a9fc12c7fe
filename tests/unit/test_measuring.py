"""Processes that measure, for ``launch.py doctor``, ``profile`` and ``gpu-report``: their engine is as a server's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("sglang")

from sgl_flowprefill.cluster import ClusterConfig, preflight
from sgl_flowprefill.patches import lone_prefill
from sgl_flowprefill.profiling import process
from sgl_flowprefill.runtime import selfcheck


class Streams:
    """A device module that counts who is within its stream."""

    def __init__(self) -> None:
        self.inside = 0

    def StreamContext(self, stream: object) -> Streams:
        assert stream == "the scheduler's stream"
        return self

    def __enter__(self) -> None:
        self.inside += 1

    def __exit__(self, *error: object) -> None:
        self.inside -= 1


def test_the_self_check_runs_in_the_schedulers_own_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams = Streams()
    hub = object()
    scheduler = SimpleNamespace(device_module=streams, schedule_stream="the scheduler's stream", hub=hub)
    seen: list[int] = []

    def checks(asked: object) -> list[selfcheck.Finding]:
        assert asked is hub
        seen.append(streams.inside)
        return []

    monkeypatch.setattr(selfcheck, "make_scheduler", lambda options: scheduler)
    monkeypatch.setattr(selfcheck, "checks", checks)
    monkeypatch.setattr(selfcheck.os, "dup2", lambda *descriptors: None)
    selfcheck.main([])
    assert seen == [1]
    assert streams.inside == 0


def test_an_interruption_also_ends_the_wait_for_the_device() -> None:
    """Otherwise an arrival would be noticed one operator later than by a server."""
    tasks = selfcheck.Tasks.__new__(selfcheck.Tasks)
    before = {"interrupted": object(), "ends_waiting": object()}
    tasks.executor = SimpleNamespace(**before)
    interrupted = lambda: True  # noqa: E731
    with tasks.interrupted_by(interrupted):
        assert vars(tasks.executor) == {"interrupted": interrupted, "ends_waiting": interrupted}
    assert vars(tasks.executor) == before


class Begun(Exception):
    """The scheduler is about to be made."""


def test_a_scheduler_that_measures_copies_no_inputs_as_one_that_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        raise Begun

    monkeypatch.delenv("SGLANG_EAGER_INPUT_NO_COPY", raising=False)
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", begin)
    with pytest.raises(Begun):
        process.make_scheduler([])
    assert process.os.environ["SGLANG_EAGER_INPUT_NO_COPY"] == "1"


def test_a_scheduler_that_measures_needs_no_library_for_kv_transfers(monkeypatch: pytest.MonkeyPatch) -> None:
    def begin() -> None:
        assert lone_prefill.is_enabled()
        raise Begun

    monkeypatch.setenv(lone_prefill.ENV_SWITCH, "0")
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", begin)
    with pytest.raises(Begun):
        process.make_scheduler([])


@pytest.mark.parametrize("given", [None, "0"])
def test_a_scheduler_that_measures_has_what_a_servers_first_process_sets(
    given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if given is None:
        monkeypatch.delenv("TRTLLM_ENABLE_PDL", raising=False)
    else:
        monkeypatch.setenv("TRTLLM_ENABLE_PDL", given)
    measures = preflight.prepare(ClusterConfig(flowprefill=True)).server_env("prefill")
    assert measures["CUDA_DEVICE_MAX_CONNECTIONS"] == "8"
    assert measures["TRTLLM_ENABLE_PDL"] == (given or "1")
