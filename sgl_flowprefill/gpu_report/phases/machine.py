"""Versions, and what the machine could reach at most: copies, matrix products, launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any, Final

import torch

from sgl_flowprefill.gpu_report.phases.base import Outcome, Request

COPY_BYTES: Final = {"cuda": 1 << 30, "cpu": 1 << 26}
PRODUCT: Final = {"cuda": (8192, torch.bfloat16), "cpu": (1024, torch.float32)}
REPEATS: Final = 10
LAUNCHES: Final = 2000


def measure(request: Request) -> Iterator[Outcome]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, Any] = {"device": device, **(_card() if device == "cuda" else {})}
    source = torch.empty(COPY_BYTES[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device)
    figures["copy_bytes_per_s"] = 2 * source.nbytes / copy_s
    size, dtype = PRODUCT[device]
    left, right = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    figures["product_flop_per_s"] = 2 * size**3 / _median_s(lambda: left @ right, device)
    figures["product_size"], figures["product_dtype"] = size, str(dtype).removeprefix("torch.")
    small = torch.zeros(16, device=device)
    _synchronize(device)
    begin_s = time.perf_counter()
    for _ in range(LAUNCHES):
        small.add_(1.0)
    figures["launch_s"] = (time.perf_counter() - begin_s) / LAUNCHES
    _synchronize(device)
    name = figures.get("card", "the CPU engine")
    line = (
        f"{name}: copies {figures['copy_bytes_per_s'] / 1e9:,.0f} GB/s (bytes read and written), products of {size} in "
        f"{figures['product_dtype']} {figures['product_flop_per_s'] / 1e12:,.2f} TFLOP/s, "
        f"a launch {figures['launch_s'] * 1e6:.1f} us of the host"
    )
    yield Outcome("measured", line, figures=figures)


def _card() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    return {
        "card": torch.cuda.get_device_name(0),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total_bytes,
        "free_bytes": free_bytes,
        "cuda": torch.version.cuda,
        "driver": _driver(),
    }


def _driver() -> str:
    """The NVIDIA driver's version, by the library that SGLang has for that."""
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except Exception as error:  # a container may not let it; no figure depends on it
        return f"unknown ({error})"


def _median_s(what: Callable[[], object], device: str) -> float:
    times_s = []
    for _ in range(REPEATS + 2):
        _synchronize(device)
        begin_s = time.perf_counter()
        what()
        _synchronize(device)
        times_s.append(time.perf_counter() - begin_s)
    return median(times_s[2:])  # the first warm up


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
