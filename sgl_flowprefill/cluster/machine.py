"""What this machine has, and how a cluster shares it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

CGROUP: Final = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class CpuPlan:
    """Which CPUs run the prefill scheduler, and which run everything else (HTTP servers, decode, gateway, clients)."""

    scheduler: tuple[int, ...]
    others: tuple[int, ...]

    @property
    def others_threads(self) -> int:
        """Compute threads of the decode server: it leaves room for the HTTP servers, the gateway and the client."""
        return max(1, len(self.others) // 2)

    def by_rank(self, ranks: int) -> list[tuple[int, ...]]:
        """The scheduler's CPUs, shared out among its tensor-parallel ranks."""
        each = len(self.scheduler) // ranks
        if each == 0:
            return [(self.scheduler[rank % len(self.scheduler)],) for rank in range(ranks)]
        return [self.scheduler[rank * each : (rank + 1) * each] for rank in range(ranks)]


def plan_cpus(cpus: Sequence[int], ranks: int = 1) -> CpuPlan:
    """Half of the CPUs (rounded down, at least one for each tensor-parallel rank) for prefill alone. What is left runs
    the rest; where nothing is left, all share all."""
    scheduler = max(len(cpus) // 2, min(ranks, len(cpus)))
    return CpuPlan(tuple(cpus[:scheduler]), tuple(cpus[scheduler:] or cpus))


def usable_cpus() -> list[int]:
    """CPUs that this process may run on, no more than its cgroup's quota pays for."""
    cpus = sorted(os.sched_getaffinity(0))
    quota = _cgroup_values("cpu.max")
    if len(quota) == 2 and quota[0].isdigit():
        cpus = cpus[: max(1, int(quota[0]) // int(quota[1]))]
    return cpus


def available_memory_bytes() -> int:
    """Memory that new processes can use, within the cgroup's limit."""
    available = int(psutil.virtual_memory().available)
    limit, used = _cgroup_values("memory.max"), _cgroup_values("memory.current")
    if limit and limit[0].isdigit() and used:
        reclaimable = dict(zip(*[iter(_cgroup_values("memory.stat"))] * 2, strict=False)).get("inactive_file", "0")
        available = min(available, int(limit[0]) - int(used[0]) + int(reclaimable))
    return available


def gpu_count() -> int:
    """NVIDIA GPUs that SGLang would see, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"])
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def _cgroup_values(name: str) -> list[str]:
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []
