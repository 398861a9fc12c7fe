"""When the portable CPU platform is chosen, and what it sets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("sglang")

from sglang.srt import platforms as sglang_platforms
from sglang.srt.platforms.interface import SRTPlatform

from sgl_flowprefill import platforms
from sgl_flowprefill.cluster.commands import CPU_PLATFORM, PLATFORM_VARIABLE
from sgl_flowprefill.platforms import ATTENTION_BACKEND
from sgl_flowprefill.platforms.cpu import PortableCpuPlatform


@pytest.fixture(autouse=True)
def no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.delenv(variable, raising=False)
    for device in ("cuda", "rocm", "npu", "xpu", "musa", "mps"):
        monkeypatch.setattr(sglang_platforms, f"_is_{device}_available", lambda: False)


def test_a_machine_without_accelerator_gets_the_portable_platform() -> None:
    qualified = platforms.activate()
    assert qualified is not None
    assert sglang_platforms._load_platform_class(qualified) is PortableCpuPlatform
    assert issubclass(PortableCpuPlatform, SRTPlatform)


@pytest.mark.parametrize("device", ["cuda", "rocm", "npu", "xpu", "musa", "mps"])
def test_an_accelerator_keeps_its_own_platform(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_platforms, f"_is_{device}_available", lambda: True)
    assert platforms.activate() is None


def test_asking_by_name_wins_over_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_platforms, "_is_cuda_available", lambda: True)
    monkeypatch.setenv(PLATFORM_VARIABLE, CPU_PLATFORM)  # as the launcher does
    assert platforms.activate() is not None


def test_sglangs_own_cpu_engine_wins_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    assert platforms.activate() is None


def server_args(**given: Any) -> SimpleNamespace:
    options = dict.fromkeys(
        ("attention_backend", "sampling_backend", "mem_fraction_static", "max_total_tokens", "max_running_requests")
    )
    return SimpleNamespace(**{**options, "dtype": "auto", "page_size": 1, "tp_size": 1, **given})


def test_defaults_fill_what_is_open() -> None:
    args = server_args(attention_backend="intel_amx")  # SGLang's own default on device cpu
    PortableCpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == ATTENTION_BACKEND
    assert args.dtype == "float32"
    assert args.sampling_backend == "pytorch"
    assert args.disable_overlap_schedule
    assert args.disable_cuda_graph
    assert 0 < args.mem_fraction_static < 0.5
    ranks = server_args(tp_size=2)
    PortableCpuPlatform().apply_server_args_defaults(ranks)
    assert ranks.mem_fraction_static == args.mem_fraction_static / 2


def test_defaults_leave_what_was_given() -> None:
    given = {
        "attention_backend": "torch_native",
        "dtype": "bfloat16",
        "mem_fraction_static": 0.7,
        "max_total_tokens": 1000,
        "max_running_requests": 3,
    }
    args = server_args(**given)
    PortableCpuPlatform().apply_server_args_defaults(args)
    assert {name: getattr(args, name) for name in given} == given


def test_draft_models_are_served_where_nothing_is_drafted() -> None:
    for mode, served in (("prefill", True), ("decode", False), ("null", False)):
        platform = PortableCpuPlatform()
        platform.apply_server_args_defaults(server_args(disaggregation_mode=mode))
        assert platform.supports_speculative_algorithm("EAGLE3") == served
        assert not platform.supports_speculative_algorithm("STANDALONE")


def test_the_backend_is_registered_under_its_name() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    PortableCpuPlatform().init_backend()
    assert ATTENTION_BACKENDS[PortableCpuPlatform().get_default_attention_backend()].__name__ == "PortableCpuAttention"
