"""Starts prefill servers, decode servers and gateway, or unified servers, waits until a request gets through, and ends
them all."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import requests

from sgl_flowprefill.cluster import free_ports, logs, preflight
from sgl_flowprefill.cluster.base import LOOPBACK, ClusterConfig, ClusterError
from sgl_flowprefill.cluster.commands import GATEWAY, Layout
from sgl_flowprefill.cluster.gateway import Gateway, Routing, bearer
from sgl_flowprefill.cluster.machine import CpuPlan
from sgl_flowprefill.cluster.members import Members, bind, end_when_idle
from sgl_flowprefill.cluster.process import Guard, Server
from sgl_flowprefill.cluster.waiting import POLL_S, Waiting

FIRST_REQUEST: Final[Mapping[str, Any]] = {
    "text": "Hello",
    "sampling_params": {"max_new_tokens": 2, "temperature": 0},
}


class Cluster:
    """A running cluster, or one machine's part of it, as a context manager.

    Entering checks what can be checked (StartError), starts the servers and returns when a request went through, or
    when the gateway that they join routes to them; leaving ends every process. ``on_progress`` gets a line whenever
    something has happened.
    """

    def __init__(
        self,
        config: ClusterConfig,
        on_progress: Callable[[str], None] = lambda line: None,
        guard: Guard | None = None,
    ) -> None:
        self.config = config
        self._say = on_progress
        self._guard = guard or Guard()
        self._gateway_server: Server | None = None
        self._waiting = Waiting(config, self._check_running, on_progress)
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        self._say("checking the model, the ports and the options")
        self._layout: Layout = preflight.prepare(self.config)
        self._gateway = Gateway(self.url, self.config.api_key)
        self._members = Members(self._layout, self._gateway, self._guard, self._say)
        with self._stack:
            for name in self._layout.process_names:
                self._stack.enter_context(logs.held(self.config.log(name)))
            self._stack.enter_context(self._guard)
            self._start()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def url(self) -> str:
        """Where clients send their requests: to the gateway, or straight to a single unified server."""
        return self.config.join or self._layout.url

    @property
    def server_urls(self) -> list[str]:
        """URLs of all servers here, the first one that prefills first."""
        return [self._layout.server_url(role, index) for role, index in self._layout.servers]

    @property
    def prefill_url(self) -> str:
        """URL of the first server that prefills."""
        return self._layout.server_url("unified" if self.config.unified else "prefill")

    @property
    def prefilling_urls(self) -> dict[str, str]:
        """URLs of the servers here that prefill, by their names."""
        prefilling = [(role, index) for role, index in self._layout.servers if role != "decode"]
        return {self._layout.name(role, index): self._layout.server_url(role, index) for role, index in prefilling}

    @property
    def event_logs(self) -> list[Path]:
        """Event logs of the servers here, if they write any."""
        logs = [self._layout.event_log(role, index) for role, index in self._layout.servers]
        return [log for log in logs if log is not None]

    @property
    def decode_url(self) -> str:
        """URL of the first decode server."""
        return self._layout.server_url("decode")

    @property
    def model_path(self) -> str:
        return self._layout.model_path

    @property
    def cpus(self) -> CpuPlan | None:
        """How the CPUs are shared; a client belongs on ``cpus.others``. None on a machine with GPUs."""
        return self._layout.cpus

    @property
    def processes(self) -> dict[str, int]:
        """Process id by name: prefill, decode, unified, gateway; prefill-0, prefill-1 where there are several."""
        return {server.name: server.pid for server in self._servers()}

    @property
    def answers(self) -> bool:
        """Whether this is a whole cluster, which answers requests by itself."""
        return self.config.join is None and bool(self._members)

    def curl(self) -> str:
        """A command line that asks for a few tokens."""
        return self._layout.curl()

    def check(self) -> None:
        """``Members.check`` for the servers; raises ClusterError if the gateway or the guard has ended."""
        self.check_guard()
        if self._gateway_server is not None:
            self._gateway_server.check()
        self._members.check()

    def wait(self) -> None:
        """Block until the cluster cannot go on, then raise ClusterError."""
        while True:
            self.check()
            time.sleep(POLL_S)

    def suspend(self) -> None:
        """Stop all processes (SIGSTOP): the cluster keeps its memory, takes no CPU time and answers nobody."""
        for server in self._servers():
            server.suspend()

    def resume(self) -> None:
        """Let all processes go on where ``suspend`` stopped them."""
        for server in self._servers():
            server.resume()

    def drain(self) -> None:
        """Let requests end before the servers do, for ``drain_timeout_s`` at most. Servers leave a gateway elsewhere
        and are told to end when idle; of a whole cluster, only what clients ask is told so, and the others serve on.
        Raises ClusterError when the guard has ended: the servers must not outlive the launcher."""
        if self.config.join:
            self._members.drain(self._members.servers, self.check_guard)
            return
        asked = self._members.servers if self._gateway_server is None else [self._gateway_server]
        end_when_idle(self._guard, asked, time.monotonic() + self.config.drain_timeout_s, self.check_guard)

    def _servers(self) -> list[Server]:
        return self._members.servers + ([self._gateway_server] if self._gateway_server else [])

    def _start(self) -> None:
        begin_s = time.monotonic()
        if self._layout.servers:
            self._start_servers(begin_s)
        if self.config.join:
            what = "the gateway of unified servers" if self.config.unified else "the gateway"
            self._waiting.until(f"{what} at {self.url}", self._members.are_routed_to)
        if self.config.has_gateway:
            self._start_gateway()
        for server in self._servers():  # not before: on one CPU the servers take twice as long to start
            bind(server, self._layout)
        if self.answers:
            through, what = ("", "server") if self.config.is_one_server else (" through the gateway", "cluster")
            self._waiting.until(
                f"a first request{through}", partial(answers_first_request, self.url, self.config.api_key)
            )
            self._say(f"the {what} answers after {time.monotonic() - begin_s:.0f} s")

    def _start_servers(self, begin_s: float) -> None:
        plural = "s" if len(self._layout.servers) > 1 else ""
        servers = f"{self._layout.in_words()} server{plural} on {self._layout.device()}"
        self._say(f"starting the {servers} (logs in {self.config.log_dir})")
        if self.config.join:
            self._stack.callback(self._members.leave_all)
        if self.config.options.event_log is None:
            for log in self.event_logs:  # of another run, for its timeline
                log.unlink(missing_ok=True)
        self._members.launch()
        for member in self._members:
            doing = partial(self._members.phases, member)
            self._waiting.until(f"the {member.name} server", member.is_healthy, doing)
            self._say(f"the {member.name} server is up after {time.monotonic() - begin_s:.0f} s")
            self._members.is_up(member)

    def _start_gateway(self) -> None:
        layout = self._layout
        metrics_port = free_ports.free_port(LOOPBACK, {*layout.taken, self.config.live_port or 0})
        command, log = layout.gateway_command(metrics_port), self.config.log(GATEWAY)
        self._gateway_server = self._guard.start(GATEWAY, command, layout.gateway_env(), log)
        routing = Routing(self._gateway, self.server_urls)
        self._waiting.until("the gateway", routing.is_complete, routing.phase)

    def check_guard(self) -> None:
        if how := self._guard.ended():
            raise ClusterError(f"{how}: without it, servers could outlive the launcher, so all of them end now")

    def _check_running(self) -> None:
        self.check_guard()
        for server in self._servers():
            server.check()


def answers_first_request(url: str, api_key: str | None) -> bool:
    """Raises ``requests.RequestException`` while nothing answers at ``url``."""
    response = requests.post(f"{url}/generate", json=FIRST_REQUEST, headers=bearer(api_key), timeout=120)
    response.raise_for_status()
    return True
