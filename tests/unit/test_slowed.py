"""Processes that are stopped again and again, so that they compute more slowly, and run in the end."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import psutil
import pytest

from sgl_flowprefill.bench.systems.slowed import slowed

PARENT = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"


@pytest.fixture
def family() -> Iterator[list[psutil.Process]]:
    """A process and the one that it has started."""
    parent = subprocess.Popen([sys.executable, "-c", PARENT])
    process = psutil.Process(parent.pid)
    give_up_s = time.monotonic() + 60
    while not (children := process.children()) and time.monotonic() < give_up_s:
        time.sleep(0.01)
    yield [process, *children]
    for one in [*children, process]:
        with suppress(psutil.NoSuchProcess):
            one.kill()
    parent.wait(60)


def stops(process: psutil.Process, looks: int) -> int:
    """How often the process is found stopped."""
    found = 0
    for _ in range(looks):
        found += process.status() == psutil.STATUS_STOPPED
        time.sleep(0.001)
    return found


def test_processes_and_their_children_are_stopped_now_and_then_from_a_time_on(family: list[psutil.Process]) -> None:
    assert len(family) == 2
    for process in family:
        with slowed([family[0].pid], 1e-3, time.monotonic() + 3600):
            assert stops(process, 20) == 0, "not yet"
        with slowed([family[0].pid], 9.0, time.monotonic()):  # stopped nine tenths of the time
            assert stops(process, 400) > 40
        assert process.status() != psutil.STATUS_STOPPED


def test_what_has_ended_is_left_alone(family: list[psutil.Process]) -> None:
    family[1].kill()
    with slowed([family[0].pid, 2**22 - 1], 1.0, time.monotonic()):
        time.sleep(0.1)


def test_processes_run_again_after_an_error(family: list[psutil.Process]) -> None:
    def fail() -> None:
        with slowed([family[0].pid], 100.0, time.monotonic()):
            time.sleep(0.05)
            raise RuntimeError("the replay")

    with pytest.raises(RuntimeError, match="the replay"):
        fail()
    assert all(process.status() != psutil.STATUS_STOPPED for process in family)
