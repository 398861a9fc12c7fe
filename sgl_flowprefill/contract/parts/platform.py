"""Rows of the contract: the portable CPU platform."""

from __future__ import annotations

from typing import Final

from sgl_flowprefill.contract.row import Part, attributes, rows
from sgl_flowprefill.contract.symbols import OPTIONS

PLATFORM: Final = "sglang.srt.platforms.interface:SRTPlatform"

PART: Final = Part(
    "platform",
    "The portable CPU platform",
    ("scheduler", "HTTP server"),
    (
        *rows(
            "calls",
            "sglang.srt.platforms:",
            "_is_cuda_available() _is_rocm_available() _is_npu_available() _is_xpu_available() "
            "_is_musa_available() _is_mps_available()",
            "tells whether SGLang has a device of its own",
            "the CPU platform is chosen beside an accelerator",
        ),
        *rows(
            "overrides",
            PLATFORM,
            "apply_server_args_defaults(self, server_args) "
            "get_default_attention_backend(self) get_dispatch_key_name(self) init_backend(self)",
            "chooses plain PyTorch kernels and our attention",
            "servers do not start without an accelerator",
        ),
        *rows(
            "overrides",
            "sglang.srt.platforms.cpu:CpuDeviceMixin",
            "get_device(self, device_id)",
            "chooses plain PyTorch kernels and our attention",
            "servers do not start without an accelerator",
        ),
        *attributes(
            "sglang.srt.platforms.cpu:CpuDeviceMixin",
            "_enum device_name device_type",
            "says what the platform is",
            "servers do not start without an accelerator",
        ),
        *attributes(
            PLATFORM,
            "capabilities",
            "says what the platform is",
            "servers do not start without an accelerator",
        ),
        *rows(
            "calls",
            "sglang.srt.platforms.interface:",
            "SRTPlatform PlatformCapabilities",
            "is what the platform is made of",
            "servers do not start without an accelerator",
        ),
        *rows(
            "calls",
            "sglang.srt.platforms.cpu:",
            "CpuDeviceMixin",
            "is what the platform is made of",
            "servers do not start without an accelerator",
        ),
        *rows(
            "calls",
            "sglang.srt.platforms.device_mixin:",
            "PlatformEnum PlatformEnum.OOT",
            "is what the platform is made of",
            "servers do not start without an accelerator",
        ),
        *attributes(
            OPTIONS,
            "device attention_backend sampling_backend disable_overlap_schedule disable_hybrid_swa_memory "
            "disable_cuda_graph disable_custom_all_reduce dtype mem_fraction_static tp_size max_total_tokens "
            "max_running_requests",
            "is set by the platform where it is not given",
            "servers without an accelerator do not start, or take all memory",
        ),
    ),
)
