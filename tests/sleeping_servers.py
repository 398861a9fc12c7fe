"""The members of a cluster whose servers only sleep, with a clock that a test sets."""

import os
import sys
from dataclasses import dataclass, replace
from functools import partial

from sgl_flowprefill.cluster import ClusterConfig
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.cluster.members import Members
from sgl_flowprefill.cluster.process import Server
from sgl_flowprefill.cluster.waiting import Waiting


class FakeGuard:
    """Starts servers that sleep."""

    def __init__(self, directory):
        self.directory = directory
        self.started, self.killed = [], []
        self.how = None

    def start(self, name, command, env, log):
        sleeping = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.started.append(Server(name, sleeping, os.environ, self.directory / f"{len(self.started)}.log"))
        return self.started[-1]

    def ask_to_end(self, server):
        server.terminate()

    def end(self, server):
        self.killed.append(server)

    def ended(self):
        return self.how


class Clock:
    now_s = 1000.0

    def __call__(self):
        return self.now_s


@dataclass
class Restarting:
    """Two prefill servers; the first one was started again, and does not answer."""

    config: ClusterConfig
    guard: FakeGuard
    gateway: Gateway
    members: Members
    said: list[str]
    clock: Clock

    def __post_init__(self):
        self.first, self.second, *others = self.members
        for member in (self.second, *others):
            self.members.is_up(member)

    def await_first(self, timeout_s):
        def check():
            for server in self.members.servers:
                server.check()

        waiting = Waiting(replace(self.config, startup_timeout_s=timeout_s), check, self.said.append)
        waiting.until("the prefill-0 server", self.first.is_healthy, partial(self.members.phases, self.first))
