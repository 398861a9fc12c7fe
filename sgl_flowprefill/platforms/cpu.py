"""SGLang platform for any x86 CPU: plain PyTorch kernels, no sgl-kernel CPU build, no AVX-512."""

from __future__ import annotations

from typing import Any, Final

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from sgl_flowprefill.platforms import ATTENTION_BACKEND, PLATFORM_NAME

MEM_FRACTION_STATIC: Final = 0.25
_SIZES: Final = {
    "max_total_tokens": 262_144,
    "max_running_requests": 128,
}
"""Sizes of a server that shares its machine with others: weights and KV cache take at most a quarter of the memory that
is free at start, whose pages are all touched then (a second per 300 MB), and no more tokens than given here."""


class PortableCpuPlatform(CpuDeviceMixin, SRTPlatform):
    """Out-of-tree platform of device type ``cpu`` that selects SGLang's native (PyTorch) layer implementations."""

    _enum = PlatformEnum.OOT
    device_name = PLATFORM_NAME
    device_type = "cpu"
    capabilities = PlatformCapabilities()
    _only_prefills = False
    """Whether the server is a prefill server, which runs a draft model and drafts nothing."""

    def get_device(self, device_id: int = 0) -> str:
        """All ranks share the one CPU device. It is a string: ``ServerArgs.device`` is derived from it and is one."""
        return "cpu"

    def apply_server_args_defaults(self, server_args: Any) -> None:
        """Fill in what the command line leaves open. SGLang runs its own CPU defaults first (AMX attention)."""
        self._only_prefills = getattr(server_args, "disaggregation_mode", None) == "prefill"
        server_args.device = "cpu"
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        server_args.sampling_backend = "pytorch"
        server_args.lora_backend = "torch_native"
        server_args.disable_overlap_schedule = True
        server_args.disable_hybrid_swa_memory = True
        server_args.disable_cuda_graph = True
        server_args.disable_custom_all_reduce = True
        server_args.hicache_io_backend = "direct"
        server_args.hicache_mem_layout = "layer_first"
        if server_args.dtype == "auto":
            server_args.dtype = "float32"
        if server_args.mem_fraction_static is None:  # of the memory that all tensor-parallel ranks share
            server_args.mem_fraction_static = MEM_FRACTION_STATIC / server_args.tp_size
        for option, default in _SIZES.items():
            if getattr(server_args, option) is None:
                setattr(server_args, option, default)

    def get_default_attention_backend(self) -> str:
        """Name under which ``platforms.attention`` registers its backend."""
        return ATTENTION_BACKEND

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """Prefills (``patches.draft_cpu``); SGLang has no kernels here with which drafts could be verified."""
        return self._only_prefills and algorithm in ("EAGLE", "EAGLE3")

    def get_dispatch_key_name(self) -> str:
        """Layers run their ``forward_native``."""
        return "native"

    def init_backend(self) -> None:
        """Called in each worker before the model is built: registers the attention backend."""
        from sgl_flowprefill.platforms import attention

        attention.register()
