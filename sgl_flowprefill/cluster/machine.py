"""What this machine has, and how a cluster shares it."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

CGROUP: Final = Path("/sys/fs/cgroup")
HOPPER_MAJOR: Final = 9
"""The first part of the compute capability of NVIDIA's Hopper generation."""


@dataclass(frozen=True)
class CpuPlan:
    """Which CPUs run the schedulers that prefill, and which run everything else (HTTP servers, decode servers, gateway,
    clients)."""

    scheduler: tuple[int, ...]
    others: tuple[int, ...]

    def scheduler_of(self, index: int, servers: int) -> tuple[int, ...]:
        """CPUs of one of ``servers`` schedulers: an equal share, or one that several have to share."""
        return shares(self.scheduler, servers)[index]

    def decode_threads(self, servers: int) -> int:
        """Compute threads of each of ``servers`` decode servers, which leave room for the HTTP servers, the gateway and
        the client."""
        return max(1, len(self.others) // 2 // servers)


def shares(cpus: Sequence[int], parts: int) -> list[tuple[int, ...]]:
    """``cpus`` in equal parts, one for each server or tensor-parallel rank. With too few CPUs, several share one."""
    each = len(cpus) // parts
    if each == 0:
        return [(cpus[part % len(cpus)],) for part in range(parts)]
    return [tuple(cpus[part * each : (part + 1) * each]) for part in range(parts)]


def plan_cpus(cpus: Sequence[int], ranks: int = 1, unified: int = 0) -> CpuPlan:
    """Half of the CPUs (rounded down, at least one for each tensor-parallel rank) for prefill alone, and none with 0
    ranks, where no server prefills. Several ``unified`` servers, beside which there is no decode server, have more than
    half, as long as one is left, until each of their ranks has one of its own. The other CPUs run everything else;
    where none is left, all share all."""
    if not ranks:
        return CpuPlan((), tuple(cpus))
    scheduler = max(len(cpus) // 2, min(ranks, len(cpus)), min(ranks * unified, len(cpus) - 1))
    if scheduler > unified > 1:
        scheduler -= scheduler % unified  # what equal shares leave over
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


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to ``host``, for other machines. Raises OSError when there is no way."""
    own, _ = _way_to(host, port)
    return own


def is_here(host: str) -> bool:
    """Whether ``host`` is this machine; not if there is no such host, or no way to it."""
    try:
        own, there = _way_to(host, 1)
    except (OSError, UnicodeError):  # the second for what can be no name
        return False
    return own == there or ipaddress.ip_address(there).is_loopback


def _way_to(host: str, port: int) -> tuple[str, str]:
    """Addresses at both ends of the way from this machine to ``host``."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)  # a datagram socket sends nothing here
        return str(probe.getsockname()[0]), str(probe.getpeername()[0])


def gpu_count() -> int:
    """NVIDIA GPUs that SGLang would see, without loading CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"])
    return sum(path.name.removeprefix("nvidia").isdigit() for path in Path("/dev").glob("nvidia*"))


def is_hopper() -> bool:
    """Whether the first GPU that SGLang would see is one of NVIDIA's Hopper generation, without loading CUDA."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    try:
        import pynvml  # type: ignore[import-untyped]

        pynvml.nvmlInit()
        of = pynvml.nvmlDeviceGetHandleByIndex if first.isdigit() else pynvml.nvmlDeviceGetHandleByUUID
        major, _ = pynvml.nvmlDeviceGetCudaComputeCapability(of(int(first) if first.isdigit() else first))
    except Exception:  # no GPU, no driver, or a container that may not ask
        return False
    return bool(major == HOPPER_MAJOR)


def _cgroup_values(name: str) -> list[str]:
    try:
        return (CGROUP / name).read_text().split()
    except OSError:
        return []
