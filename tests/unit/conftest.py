"""A launcher that starts no server, or some that only sleep."""

import pytest

from sgl_flowprefill.cluster import cli, machine, preflight, waiting
from sgl_flowprefill.cluster.gateway import Gateway
from sgl_flowprefill.cluster.members import Members
from sgl_flowprefill.cluster.process import Guard
from tests.sleeping_servers import Clock, FakeGuard, Restarting


@pytest.fixture
def no_server_may_start(monkeypatch, tmp_path):
    """A machine with much memory and no GPU, in a folder of its own."""

    def refuse(guard):
        raise AssertionError("a server was about to start")

    monkeypatch.setattr(Guard, "__enter__", refuse)
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    monkeypatch.setattr(cli.signal, "signal", lambda number, handler: None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refusal(capsys, no_server_may_start):
    """Calls launch.py, and gives the one line with which it ends."""

    def run(*argv):
        assert cli.main(argv) == cli.EXIT_CANNOT_START
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("launch.py: ")
        return lines[0]

    return run


@pytest.fixture
def fast_waiting(monkeypatch):
    """What waits for servers looks and speaks often."""
    monkeypatch.setattr(waiting, "POLL_S", 0.01)
    monkeypatch.setattr(waiting, "PROGRESS_S", 0.1)


@pytest.fixture
def restarting(monkeypatch, tmp_path):
    """Two prefill servers and a decode server of a cluster, of which the first is awaited."""
    monkeypatch.setattr(machine, "gpu_count", lambda: 0)
    monkeypatch.setattr(machine, "available_memory_bytes", lambda: 64 * 10**9)
    config = cli.parse(["--prefill", "2", "--ports", "0", "--startup-timeout-s", "5"])
    layout = preflight.prepare(config)
    guard, gateway, said, clock = FakeGuard(tmp_path / "logs"), Gateway(layout.url), [], Clock()
    members = Members(layout, gateway, guard, said.append, clock)
    members.launch()
    for member in members:
        member.start_at_s = clock.now_s
    yield Restarting(config, guard, gateway, members, said, clock)
    for server in guard.started:
        server.terminate()
        server.reap()
