"""Order of the tests, and what runs beside what. What a process has one of: an engine, a reference.

``make test`` runs two processes side by side (pytest-xdist): ``tests/servers`` in one, one kind of servers after the
other; file after file of the rest in the other, engines first, and in the first one from the last file on when it is
done with the servers: it would have to start another engine.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from sgl_flowprefill.model import embedded_model_path
from tests import served_models

if TYPE_CHECKING:  # they import torch, which most unit tests do without
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from tests.engine import PrefillEngine
    from tests.reference import Comparison, Reference

gc.disable()  # until all is imported: nothing of that is garbage

# What is compiled of this project is kept for the next process, also where the environment asks for no files of it:
# tests start some hundred, and each would compile it anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Generated examples say nothing about time: a busy machine is no failure.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

FOLDERS = ("servers", "integration", "unit", "stress")
CLUSTERS = (
    "stock_unified_server",
    "fresh_unified_server",
    "unified_server",
    "flowprefill_cluster",
    "ending_cluster",
    "stock_cluster",
    "no_cluster",
)
LONG_UNITS = (
    "test_agreement_model",
    "test_cuda_imports",
    "test_goodput",
    "test_gpu_report",
    "test_layout",
    "test_replay",
    "test_simulator_unified",
    "test_tiled_attention",
    "test_ttft_learning",
)
"""Unit tests that take longest come first: one process waits for the other at the last file of all."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> tuple[int, int, bool, bool]:
        """A test may also have the name of its cluster as a parameter. A module that starts processes warm comes
        next to the engines, in the process that has what these are forked from.
        """
        callspec = getattr(item, "callspec", None)
        parameters = [] if callspec is None else [value for value in callspec.params.values() if isinstance(value, str)]
        names = {*getattr(item, "fixturenames", ()), *parameters}
        cluster = next((i for i, name in enumerate(CLUSTERS, start=1) if name in names), 0)
        is_cold = not hasattr(getattr(item, "module", None), "warm")
        is_short = item.path.parent.name != "unit" or item.path.stem not in LONG_UNITS
        return FOLDERS.index(item.path.parent.name), cluster, is_cold, is_short

    items.sort(key=place)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Who has others run the tests imports nothing more."""
    if getattr(session.config.option, "numprocesses", None) and not hasattr(session.config, "workerinput"):
        gc.enable()


def pytest_collection_finish() -> None:
    """What all tests have imported is no garbage: whoever collects need not look at it each time."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish() -> None:
    """What is left goes with its process. Pytest and Python would look through all of it for garbage, which takes so
    long that pytest-xdist gives the process up.
    """
    gc.freeze()


SERVERS = "servers"
"""What is run by one process, one test after the other."""


class ServersTogether(LoadScopeScheduling):
    """Gives all tests with servers to one process, and every other file to one."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return SERVERS if file.startswith("tests/servers/") else file

    def _assign_work_unit(self, node: WorkerController) -> None:
        if SERVERS in self.assigned_work.get(node, ()):
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> ServersTogether:
    config.option.loadscopereorder = False
    return ServersTogether(config, log)


@pytest.fixture(scope="session")
def shared_engine() -> PrefillEngine:
    """One scheduler, which serves the embedded model. What is imported for it is no garbage, and no other model."""
    from tests.engine import PrefillEngine

    gc.disable()
    try:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv(served_models.VARIABLE, served_models.all_but("llama"))
            return PrefillEngine(str(embedded_model_path()))
    finally:
        gc.enable()


@pytest.fixture
def engine(shared_engine: PrefillEngine) -> Iterator[PrefillEngine]:
    """The shared engine, as it was when it was made."""
    from tests.chaos import calm

    hub = shared_engine.scheduler.hub
    limits, device = hub.work.policy.limits, hub.device
    shared_engine.answers.clear()
    shared_engine.batch_sizes.clear()
    yield shared_engine
    calm(shared_engine)
    hub.work.policy.limits = limits
    shared_engine.use(device)
    if not shared_engine.scheduler.is_fully_idle():
        shared_engine.abandon()


@pytest.fixture(scope="session")
def reference() -> Reference:
    """The embedded model in transformers; what it has computed for one test, the others have. It takes one core: the
    other process of the suite has the other one.
    """
    import torch

    from tests.reference import Reference

    torch.set_num_threads(1)
    return Reference(embedded_model_path())


@pytest.fixture
def comparison(reference: Reference) -> Iterator[Comparison]:
    """Compares with the embedded model, and prints at the end what was compared."""
    from tests.reference import Comparison

    comparison = Comparison(reference)
    yield comparison
    print(f"\n{comparison}")


@pytest.fixture(scope="module")
def quick_replays() -> Iterator[None]:
    """Replays begin soon, on asyncio's own loop, and look for garbage once: not among all that tests have imported.

    SGLang's tokenizer manager, where a test has imported it, makes uvloop the loop of the process, whose sleeps may end
    a millisecond early: before a request is due, or before a server that sleeps for its answer has slept so long.
    """
    policy = asyncio.get_event_loop_policy()
    asyncio.set_event_loop_policy(None)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        patch.setattr("sgl_flowprefill.bench.loadgen.replay.LEAD_S", 0.1)
        yield
    asyncio.set_event_loop_policy(policy)
