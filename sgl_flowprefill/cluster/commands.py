"""Command lines and environments of the three processes.

Both systems of a comparison get the same, but for FlowPrefill itself.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Final, Literal

from sgl_flowprefill.cluster.base import ClusterConfig, Ports
from sgl_flowprefill.cluster.machine import CpuPlan
from sgl_flowprefill.config import ENV_PREFIX, ENV_SWITCH

Role = Literal["prefill", "decode"]

FLOWPREFILL_ARGS: Final = (
    "--disable-overlap-schedule",
    "--cuda-graph-backend-prefill=disabled",
    "--chunked-prefill-size=-1",
)
GATEWAY_TIMEOUT_S: Final = 1800
CPU_PLATFORM: Final = "flowprefill_cpu"
CPU_ALLOCATOR: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc keeps freed activations: otherwise the kernel clears new pages for every operator of a forward pass, which took
between 5% and 25% of a prefill's time on one core."""
CACHE_VARIABLE: Final = ENV_PREFIX + "CACHE_DIR"


@dataclass(frozen=True)
class Layout:
    """A cluster on a machine: what is decided before anything starts."""

    config: ClusterConfig
    model_path: str
    ports: Ports
    cpus: CpuPlan | None
    """How a machine without a GPU is shared; None on a machine with GPUs."""
    prefill_ranks: int = 1
    """Tensor-parallel size of the prefill server."""
    decode_ranks: int = 1

    def url(self, port: int) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.config.host, self.config.host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def server_options(self, role: Role) -> list[str]:
        """SGLang options of a server. Options of the user come last and win."""
        port = self.ports.prefill if role == "prefill" else self.ports.decode
        options = ["--model-path", self.model_path, "--host", self.config.host, "--port", str(port)]
        options += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl"]
        options += ["--disaggregation-bootstrap-port", str(self.ports.bootstrap)]
        if self.config.model_path is None:
            options += ["--served-model-name", "embedded"]
        if self.cpus is None:
            options += ["--base-gpu-id", "0" if role == "prefill" else str(self.prefill_ranks)]
        elif role == "decode":
            options += ["--disaggregation-decode-retraction-backup", "cpu_tensor"]
        if role == "prefill" and self.config.flowprefill:
            options += FLOWPREFILL_ARGS
        own = self.config.prefill_args if role == "prefill" else self.config.decode_args
        return [*options, *self.config.server_args, *own]

    def server_command(self, role: Role) -> list[str]:
        return [sys.executable, "-m", "sglang.launch_server", *self.server_options(role)]

    def server_env(self, role: Role) -> dict[str, str]:
        """Environment variables of a server."""
        env = _clean_env()
        env[ENV_PREFIX + "DECODE_SLEEP"] = "1"
        if self.config.flowprefill:
            env[ENV_SWITCH] = "1"
            self.config.options.to_env(env)
            if role == "prefill":
                env["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
        if self.cpus is not None:
            env["SGLANG_PLATFORM"] = CPU_PLATFORM
            env.update(CPU_ALLOCATOR)
            by_rank = self.cpus.by_rank(self.prefill_ranks)
            threads = self.cpus.others_threads // self.decode_ranks
            if role == "prefill":
                env[ENV_PREFIX + "SCHEDULER_CPUS"] = "|".join(",".join(map(str, cpus)) for cpus in by_rank)
                threads = len(by_rank[0])
            env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(max(1, threads))
            # SGLang wants it for more ranks than NUMA nodes; without its own CPU kernels it binds nothing.
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(["0"] * max(self.prefill_ranks, self.decode_ranks)))
        return env

    def gateway_command(self, metrics_port: int) -> list[str]:
        """smg in front of one prefill and one decode server. A busy worker is no sick one: health checks are patient,
        and a failed request is answered as it failed, because a second try would count against its objective."""
        return [
            *(sys.executable, "-m", "smg.launch_router", "--pd-disaggregation"),
            *("--prefill", self.url(self.ports.prefill), str(self.ports.bootstrap)),
            *("--decode", self.url(self.ports.decode)),
            *("--host", self.config.host, "--port", str(self.ports.gateway)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)),
            *("--policy", "round_robin", "--disable-retries", "--disable-circuit-breaker"),
            *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "10"),
            *("--health-check-timeout-secs", "30", "--health-success-threshold", "1"),
            *("--request-timeout-secs", str(GATEWAY_TIMEOUT_S), "--shutdown-grace-period-secs", "1"),
            *("--queue-size", "10000", "--queue-timeout-secs", str(GATEWAY_TIMEOUT_S), "--log-level", "warn"),
        ]

    def curl(self) -> str:
        """A command line that asks the gateway for a few tokens."""
        slo = ', "custom_params": {"ttft_slo": 1.0}' if self.config.flowprefill else ""
        body = f'{{"model": "{self.served_name}", "prompt": "Hello", "max_tokens": 16{slo}}}'
        return shlex.join(
            [
                "curl",
                f"{self.url(self.ports.gateway)}/v1/completions",
                "-H",
                "Content-Type: application/json",
                "-d",
                body,
            ]
        )

    @property
    def served_name(self) -> str:
        return "embedded" if self.config.model_path is None else self.model_path


def gateway_env() -> dict[str, str]:
    return _clean_env()


def _clean_env() -> dict[str, str]:
    """This process's environment without FlowPrefill's options, which are the configuration's to set.

    The tools of the virtual environment (ninja builds GPU kernels) are found although it may not be activated.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name != ENV_SWITCH and (not name.startswith(ENV_PREFIX) or name == CACHE_VARIABLE)
    }
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    return env
