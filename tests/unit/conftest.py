"""The launcher up to the moment at which it would start a server."""

import pytest

from sgl_flowprefill.cluster import cli, machine
from sgl_flowprefill.cluster.process import Guard


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
