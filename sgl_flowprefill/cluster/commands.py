"""Command lines and environments of prefill servers, decode servers, unified servers and gateway.

Both systems of a comparison get the same command lines and environments, but for FlowPrefill itself.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal

from sgl_flowprefill.cluster import free_ports, machine
from sgl_flowprefill.cluster.base import KEY_VARIABLE, LOOPBACK, ClusterConfig, Ports
from sgl_flowprefill.cluster.machine import CpuPlan, shares
from sgl_flowprefill.config import (
    ENV_DECODE_SLEEP,
    ENV_PREFIX,
    ENV_SCHEDULER_CPUS,
    ENV_SWITCH,
    FlowPrefillConfig,
    attach_values,
)
from sgl_flowprefill.events import of_decode_server
from sgl_flowprefill.paths import CACHE_VARIABLE

Role = Literal["prefill", "decode", "unified"]
ROLES: Final[tuple[Role, ...]] = ("prefill", "decode", "unified")
GATEWAY: Final = "gateway"
"""Name of the gateway in messages and of its log."""

TP_OPTIONS: Final = ("--tensor-parallel-size", "--tp-size", "--tp")
PARALLEL_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "tp_size": TP_OPTIONS,
    "pp_size": ("--pipeline-parallel-size", "--pp-size"),
    "dp_size": ("--data-parallel-size", "--dp-size", "--dp"),
}
"""SGLang options whose product is the number of GPUs of a server, by their fields; the last one only where attention is
not data-parallel."""
JOINT_ATTENTION: Final = "enable_dp_attention"
"""SGLang's flag that makes the data parallelism that of attention, within the GPUs of the tensor parallelism."""
JOINT_OPTIONS: Final = ("--attention-data-parallel-size", "--attn-dp-size")
"""SGLang 0.5.23's option in place of flag and data parallelism."""
GUIDING_OPTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    **PARALLEL_OPTIONS,
    "attn_dp_size": JOINT_OPTIONS,
    "base_gpu_id": ("--base-gpu-id",),
    "device": ("--device",),
    "dtype": ("--dtype",),
    "nnodes": ("--nnodes",),
    "revision": ("--revision",),
}
"""SGLang options, by all their names, by which servers are placed, described, and their model is found."""
GATEWAY_TIMEOUT_S: Final = 1800
GATEWAY_RETRIES: Final = ("--retry-max-retries", "4", "--retry-initial-backoff-ms", "500")
"""Retries are spread over more than the two seconds after which smg leaves out a server that it cannot reach."""
PLATFORM_VARIABLE: Final = "SGLANG_PLATFORM"
CPU_PLATFORM: Final = "flowprefill_cpu"
"""``platforms.PLATFORM_NAME``, which this module may not import."""
PLUGIN: Final = "flowprefill"
"""Name of the plugin by which SGLang loads FlowPrefill."""
PLUGINS_VARIABLE: Final = "SGLANG_PLUGINS"
"""Names the plugins that SGLang loads, with commas between them, where it is set; otherwise SGLang loads all."""
CPU_ALLOCATOR: Final = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""glibc keeps freed activations: otherwise the kernel clears new pages for every operator of a forward pass, which took
between 5% and 25% of a prefill's time on one core."""
DECODE_PLACES: Final = ("--max-running-requests", "4096")
DECODE_KV_TOKENS: Final = 1 << 20
"""The decode server gives a request a running slot and KV cache, first come first served, before its prefill may start.
When they run out, an urgent request waits for long ones that wait for the prefill server, whatever the order there."""
WITH_ARGUMENTS: Final = ("--prefill-args", "--decode-args", "--gateway-args")
"""Options of the launcher whose values are options of others."""
RUN: Final = (sys.executable, "-m", "sgl_flowprefill.cluster.serve")
"""Runs a module with the API key, which no command line shows."""


