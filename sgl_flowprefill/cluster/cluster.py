"""Starts prefill, decode and gateway, waits until a request gets through, and ends them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Final

import requests

from sgl_flowprefill.cluster import preflight
from sgl_flowprefill.cluster.base import ClusterConfig, ClusterError, StartError
from sgl_flowprefill.cluster.commands import Layout, gateway_env
from sgl_flowprefill.cluster.machine import CpuPlan
from sgl_flowprefill.cluster.process import Guard, Server

POLL_S: Final = 0.2
PROGRESS_S: Final = 10.0
FIRST_REQUEST: Final[Mapping[str, Any]] = {
    "text": "Hello",
    "sampling_params": {"max_new_tokens": 2, "temperature": 0},
}


class Cluster:
    """A running cluster, as a context manager.

    Entering checks what can be checked (StartError), starts the servers and returns when a request went through the
    gateway; leaving ends every process. ``on_progress`` gets a line whenever something has happened.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[str], None] = lambda line: None) -> None:
        self.config = config
        self._say = on_progress
        self._servers: dict[str, Server] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        self._say("checking the model, the ports and the options")
        self._layout: Layout = preflight.prepare(self.config)
        with self._stack:
            self._guard = self._stack.enter_context(Guard())
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def gateway_url(self) -> str:
        return self._layout.url(self._layout.ports.gateway)

    @property
    def prefill_url(self) -> str:
        return self._layout.url(self._layout.ports.prefill)

    @property
    def decode_url(self) -> str:
        return self._layout.url(self._layout.ports.decode)

    @property
    def model_path(self) -> str:
        return self._layout.model_path

    @property
    def cpus(self) -> CpuPlan | None:
        """How the CPUs are shared; a client belongs on ``cpus.others``. None on a machine with GPUs."""
        return self._layout.cpus

    @property
    def processes(self) -> dict[str, int]:
        """Process id by name: prefill, decode, gateway."""
        return {name: server.pid for name, server in self._servers.items()}

    def curl(self) -> str:
        """A command line that asks the gateway for a few tokens."""
        return self._layout.curl()

    def check(self) -> None:
        """Raise ClusterError with the last lines of its log if a server has ended."""
        for server in self._servers.values():
            if ended := server.ended():
                raise ClusterError(f"{ended}. The last lines of {server.log}:\n{server.last_lines()}")

    def wait(self) -> None:
        """Block until a server ends, then raise ClusterError."""
        while True:
            self.check()
            time.sleep(POLL_S)

    def _start(self) -> None:
        begin_s = time.monotonic()
        try:
            self.config.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"--log-dir {self.config.log_dir}: {error.strerror}") from None
        self._say(f"starting the prefill and decode servers (logs in {self.config.log_dir})")
        for role in ("prefill", "decode"):
            self._launch(role, self._layout.server_command(role), self._layout.server_env(role))
        for name, url in (("prefill", self.prefill_url), ("decode", self.decode_url)):
            self._await(f"the {name} server", lambda url=url: _get(f"{url}/health") is not None)  # type: ignore[misc]
            self._say(f"the {name} server is up after {time.monotonic() - begin_s:.0f} s")
            self._servers[name].watch_children()
        metrics_port = preflight.free_port(self.config.host, taken=vars(self._layout.ports).values())
        self._launch("gateway", self._layout.gateway_command(metrics_port), gateway_env())
        self._await("the gateway's workers", self._workers_are_active)
        if self.cpus:  # not before: on one CPU the servers take twice as long to start
            for server in self._servers.values():
                server.bind(self.cpus.others, except_on=self.cpus.scheduler)
        self._await("a first request through the gateway", self._first_request)
        self._say(f"the cluster answers after {time.monotonic() - begin_s:.0f} s")

    def _launch(self, name: str, command: list[str], env: dict[str, str]) -> None:
        self._servers[name] = self._guard.start(name, command, env, self.config.log_dir / f"{name}.log")

    def _await(self, what: str, done: Callable[[], bool]) -> None:
        begin_s = said_s = time.monotonic()
        while not done():
            self.check()
            now_s = time.monotonic()
            if now_s - begin_s > self.config.startup_timeout_s:
                raise ClusterError(f"{what} did not come up within {self.config.startup_timeout_s:.0f} s")
            if now_s - said_s >= PROGRESS_S:
                self._say(f"waiting for {what} ({now_s - begin_s:.0f} s)")
                said_s = now_s
            time.sleep(POLL_S)

    def _workers_are_active(self) -> bool:
        listing = _get(f"{self.gateway_url}/workers")
        workers = listing.json().get("workers", []) if listing is not None else []
        return len(workers) == 2 and all(worker.get("is_healthy") for worker in workers)

    def _first_request(self) -> bool:
        try:
            response = requests.post(f"{self.gateway_url}/generate", json=FIRST_REQUEST, timeout=120)
        except requests.RequestException:
            return False
        return response.ok


def _get(url: str) -> requests.Response | None:
    try:
        response = requests.get(url, timeout=30)
    except requests.RequestException:
        return None
    return response if response.ok else None
