"""SGLang's attention backends for GPUs, built from the installed sources without a GPU and without a server."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sgl_flowprefill.runtime.memory import MIB

ATTENTION = "sglang.srt.layers.attention"
FLOAT_WORKSPACE_BYTES = 64 * MIB


class Anything(SimpleNamespace):
    """Configuration of which only what is named matters; the rest is off."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def model_runner(sliding_window_size: int | None = None, tokens: int = 128, dtype: torch.dtype = torch.bfloat16) -> Any:
    """What backends read of a model runner, for a decoder of 8 heads and prompts of up to ``tokens``."""
    requests = SimpleNamespace(size=16, req_to_token=torch.zeros((17, tokens), dtype=torch.int32))
    values = torch.zeros((64, 2, 64))
    pool = Anything(
        start_layer=0,
        get_value_buffer=lambda layer: values,
        get_kv_cache_quant_method=lambda: Anything(resolve_attention_access=lambda phase, backend: Anything()),
    )
    config = Anything(
        context_len=tokens,
        num_attention_heads=8,
        head_dim=64,
        v_head_dim=64,
        swa_v_head_dim=64,
        is_multimodal=False,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        hf_config=SimpleNamespace(architectures=["LlamaForCausalLM"]),
        hf_text_config=SimpleNamespace(num_attention_heads=8, attn_logit_softcapping=None),
        get_num_kv_heads=lambda *sizes: 2,
        get_max_num_attention_heads=lambda: 8,
    )
    return Anything(
        device="cpu",
        gpu_id=0,
        dtype=dtype,
        page_size=1,
        kv_cache_dtype=dtype,
        kv_cache_dtype_str="auto",
        sliding_window_size=sliding_window_size,
        is_draft_worker=False,
        prefill_aware_swa=False,
        use_mla_backend=False,
        model_config=config,
        req_to_token_pool=requests,
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool),
        prefill_attention_backend_str="flashinfer",
        decode_attention_backend_str="flashinfer",
        kv_index_translator=Anything(is_translating=False),
        decode_num_tokens_per_req=lambda: 1,
    )


@contextmanager
def kernel_names() -> Iterator[None]:
    """SGLang's FA3 backend imports a library of kernels that loads libcuda: here, names that stand for nothing."""
    module = f"{ATTENTION}.flashattention_backend"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("sgl_kernel", "sgl_kernel.flash_attn"):
            stand_in = ModuleType(name)
            stand_in.__getattr__ = lambda attribute: None  # type: ignore[method-assign]
            patch.setitem(sys.modules, name, stand_in)
        importlib.import_module(module)
        yield
    del sys.modules[module]


def go_offline(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Let the backends be built without a GPU and without a running server; SGLang's named buffers."""
    import flashinfer
    from sglang.srt.layers.attention import flashattention_backend, flashinfer_backend, triton_backend

    buffers: dict[str, torch.Tensor] = {}
    off = Anything(
        features=Anything(),
        deterministic=Anything(),
        kernel=Anything(triton_attention_num_kv_splits=8),
        dllm=Anything(),
    )
    parallel = Anything(attn_tp_size=1, attn_dcp_size=1, attn_cp_size=1)
    replaced: dict[str, Any] = {
        "get_exec": lambda: off,
        "get_parallel": lambda: parallel,
        "get_platform": lambda: Anything(),
        "get_spec": lambda: Anything(),
        "get_model": lambda: Anything(),
        "get_schedule": lambda: Anything(chunked_prefill_size=-1),
        "get_memory": lambda: Anything(),
        "get_buffer": lambda name, factory: (
            buffers.setdefault(name, factory()) if name not in buffers else buffers[name]
        ),
        "get_cuda_graph_max_batch_size": lambda requests: requests,
        "get_device_capability": lambda: (9, 0),
        "get_device_core_count": lambda gpu_id: 132,
        "is_arch_support_pdl": lambda: False,
        "get_kv_shard_pool": lambda pool: None,
        "mambaish_config": lambda config: None,
        "DllmConfig": SimpleNamespace(from_server_args=lambda args: None),
        "cuda_graph_fully_disabled": lambda: True,
        "check_cuda_graph_backend": lambda phase, backend: False,
        "_should_disable_scheduler_metadata_precompute": lambda: True,
    }
    for module in (flashinfer_backend, triton_backend, flashattention_backend):
        for name, value in replaced.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper",
                 "BatchPrefillWithRaggedKVCacheWrapper"):  # fmt: skip
        monkeypatch.setattr(flashinfer_backend, name, getattr(flashinfer, name), raising=False)
    monkeypatch.setenv("SGLANG_FLASHINFER_WORKSPACE_SIZE", str(FLOAT_WORKSPACE_BYTES))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
    return buffers


def build(name: str, runner: Any) -> Any:
    """As ``ModelRunner._get_attention_backend(init_new_workspace=False)`` does."""
    if name == "flashinfer":
        from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

        return FlashInferAttnBackend(runner, init_new_workspace=False)
    if name == "triton":
        from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

        return TritonAttnBackend(runner)
    from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend

    return FlashAttentionBackend(runner)
