"""Starts prefill servers, decode servers and gateway, or a unified server, waits until a request gets through, and ends
them all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, Final

import requests

from sgl_flowprefill.cluster import phases, preflight
from sgl_flowprefill.cluster.asked import Asked
from sgl_flowprefill.cluster.base import ClusterConfig, ClusterError, StartError
from sgl_flowprefill.cluster.commands import Layout, Role
from sgl_flowprefill.cluster.gateway import Gateway, Worker, bearer
from sgl_flowprefill.cluster.machine import CpuPlan
from sgl_flowprefill.cluster.process import Guard, Server

POLL_S: Final = 0.2
PROGRESS_S: Final = 10.0
SHOWN_CHARACTERS: Final = 300
"""Longest part of an answer's body that a message repeats."""
LONGEST_BACK_OFF_S: Final = 60.0
"""Longest pause before a server is started again; one that has run for as long starts over with a short one."""
ENSURE_S: Final = 5.0
"""How often a gateway on another machine is asked whether it still knows the servers here."""
LEAVE_S: Final = 3.0
"""How long a gateway on another machine may take to hear that servers end."""
DRAIN_S: Final = 120.0
"""How long the requests on a server have to end, once it gets no more of them."""
NO_CONNECTION: Final = "no connection"
STARTING: Final = (NO_CONNECTION, "HTTP 503")
"""What comes instead of an answer while a server starts."""
UNAUTHORIZED: Final = (401, 403)
FATAL: Final = (400, 404, 422, *UNAUTHORIZED)
"""Answers that waiting does not change."""
FIRST_REQUEST: Final[Mapping[str, Any]] = {
    "text": "Hello",
    "sampling_params": {"max_new_tokens": 2, "temperature": 0},
}


class Member:
    """A prefill, decode or unified server, through all its restarts."""

    def __init__(self, layout: Layout, role: Role, index: int) -> None:
        self.name = layout.name(role, index)
        self.role, self.index = role, index
        self.url = layout.server_url(role, index)
        self.bootstrap = layout.ports.bootstrap + index
        self.server: Server | None = None
        """None while the server waits for its next start."""
        self.up_since_s: float | None = None
        """When the server was last found healthy after a start; None before that."""
        self.start_at_s = 0.0
        self.back_off_s = 1.0
        self.health: Asked[bool] | None = None
        """The question whether a server that was started again is healthy, until it is answered."""
        self.seen: str | None = None
        """What the last question whether the server is healthy got instead of an answer."""

    @property
    def worker(self) -> Worker:
        return Worker(self.role, self.url, self.bootstrap if self.role == "prefill" else None)


