"""Systems whose servers take turns: one runs, the others are stopped, and each gets the whole machine at its start."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import pytest

from sgl_flowprefill.bench.systems import serving
from sgl_flowprefill.bench.systems.catalog import SYSTEMS, System
from sgl_flowprefill.bench.systems.serving import Served, SideBySide
from sgl_flowprefill.cluster import ClusterError
from sgl_flowprefill.cluster.machine import plan_cpus

OURS, STOCK = SYSTEMS["flowprefill"], SYSTEMS["stock-fcfs"]


@dataclass
class Machine:
    """Stands in for clusters: what happens to whom, and the CPUs that each one's start saw."""

    happened: list[tuple[str, str]] = field(default_factory=list)
    seen_cpus: dict[str, set[int]] = field(default_factory=dict)

    @contextmanager
    def start(self, system: System) -> Iterator[Served]:
        self.happened.append(("start", system.name))
        self.seen_cpus[system.name] = os.sched_getaffinity(0)
        yield Served(system, cast(Any, FakeCluster(self, system.name)), cast(Any, None), None)
        self.happened.append(("end", system.name))


@dataclass
class FakeCluster:
    machine: Machine
    name: str
    cpus: Any = field(default_factory=lambda: plan_cpus(sorted(os.sched_getaffinity(0))))

    def suspend(self) -> None:
        self.machine.happened.append(("suspend", self.name))

    def resume(self) -> None:
        self.machine.happened.append(("resume", self.name))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "WAKE_S", 0.0)


def test_one_runs_and_the_others_are_stopped() -> None:
    machine = Machine()
    with SideBySide(machine.start) as systems:
        for system in (OURS, STOCK, OURS):
            with systems.serving(system) as served:
                assert served.system is system
        taken = list(machine.happened)
    ours, stock = OURS.name, STOCK.name
    assert taken == [
        ("start", ours), ("suspend", ours), ("start", stock), ("suspend", stock), ("resume", ours), ("suspend", ours)
    ]  # fmt: skip
    # What is stopped would not end.
    assert machine.happened[len(taken) :] == [("resume", stock), ("end", stock), ("resume", ours), ("end", ours)]


def test_every_system_starts_on_all_cpus_and_is_measured_from_beside_its_scheduler() -> None:
    every = os.sched_getaffinity(0)
    machine = Machine()
    with SideBySide(machine.start) as systems:
        for system in (OURS, STOCK):
            with systems.serving(system) as served:
                assert served.cluster.cpus is not None
                assert os.sched_getaffinity(0) == set(served.cluster.cpus.others)
    assert machine.seen_cpus == {OURS.name: every, STOCK.name: every}
    assert os.sched_getaffinity(0) == every


def test_a_system_for_which_there_is_no_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    left_bytes = iter([9e9, 4e9, 4e9])  # before and after the first start, and before the second
    monkeypatch.setattr(serving, "available_memory_bytes", lambda: int(next(left_bytes)))
    machine = Machine()
    with SideBySide(machine.start) as systems:
        with systems.serving(OURS):
            pass
        with pytest.raises(ClusterError, match=r"stock-fcfs beside flowprefill: .* 5\.0 GB, 4\.0 GB are left"):
            systems.serving(STOCK).__enter__()
    assert ("start", STOCK.name) not in machine.happened
