"""The scheduler process runs on the CPUs that it is told to, with as many threads as CPUs.

Tensor-parallel ranks are given theirs apart by bars: ``0-3|4-7``.

Target: ``configure_scheduler_process`` (managers/scheduler.py), which a spawned scheduler process calls
first. Threads inherit the binding, so it covers the pools of OpenMP, NIXL and UCX, which are made later. Without this
seam the schedulers, HTTP servers and gateway of a small machine push each other off their cores. Unlike
``SGLANG_CPU_OMP_THREADS_BIND`` it binds every thread and needs no sgl-kernel.
"""

from __future__ import annotations

import os
from typing import Any, Final

from sgl_flowprefill.config import ENV_SCHEDULER_CPUS, ConfigError
from sgl_flowprefill.patches.base import expect

SEAM: Final = "affinity"
TARGET: Final = "sglang.srt.managers.scheduler.configure_scheduler_process"


def is_enabled() -> bool:
    """Whether the environment names CPUs for the scheduler process."""
    return bool(os.environ.get(ENV_SCHEDULER_CPUS))


def apply() -> None:
    """Register the seam in a process that may run a scheduler. Raises SeamError, and ConfigError for wrong CPUs."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    by_rank = parse_ranks(os.environ[ENV_SCHEDULER_CPUS])
    expect(SEAM)

    def before(*_args: Any, **_kwargs: Any) -> None:
        from sglang.srt.runtime_context import get_parallel

        bind(by_rank[get_parallel().tp_rank % len(by_rank)])

    HookRegistry.register(TARGET, before, HookType.BEFORE)


def bind(cpus: set[int]) -> None:
    """Bind every thread of this process to ``cpus`` and let PyTorch use as many threads."""
    import torch

    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)
    torch.set_num_threads(len(cpus))


def parse_ranks(text: str) -> list[set[int]]:
    """CPU numbers of each rank, as in ``0|1``. Raises ConfigError."""
    return [parse_cpus(part) for part in text.split("|")]


def parse_cpus(text: str) -> set[int]:
    """CPU numbers of a list such as ``0`` or ``0,2-3``. Raises ConfigError for CPUs that are not there."""
    cpus: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            cpus.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ConfigError(f"{ENV_SCHEDULER_CPUS}={text}: expected CPU numbers such as 0 or 0,2-3") from None
    # A launcher may have bound this process to other CPUs than its scheduler: what the machine has is what counts.
    known = set(range(os.cpu_count() or 1))
    if not cpus or not cpus <= known:
        raise ConfigError(f"{ENV_SCHEDULER_CPUS}={text}: this machine has the CPUs 0-{max(known)}")
    return cpus