class Cluster:
    """A running cluster, or one machine's part of it, as a context manager.

    Entering checks what can be checked (StartError), starts the servers and returns when a request went through, or
    when the gateway that they join routes to them; leaving ends every process. ``on_progress`` gets a line whenever
    something has happened.
    """

    def __init__(self, config: ClusterConfig, on_progress: Callable[[str], None] = lambda line: None) -> None:
        self.config = config
        self._say = on_progress
        self._guard = Guard()
        self._members: list[Member] = []
        self._gateway_server: Server | None = None
        self._ensured_s = 0.0
        self._errands: deque[Callable[[], object]] = deque()
        """What is to be done at the gateway, one after the other; ``check`` does not wait for it."""
        self._errand: Asked[object] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        self._say("checking the model, the ports and the options")
        self._layout: Layout = preflight.prepare(self.config)
        self._gateway = Gateway(self.url, self.config.api_key)
        with self._stack:
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
        """Where clients send their requests: to the gateway, or straight to the unified server."""
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
        """Process id by name: prefill, decode, gateway; prefill-0, prefill-1 and so on where there are several."""
        return {server.name: server.pid for server in self._servers()}

    @property
    def answers(self) -> bool:
        """Whether this is a whole cluster, which answers requests by itself."""
        return self.config.join is None and bool(self._members)

    def curl(self) -> str:
        """A command line that asks for a few tokens."""
        return self._layout.curl()

    def check(self) -> None:
        """See to servers that have ended, or do not come back up in time. While another server of its role is up, a
        server is started again, after a pause; otherwise ClusterError is raised with the last lines of its log.
        Returns at once: a server or gateway that does not answer is waited for aside."""
        self._check_guard()
        if self._gateway_server is not None:
            self._check_ended(self._gateway_server)
        for member in self._members:
            if member.server is None:
                if time.monotonic() >= member.start_at_s:
                    self._start_again(member)
            elif how := member.server.ended():
                self._lose(member, member.server, how)
            elif member.up_since_s is None:
                self._look_after(member, member.server)
        if (self.config.join or not self._layout.is_single) and time.monotonic() - self._ensured_s >= ENSURE_S:
            self._ensured_s = time.monotonic()
            if not self._errands:
                self._errands.append(self._are_routed_to)
        self._run_errands()

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
        """Let requests end before the servers do: servers leave their gateway, and are told to end when idle."""
        for member in self._members:
            self._leave(member)
        give_up_s = time.monotonic() + DRAIN_S
        for server in self._servers():
            server.terminate()
        for server in self._servers():
            server.wait(give_up_s - time.monotonic())

    def _servers(self) -> list[Server]:
        servers = [member.server for member in self._members]
        return [server for server in (*servers, self._gateway_server) if server is not None]

    def _start(self) -> None:
        begin_s = time.monotonic()
        try:
            self.config.log_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StartError(f"--log-dir {self.config.log_dir}: {error.strerror}") from None
        if self._layout.servers:
            self._start_servers(begin_s)
        if self.config.join:
            self._await(f"the gateway at {self.url}", self._are_routed_to)
        elif not self.config.unified:
            self._start_gateway()
        for server in self._servers():  # not before: on one CPU the servers take twice as long to start
            self._bind(server)
        if self.answers:
            through, what = ("", "server") if self.config.unified else (" through the gateway", "cluster")
            self._await(f"a first request{through}", self._first_request)
            self._say(f"the {what} answers after {time.monotonic() - begin_s:.0f} s")

    def _start_servers(self, begin_s: float) -> None:
        plural = "s" if len(self._layout.servers) > 1 else ""
        servers = f"{self._layout.in_words()} server{plural} on {self._layout.device()}"
        self._say(f"starting the {servers} (logs in {self.config.log_dir})")
        if self.config.join:
            self._stack.callback(self._leave_all)
        for role, index in self._layout.servers:
            member = Member(self._layout, role, index)
            if self.config.join:
                self._leave(member)  # what listened there before
            self._launch(member)
            self._members.append(member)
        for member in self._members:
            self._await(
                f"the {member.name} server",
                partial(self._is_healthy, member),
                partial(self._phases, member),
            )
            self._say(f"the {member.name} server is up after {time.monotonic() - begin_s:.0f} s")
            self._is_up(member)

    def _start_gateway(self) -> None:
        layout = self._layout
        metrics_port = preflight.free_port(self.config.host, taken=vars(layout.ports).values())
        log = self.config.log_dir / "gateway.log"
        self._gateway_server = self._guard.start(
            "gateway", layout.gateway_command(metrics_port), layout.gateway_env(), log
        )
        self._await("the gateway's workers" if self._members else "the gateway", self._workers_are_active)

    def _launch(self, member: Member) -> None:
        layout, role, index = self._layout, member.role, member.index
        command = layout.server_command(role, index, member.bootstrap)
        log = self.config.log_dir / f"{member.name}.log"
        member.server = self._guard.start(member.name, command, layout.server_env(role, index), log)
        member.up_since_s = member.health = member.seen = None

    def _is_up(self, member: Member) -> None:
        assert member.server is not None
        member.server.watch_children()
        member.up_since_s = time.monotonic()

    def _look_after(self, member: Member, server: Server) -> None:
        """See whether a server that was started again is up."""
        if member.health is None:
            member.health = Asked(partial(self._is_healthy, member))
        if member.health.is_answered:
            try:
                member.health.answer()
            except requests.RequestException as error:
                member.health, member.seen = None, _seen(error)
            else:
                self._is_up(member)
                self._bind(server)
                self._say(f"the {member.name} server is back")
                self._ensured_s = 0.0
                return
        if time.monotonic() - member.start_at_s > self.config.startup_timeout_s:
            self._lose(member, server, self._too_late(f"the {member.name} server", member.seen))

    def _lose(self, member: Member, server: Server, how: str) -> None:
        """Start a server that has ended again after a pause. Raises ClusterError if it was the last of its role."""
        others = [other for other in self._members if other.role == member.role and other is not member]
        ended = _last_words(server, how)
        if not any(other.up_since_s is not None for other in others):
            raise ClusterError(ended)
        now_s = time.monotonic()
        if member.up_since_s is not None and now_s - member.up_since_s > LONGEST_BACK_OFF_S:
            member.back_off_s = 1.0
        member.server, member.up_since_s, member.start_at_s = None, None, now_s + member.back_off_s
        self._errands.append(partial(self._leave, member))
        self._guard.end(server)
        self._say(f"{ended}\nIt is started again in {member.back_off_s:.0f} s; the others go on")
        member.back_off_s = min(2 * member.back_off_s, LONGEST_BACK_OFF_S)

    def _start_again(self, member: Member) -> None:
        """Start a server at its old address, but with another bootstrap port. A decode server that has not noticed the
        end of a prefill server would go on to use what it had learned there: rank addresses that are gone."""
        member.bootstrap = preflight.free_port(self.config.worker_host)
        self._launch(member)

    def _leave(self, member: Member) -> None:
        with suppress(requests.RequestException):
            self._gateway.remove(member.url)

    def _leave_all(self) -> None:
        """Take all servers off their gateway. They end after ``LEAVE_S``, whether it has answered or not."""
        give_up_s = time.monotonic() + LEAVE_S
        for asked in [Asked(partial(self._leave, member)) for member in self._members]:
            asked.wait(give_up_s - time.monotonic())

    def _run_errands(self) -> None:
        """Begin the next errand at the gateway, if none is under way."""
        if self._errand is not None and self._errand.is_answered:
            with suppress(requests.RequestException):
                self._errand.answer()
            self._errand = None
        if self._errand is None and self._errands:
            self._errand = Asked(self._errands.popleft())

    def _are_routed_to(self) -> bool:
        """Whether requests go to every server here that is up. Tells the gateway about servers unknown to it."""
        routed = [self._gateway.ensure(member.worker) for member in self._members if member.up_since_s is not None]
        return all(routed)

    def _bind(self, server: Server) -> None:
        if self.cpus:
            count = self._layout.prefilling
            schedulers = [self.cpus.scheduler_of(index, count) for index in range(count)]
            server.bind(self.cpus.others, except_on=schedulers)

    def _check_guard(self) -> None:
        if how := self._guard.ended():
            raise ClusterError(f"{how}: without it, servers could outlive the launcher, so all of them end now")

    def _check_ended(self, server: Server) -> None:
        if how := server.ended():
            raise ClusterError(_last_words(server, how))

    def _await(self, what: str, done: Callable[[], bool], doing: Callable[[], str] | None = None) -> None:
        """Wait until ``done``, which raises ``requests.RequestException`` while it cannot tell. Raises ClusterError for
        an answer that waiting does not change, the end of a server, and after ``startup_timeout_s``. ``doing`` says
        what goes on meanwhile, which tells more than that there is no connection yet."""
        begin_s = said_s = time.monotonic()
        seen: str | None = None
        asked: Asked[bool] | None = None
        while True:
            asked = asked or Asked(done)
            if asked.is_answered:
                answered, asked = asked, None
                try:
                    if answered.answer():
                        return
                    seen = None
                except requests.RequestException as error:
                    seen = _seen(error)
                    if error.response is not None and error.response.status_code in FATAL:
                        raise ClusterError(f"{what}: {seen}; {self._remedy(error.response.status_code)}") from None
            self._check_guard()
            for server in self._servers():
                self._check_ended(server)
            now_s = time.monotonic()
            if now_s - begin_s > self.config.startup_timeout_s:
                raise ClusterError(f"{self._too_late(what, seen)}; the logs are in {self.config.log_dir}")
            if now_s - said_s >= PROGRESS_S:
                told = [doing() if doing else None, None if doing and seen in STARTING else seen]
                self._say(f"waiting for {what} ({'; '.join([f'{now_s - begin_s:.0f} s', *filter(None, told)])})")
                said_s = now_s
            time.sleep(POLL_S)

    def _remedy(self, status_code: int) -> str:
        remedy = "look for the reason in the logs"
        if status_code in UNAUTHORIZED:
            remedy = "give each launch.py of the cluster the same --api-key, and SGLang and smg no other"
        return f"{remedy} (in {self.config.log_dir})"

    def _phases(self, member: Member) -> str:
        """What a server does while it starts, and what the other servers do that start at the same time."""
        others = [other for other in self._members if other is not member and other.up_since_s is None]
        return "; ".join([_phase(member), *(f"{other.name}: {_phase(other)}" for other in others)])

    def _too_late(self, what: str, seen: str | None) -> str:
        late = f"{what} did not come up within {self.config.startup_timeout_s:g} s (--startup-timeout-s)"
        return f"{late}: {seen}" if seen else late

    def _workers_are_active(self) -> bool:
        workers = self._gateway.workers()
        return len(workers) == len(self._members) and all(worker.get("is_healthy") for worker in workers)

    def _is_healthy(self, member: Member) -> bool:
        requests.get(f"{member.url}/health", timeout=30).raise_for_status()
        return True

    def _first_request(self) -> bool:
        url, headers = f"{self.url}/generate", bearer(self.config.api_key)
        requests.post(url, json=FIRST_REQUEST, headers=headers, timeout=120).raise_for_status()
        return True


def _seen(error: requests.RequestException) -> str:
    """What came back instead of an answer, in short."""
    if error.response is None:
        return NO_CONNECTION if isinstance(error, requests.ConnectionError) else type(error).__name__
    body = " ".join(error.response.text.split())
    return f"HTTP {error.response.status_code} {body[:SHOWN_CHARACTERS]}".rstrip()


def _phase(member: Member) -> str:
    server = member.server
    assert server is not None
    return phases.phase(server.log, server.log_start) or f"its log is {server.log}"


def _last_words(server: Server, how: str) -> str:
    return f"{how}. The last lines of {server.log}:\n{server.last_lines()}"
