"""Processes that measure, for ``launch.py doctor``, ``profile`` and ``gpu-report``: their engine is as a server's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("sglang")

from sgl_flowprefill.cluster import ClusterConfig, preflight
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.gpu_report import engine as report_engine
from sgl_flowprefill.patches import lone_prefill
from sgl_flowprefill.profiling import Setting, measure, process
from sgl_flowprefill.runtime import profile, selfcheck
from sgl_flowprefill.runtime.checkpoints import DecoderLayer
from sgl_flowprefill.ttft import PrefillShape
from tests.simulated_device import HostCosts, SimulatedDevice


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


def test_an_engine_is_described_whose_kv_pool_has_no_two_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of latent attention, which keeps keys and values in one."""
    pool = SimpleNamespace(mem_usage=2.0, size=1 << 14, get_kv_size_bytes=lambda: 2 << 30)
    runner = SimpleNamespace(model=nn.Linear(2, 2), token_to_kv_pool=pool)
    engine = report_engine.Engine.__new__(report_engine.Engine)
    engine.scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(model_runner=runner),
        model_config=SimpleNamespace(num_hidden_layers=3, context_len=100),
        max_total_num_tokens=1 << 14,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
    )
    setting = Setting(model="m", device="GPU", dtype="bfloat16", attention_backend="fa3", threads=1, sglang="0")
    monkeypatch.setattr(report_engine, "current_setting", lambda scheduler: setting)
    assert engine.describe()["kv_bytes_per_token"] == 1 << 17


def test_a_first_start_measures_no_longer_prompts_than_fit_while_their_operators_run_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_config = SimpleNamespace(
        hidden_size=4096,
        num_attention_heads=32,
        head_dim=128,
        context_len=131_072,
        vocab_size=128_256,
        get_total_num_kv_heads=lambda: 8,
        hf_text_config=SimpleNamespace(intermediate_size=14_336),
    )
    token_bytes = 2 * (4 * 4096 + 3 * 14_336)
    scheduler = SimpleNamespace(
        device="cuda",
        tp_size=1,
        tp_group=SimpleNamespace(rank_in_group=0, world_size=1, broadcast_object=lambda found: found),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model_config=model_config, dtype=torch.bfloat16)),
        draft_worker=None,
        attn_dp_enabled=False,
        model_config=model_config,
        max_total_num_tokens=1_000_000,
        max_req_input_len=131_071,
    )
    role: Any = SimpleNamespace(scheduler=scheduler)
    setting = Setting(model="m", device="GPU", dtype="bfloat16", attention_backend="fa3", threads=1, sglang="0")

    def begin(engine: Any) -> None:
        assert 18_990 <= engine.limit_tokens <= 19_000
        raise Begun

    monkeypatch.setenv("FLOWPREFILL_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(profile, "current_setting", lambda scheduler: setting)
    monkeypatch.setattr(profile, "free_device_bytes", lambda: 20_000 * token_bytes)
    monkeypatch.setattr(profile, "compile_kernels", begin)
    with pytest.raises(Begun):
        profile.load_or_measure(role, FlowPrefillConfig())
    assert measure.SchedulerEngine(role).limit_tokens == 131_070, "when operators run in tiles"


ATTENTION_S, MLP_S, LAYERS = 20e-6, 10e-6, 8
FASTEST_CLOCK_HZ = 2.9e9
"""Of GPUs that can be bought."""


class Operator(nn.Module):
    """Queues a kernel, which takes the host longer to launch than the device to run."""

    def __init__(self, device: SimulatedDevice, duration_s: float) -> None:
        super().__init__()
        self._device, self._duration_s = device, duration_s

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self._device.launch("operator", self._duration_s)
        return rows


class Layer(nn.Module):
    def __init__(self, device: SimulatedDevice) -> None:
        super().__init__()
        self.attention, self.mlp = Operator(device, ATTENTION_S), Operator(device, MLP_S)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.mlp(self.attention(rows))
        return output


class LayerCalledByForward(Layer):
    """As in SGLang's ``nemotron_h``."""

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        return self.forward(rows)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.mlp.forward(self.attention.forward(rows))


def launch_bound(
    device: SimulatedDevice, monkeypatch: pytest.MonkeyPatch, layer: type[Layer] = Layer
) -> measure.SchedulerEngine:
    """An engine on ``device``, whose attention reads back a plan before its first layer, as FlashInfer's may."""
    model = nn.Sequential(*(layer(device) for _ in range(LAYERS)))
    names = [DecoderLayer(f"{index}", (f"{index}.attention",), (f"{index}.mlp",)) for index in range(LAYERS)]

    def run_batch(batch: Any) -> Any:
        device.launch("plan", 5e-6)
        device.synchronize()
        model(torch.zeros(1))
        return SimpleNamespace(copy_done=None, next_token_ids=torch.zeros(1))

    scheduler = SimpleNamespace(
        device="cuda", run_batch=run_batch, model_config=SimpleNamespace(vocab_size=100), waiting_queue=[]
    )
    role: Any = SimpleNamespace(
        scheduler=scheduler,
        device=device,
        make_batch=lambda reqs: SimpleNamespace(reqs=[]),
        shapes=lambda batch: [PrefillShape(16)],
    )
    monkeypatch.setattr(measure, "whole_model", lambda scheduler: model)
    monkeypatch.setattr(measure, "find_decoder_layers", lambda model: names)
    monkeypatch.setattr(measure.torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(measure.torch.cuda, "_sleep", lambda cycles: device.launch("spin", cycles / FASTEST_CLOCK_HZ))
    return measure.SchedulerEngine(role)


@pytest.mark.parametrize("layer", [Layer, LayerCalledByForward])
@pytest.mark.parametrize("launch_s", [60e-6, 450e-6])
def test_operators_are_timed_as_the_device_takes_for_them_and_not_the_host_to_launch_them(
    launch_s: float, layer: type[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = SimulatedDevice(2, HostCosts(launch_s=launch_s))
    engine = launch_bound(device, monkeypatch, layer)
    timing, attention_s, mlp_s = engine.time_operators((PrefillShape(16),))
    assert attention_s == pytest.approx(LAYERS * ATTENTION_S)
    assert mlp_s == pytest.approx(LAYERS * MLP_S)
    assert timing.time_s == pytest.approx(LAYERS * (ATTENTION_S + MLP_S))
    assert timing.waited_s == 0.0
    model = measure.whole_model(engine.scheduler)
    assert not any("forward" in vars(module) for module in model.modules()), "each has its own again"


def test_a_pass_that_waits_for_launches_takes_longer_from_its_first_layer_on_than_behind_a_spin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = SimulatedDevice(2, HostCosts(launch_s=60e-6))
    engine = launch_bound(device, monkeypatch)
    took_s = []
    for behind_spin in (False, True):
        with engine.from_first_layer(behind_spin) as begin:
            engine.time((PrefillShape(16),))
            took_s.append(begin[0].seconds_until(device.stamp()))
    waiting_s, alone_s = took_s
    assert alone_s == pytest.approx(LAYERS * (ATTENTION_S + MLP_S))
    assert waiting_s >= 2 * LAYERS * 60e-6