@dataclass(frozen=True)
class Layout:
    """What runs on this machine, as decided before anything starts."""

    config: ClusterConfig
    model_path: str
    ports: Ports
    cpus: CpuPlan | None
    """How servers on the CPU share this machine; None for servers on GPUs."""
    host: str
    """Address at which other machines reach the servers; the configured one may stand for all addresses."""

    @property
    def servers(self) -> list[tuple[Role, int]]:
        """Role and number of each server, prefill servers first."""
        return [(role, index) for role in ROLES for index in range(self.count(role))]

    def count(self, role: Role) -> int:
        counts: dict[Role, int] = {
            "prefill": self.config.prefill,
            "decode": self.config.decode,
            "unified": self.config.unified,
        }
        return counts[role]

    @property
    def prefilling(self) -> int:
        """Servers with a scheduler that prefills, each of which gets CPUs of its own."""
        return self.config.prefill + self.config.unified

    def ranks(self, role: Role) -> int:
        """Tensor-parallel size of a server."""
        return self._size(role, TP_OPTIONS)

    def is_joint(self, role: Role) -> bool:
        """Whether a server has DP attention, and with it ports beside its own."""
        return f"--{JOINT_ATTENTION.replace('_', '-')}" in self._args(role) or self._size(role, JOINT_OPTIONS) > 1

    @property
    def taken(self) -> set[int]:
        """Ports of all that is started here, whether it listens by now or not."""
        ports = {self.ports.gateway, *range(self.ports.bootstrap, self.ports.bootstrap + self.config.prefill)}
        for role, index in self.servers:
            of_server = free_ports.needed(LOOPBACK, self._port(role, index), 1, self.is_joint(role))
            ports.update(port for _, port in of_server)
        return ports

    @property
    def is_single(self) -> bool:
        """Whether this is a whole cluster in which no server can take another one's place."""
        is_pair = self.config.prefill == self.config.decode == 1
        return self.config.is_one_server or (self.config.join is None and is_pair)

    def in_words(self) -> str:
        """Names of the servers, as a list in a sentence."""
        *names, last = (self.name(role, index) for role, index in self.servers)
        return f"{', '.join(names)} and {last}" if names else last

    def name(self, role: Role, index: int) -> str:
        """Name of a server in messages and of its log: with its number where there are several."""
        return role if self.count(role) == 1 else f"{role}-{index}"

    @property
    def process_names(self) -> list[str]:
        """Names of all that is started here, each of which has a log."""
        servers = [self.name(role, index) for role, index in self.servers]
        return [*servers, GATEWAY] if self.config.has_gateway else servers

    def event_log(self, role: Role, index: int = 0) -> Path | None:
        """Event log of a server, if there is one."""
        file, name = self.config.options.events_file, self.name(role, index)
        if file is None:
            return None
        path = Path(file) if name == role else Path(file).with_stem(f"{Path(file).stem}-{name}")
        return of_decode_server(path) if role == "decode" else path

    @property
    def url(self) -> str:
        """Where clients send their requests: to the gateway, or straight to a single unified server."""
        return _url(self.host, self.ports.gateway)

    def server_url(self, role: Role, index: int = 0) -> str:
        return _url(LOOPBACK if self.config.has_gateway else self.host, self._port(role, index))

    def server_options(self, role: Role, index: int = 0, bootstrap: int | None = None) -> list[str]:
        """SGLang options of a server. Options of the user come last and win. ``bootstrap`` is the port of a prefill
        server's bootstrap service, if it is not the one of ``ports``."""
        port = str(self._port(role, index))
        options = ["--model-path", self.model_path, "--host", self.config.worker_host, "--port", port]
        if role != "unified":
            options += ["--disaggregation-mode", role, "--disaggregation-transfer-backend", "nixl"]
            options += ["--disaggregation-bootstrap-port", str(bootstrap or self.ports.bootstrap + index)]
        if self.config.model_path is None:
            options += ["--served-model-name", "embedded"]
        if self.cpus is None:
            options += ["--base-gpu-id", str(self._first_gpu(role, index))]
        elif role == "decode":
            options += ["--disaggregation-decode-retraction-backup", "cpu_tensor", *DECODE_PLACES]
            if self.config.model_path is None:
                options += ["--max-total-tokens", str(DECODE_KV_TOKENS)]
        return [*options, *self._args(role)]

    def server_command(self, role: Role, index: int = 0, bootstrap: int | None = None) -> list[str]:
        return [*RUN, "sglang.launch_server", *self.server_options(role, index, bootstrap)]

    def server_env(self, role: Role, index: int = 0) -> dict[str, str]:
        """Environment variables of a server."""
        env = self.gateway_env()
        env[ENV_DECODE_SLEEP] = "1"
        # SGLang's first process sets these for its scheduler. A scheduler that measures has no such process.
        env["CUDA_DEVICE_MAX_CONNECTIONS"] = "8"
        env.setdefault("TRTLLM_ENABLE_PDL", "1")
        if self.config.join is None and role != "unified":
            env["SGLANG_HOST_IP"] = LOOPBACK  # where prefill and decode servers listen for each other
            if self.cpus is not None:  # between GPUs, the KV cache may need other devices
                env.setdefault("UCX_NET_DEVICES", "lo")
        if self.config.flowprefill:
            env[ENV_SWITCH] = "1"
            if env.get(PLUGINS_VARIABLE):
                env[PLUGINS_VARIABLE] += f",{PLUGIN}"
            env |= self._options(role, index).to_env()
            if role != "decode":
                env["SGLANG_EAGER_INPUT_NO_COPY"] = "1"
        if self.cpus is not None:
            env[PLATFORM_VARIABLE] = CPU_PLATFORM
            env["CUDA_VISIBLE_DEVICES"] = ""
            env.update(CPU_ALLOCATOR)
            if role != "decode":
                cpus = self.cpus.scheduler_of(index, self.prefilling)
                by_rank = shares(cpus, self.ranks(role))
                env[ENV_SCHEDULER_CPUS] = "|".join(",".join(map(str, own)) for own in by_rank)
                threads = len(by_rank[0])
            else:
                threads = self.cpus.decode_threads(self.config.decode * self.ranks(role))
            env["OMP_NUM_THREADS"] = env["MKL_NUM_THREADS"] = str(threads)
            # SGLang wants it for more ranks than NUMA nodes; without its own CPU kernels it binds nothing.
            env.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(["0"] * self.ranks(role)))
        return env

    def device(self) -> str:
        """Where the servers compute, in words."""
        if self.cpus is None:
            return "GPU"
        dtype = _dtype(self.config.server_args)
        why = ""
        if not machine.gpu_count():
            why = ", as no NVIDIA GPU is visible"
        elif self.config.model_path is None and not last_value(self.config.server_args, "--device"):
            why = ", as the embedded model is for CPUs; name another with --model-path"
        return f"the CPU in {dtype}{why}"

    def dtype(self, role: Role) -> str:
        """Of the weights of a server on the CPU."""
        return _dtype(self._args(role))

    def gpus_needed(self) -> int:
        return sum(self.count(role) * self._gpus(role) for role in ROLES)

    def gateway_command(self, metrics_port: int) -> list[str]:
        """Command line of smg, in front of the servers of this machine, or of none: servers elsewhere join it.

        A busy worker is no sick one: health checks are patient. With one prefill and one decode server, a failed
        request is answered as it failed, because a second try would count against its objective; with more, another
        server can take the request of one that has died. Nor is anything tried again where servers refuse requests, of
        which a gateway by itself knows by its options: it takes a 429 for a failure, and its client would wait for what
        has been decided. The circuit breaker is off, because smg counts the death of a prefill server against the
        decode server that it was paired with, too.
        """
        refuses = self.config.options.refuses and (self.config.flowprefill or not self.servers)
        retries = ("--disable-retries",) if self.is_single or refuses else GATEWAY_RETRIES
        return [
            *(*RUN, "smg.launch_router", *self._workers()),
            *("--host", self.config.host, "--port", str(self.ports.gateway)),
            *("--prometheus-host", LOOPBACK, "--prometheus-port", str(metrics_port)),
            *("--policy", "round_robin", *retries, "--disable-circuit-breaker"),
            *("--worker-startup-check-interval", "1", "--health-check-interval-secs", "10"),
            *("--health-check-timeout-secs", "30", "--health-success-threshold", "1"),
            *("--request-timeout-secs", str(GATEWAY_TIMEOUT_S)),
            *("--shutdown-grace-period-secs", str(max(1, math.ceil(self.config.drain_timeout_s)))),
            *("--queue-size", "10000", "--queue-timeout-secs", str(GATEWAY_TIMEOUT_S), "--log-level", "warn"),
            *self.config.gateway_args,
        ]

    def _workers(self) -> list[str]:
        """smg's mode, and the servers of this machine in it."""
        if self.config.unified or self.config.unified_elsewhere:
            urls = [self.server_url(role, index) for role, index in self.servers]
            return ["--worker-urls", *urls] if urls else []
        workers = ["--pd-disaggregation"]
        for role, index in self.servers:
            bootstrap = [str(self.ports.bootstrap + index)] if role == "prefill" else []
            workers += [f"--{role}", self.server_url(role, index), *bootstrap]
        return workers

    def gateway_env(self) -> dict[str, str]:
        """Environment variables of the gateway."""
        env = _clean_env()
        if self.config.api_key:
            env[KEY_VARIABLE] = self.config.api_key
        return env

    def curl(self) -> str:
        """A command line that asks for a few tokens, with the place where the shell finds the key."""
        slos = {"ttft_slo": 1.0} | ({"tbt_slo": 0.1} if self.config.unified else {})
        slo = f', "custom_params": {json.dumps(slos)}' if self.config.flowprefill else ""
        body = f'{{"model": "{self.served_name}", "prompt": "Hello", "max_tokens": 16{slo}}}'
        command = ["curl", f"{self.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
        key = f' -H "Authorization: Bearer {self.config.api_key_in_shell}"' if self.config.api_key else ""
        return shlex.join(command) + key

    def _args(self, role: Role) -> list[str]:
        """The user's options of a server."""
        own: dict[Role, Sequence[str]] = {"prefill": self.config.prefill_args, "decode": self.config.decode_args}
        return [*self.config.server_args, *own.get(role, ())]

    def _size(self, role: Role, names: Sequence[str]) -> int:
        """What a server is told by the option ``names``, at least 1; SGLang's parser refuses what is no number."""
        size = last_value(self._args(role), *names) or ""
        return max(1, int(size)) if size.isdigit() else 1

    def _port(self, role: Role, index: int) -> int:
        if self.config.is_one_server:
            return self.ports.gateway
        first = {"prefill": self.ports.prefill, "decode": self.ports.decode, "unified": self.ports.unified}
        return free_ports.own_ports(first[role], self.count(role), self.is_joint(role))[index]

    def _first_gpu(self, role: Role, index: int) -> int:
        """GPUs are dealt out in order: prefill servers first, to each as many as its parallelism asks for."""
        before = self.config.prefill * self._gpus("prefill") if role == "decode" else 0
        return before + index * self._gpus(role)

    def _gpus(self, role: Role) -> int:
        is_joint = self.is_joint(role)
        counted = [names for field, names in PARALLEL_OPTIONS.items() if not (is_joint and field == "dp_size")]
        return math.prod(self._size(role, names) for names in counted)

    def _options(self, role: Role, index: int) -> FlowPrefillConfig:
        """FlowPrefill's options of a server: each of several servers has an event log of its own."""
        log = self.event_log(role, index)
        # The launcher writes one timeline of all servers.
        changes = {"event_log": None if log is None else str(log), "timeline": None}
        return self.config.options.model_copy(update=changes)

    @property
    def served_name(self) -> str:
        return "embedded" if self.config.model_path is None else self.model_path


def last_value(args: Sequence[str], *options: str) -> str | None:
    """Value of an option, given by any of its names, in a list of command line arguments."""
    value = None
    for argument, following in pairwise([*args, ""]):
        if argument in options:
            value = following
        elif argument.partition("=")[0] in options:
            value = argument.partition("=")[2]
    return value


def join_values(argv: Sequence[str]) -> list[str]:
    """Write ``--prefill-args VALUE`` as ``--prefill-args=VALUE``, and so with all options that take options."""
    return attach_values(argv, WITH_ARGUMENTS)


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _dtype(args: Sequence[str]) -> str:
    """Of the weights of a server on the CPU with these options of SGLang."""
    dtype = last_value(args, "--dtype")
    return "float32" if dtype in (None, "auto", "float") else str(dtype)


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
