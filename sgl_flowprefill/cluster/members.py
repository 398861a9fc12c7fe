"""The servers of a cluster through all their restarts: started, looked after, and known to their gateway."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Final
from urllib.parse import urlsplit

import requests

from sgl_flowprefill.cluster import free_ports, phases
from sgl_flowprefill.cluster.asked import Asked
from sgl_flowprefill.cluster.base import ClusterError, StartError
from sgl_flowprefill.cluster.commands import Layout, Role
from sgl_flowprefill.cluster.gateway import Errands, Gateway, Worker
from sgl_flowprefill.cluster.process import Guard, Server, listener
from sgl_flowprefill.cluster.waiting import POLL_S, in_short, too_late

LONGEST_BACK_OFF_S: Final = 60.0
"""Longest pause before a server is started again; one that has run for as long starts over with a short one."""
ENSURE_S: Final = 5.0
"""How often a gateway on another machine is asked whether it still knows the servers here."""
LEAVE_S: Final = 3.0
"""How long a gateway on another machine may take to hear that servers end."""


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

    def is_healthy(self) -> bool:
        """Raises ``requests.RequestException`` while the server is not, and ClusterError when another process has its
        port and answers in its place."""
        server = self.server
        requests.get(f"{self.url}/health", timeout=30).raise_for_status()
        port = urlsplit(self.url).port
        if server is None or port is None or server.ended():  # its end is told by others
            return True
        if not server.listens_on(port) and not server.ended():  # meanwhile
            raise ClusterError(
                f"port {port}, which the {self.name} server is to have, was taken while it started: {listener(port)} "
                "answers there; choose another port with --ports"
            )
        return True

    def phase(self) -> str:
        """What the server does while it starts, by its log. Raises ClusterError for one that cannot listen: it would
        not end by itself.
        """
        server = self.server
        assert server is not None
        if (taken := self.taken(server)) is not None:
            raise ClusterError(server.last_words(f"{taken}; try again"))
        return phases.phase(server.log, server.log_start) or f"its log is {server.log}"

    def taken(self, server: Server) -> str | None:
        """What is to be said of a ``server`` that cannot listen, by its log; None for one that may."""
        if phases.phase(server.log, server.log_start) != phases.NO_PORT:
            return None
        return f"the {self.name} server cannot listen at {self.url}: its port was taken while it started"


class Members:
    """The servers of ``layout``, as processes of ``guard``, and what ``gateway`` knows of them. ``say`` gets a line
    whenever one is lost or back; ``clock`` gives seconds."""

    def __init__(
        self,
        layout: Layout,
        gateway: Gateway,
        guard: Guard,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._layout, self._config = layout, layout.config
        self._gateway, self._guard = gateway, guard
        self._say, self._clock = say, clock
        self._members = [Member(layout, role, index) for role, index in layout.servers]
        self._ensured_s = 0.0
        self._errands = Errands()

    def __iter__(self) -> Iterator[Member]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    @property
    def servers(self) -> list[Server]:
        """The members' processes, without those of members that wait for their next start."""
        return [member.server for member in self._members if member.server is not None]

    def launch(self) -> None:
        """Start all servers."""
        for member in self._members:
            if self._config.join:
                self.leave(member)  # what listened there before
            self._launch(member)

    def is_up(self, member: Member) -> None:
        """From now on, count on a server that was found healthy."""
        assert member.server is not None
        member.server.watch_children()
        member.up_since_s = self._clock()

    def phases(self, member: Member) -> str:
        """What a server does while it starts, and what the other servers do that start at the same time."""
        others = [other for other in self._members if other is not member and other.up_since_s is None]
        return "; ".join([member.phase(), *(f"{other.name}: {other.phase()}" for other in others)])

    def check(self) -> None:
        """See to servers that have ended, or do not come back up in time. While another server of its role is up, a
        server is started again, after a pause; otherwise ClusterError is raised with the last lines of its log.
        Returns at once: a server or gateway that does not answer is waited for aside."""
        for member in self._members:
            if member.server is None:
                if self._clock() >= member.start_at_s:
                    self._start_again(member)
            elif how := member.server.ended():
                self._lose(member, member.server, how)
            elif member.up_since_s is None:
                self._look_after(member, member.server)
        if (self._config.join or not self._layout.is_single) and self._clock() - self._ensured_s >= ENSURE_S:
            self._ensured_s = self._clock()
            if self._errands.are_begun:
                self._errands.add(self.are_routed_to)
        self._errands.go_on()

    def are_routed_to(self) -> bool:
        """Whether requests go to every server here that is up. Tells the gateway about servers unknown to it."""
        routed = [self._gateway.ensure(member.worker) for member in self._members if member.up_since_s is not None]
        return all(routed)

    def leave(self, member: Member) -> None:
        """Take a server off its gateway, if that can be asked."""
        with suppress(requests.RequestException):
            self._gateway.remove(member.url)

    def leave_all(self) -> None:
        """Take all servers off their gateway. They end after ``LEAVE_S``, whether it has answered or not."""
        give_up_s = time.monotonic() + LEAVE_S
        for asked in self._asked_to_leave():
            asked.wait(give_up_s - time.monotonic())

    def drain(self, servers: Sequence[Server], check: Callable[[], None]) -> None:
        """Take all off their gateway, and tell ``servers`` to end when idle; ``check`` is called meanwhile."""
        give_up_s = time.monotonic() + self._config.drain_timeout_s
        leaving = self._asked_to_leave()
        _wait_until(lambda: all(asked.is_answered for asked in leaving), give_up_s, check)
        end_when_idle(self._guard, servers, give_up_s, check)

    def _asked_to_leave(self) -> list[Asked[None]]:
        return [Asked(partial(self.leave, member)) for member in self._members]

    def _launch(self, member: Member) -> None:
        layout, role, index = self._layout, member.role, member.index
        command = layout.server_command(role, index, member.bootstrap)
        env, log = layout.server_env(role, index), self._config.log(member.name)
        member.server = self._guard.start(member.name, command, env, log)
        member.up_since_s = member.health = member.seen = None

    def _start_again(self, member: Member) -> None:
        """Start a server at its old address, but with another bootstrap port. A decode server that has not noticed the
        end of a prefill server would go on to use what it had learned there: rank addresses that are gone."""
        try:
            taken = {*self._layout.taken, *(one.bootstrap for one in self._members)}
            member.bootstrap = free_ports.free_port(self._config.worker_host, taken)
            self._launch(member)
        except StartError as error:
            self._say(f"the {member.name} server cannot be started: {error}\n{self._put_off(member)}")

    def _look_after(self, member: Member, server: Server) -> None:
        """See whether a server that was started again is up."""
        if member.health is None:
            member.health = Asked(member.is_healthy)
        if member.health.is_answered:
            try:
                member.health.answer()
            except requests.RequestException as error:
                member.health, member.seen = None, in_short(error)
            except ClusterError as error:
                self._lose(member, server, str(error))
                return
            else:
                self.is_up(member)
                bind(server, self._layout)
                self._say(f"the {member.name} server is back")
                self._ensured_s = 0.0
                return
            if (taken := member.taken(server)) is not None:
                self._lose(member, server, taken)
                return
        if self._clock() - member.start_at_s > self._config.startup_timeout_s:
            self._lose(member, server, too_late(self._config, f"the {member.name} server", member.seen))

    def _lose(self, member: Member, server: Server, how: str) -> None:
        """Start a server that has ended again after a pause. Raises ClusterError if it was the last of its role."""
        others = [other for other in self._members if other.role == member.role and other is not member]
        ended = server.last_words(how)
        if not any(other.up_since_s is not None for other in others):
            raise ClusterError(ended)
        now_s = self._clock()
        if member.up_since_s is not None and now_s - member.up_since_s > LONGEST_BACK_OFF_S:
            member.back_off_s = 1.0
        member.server, member.up_since_s = None, None
        later = self._put_off(member)
        self._errands.add(partial(self.leave, member))
        self._guard.end(server)
        self._say(f"{ended}\n{later}")

    def _put_off(self, member: Member) -> str:
        """Let the next start of a server wait, longer each time; the sentence that says so."""
        pause_s = member.back_off_s
        member.start_at_s = self._clock() + pause_s
        member.back_off_s = min(2 * pause_s, LONGEST_BACK_OFF_S)
        return f"It is started again in {pause_s:.0f} s; the others go on"


def end_when_idle(guard: Guard, servers: Sequence[Server], give_up_s: float, check: Callable[[], None]) -> None:
    """Ask ``servers`` of ``guard`` to end once their requests have, and wait for that until ``give_up_s`` by the
    monotonic clock; ``check`` is called meanwhile."""
    for server in servers:
        guard.ask_to_end(server)
    _wait_until(lambda: all(server.ended() for server in servers), give_up_s, check)


def _wait_until(done: Callable[[], bool], give_up_s: float, check: Callable[[], None]) -> None:
    while not done() and time.monotonic() < give_up_s:
        check()
        time.sleep(POLL_S)


def bind(server: Server, layout: Layout) -> None:
    """Keep a server off the CPUs of the schedulers that prefill. Nothing to do on a machine with GPUs."""
    if layout.cpus:
        count = layout.prefilling
        schedulers = [layout.cpus.scheduler_of(index, count) for index in range(count)]
        server.bind(layout.cpus.others, except_on=schedulers)
