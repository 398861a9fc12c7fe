"""Real clusters for the tests: one at a time, started when a test first asks for it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.model import EmbeddedModel, embedded_model_path
from tests import faults
from tests.reference import Reference
from tests.wall_clock import WallClock

TWO_HEADS = EmbeddedModel(heads=2, layers=4, context_tokens=4608)
"""Two query heads, one a rank, which share the one KV head: each rank keeps a copy of it."""


class OneCluster:
    """Holds the cluster that runs; asking for another kind ends it first, since both want the same cores."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._kind: str | None = None

    def get(self, *, flowprefill: bool, unified: bool = False) -> Cluster:
        kind = ("flowprefill" if flowprefill else "stock") + ("-unified" if unified else "")
        if self._kind != kind:
            self.close()
            args = ("--chunked-prefill-size", "-1", "--enable-metrics")
            event_log = self._directory / ("events-unified.jsonl" if unified else "events.jsonl")
            config = ClusterConfig(
                flowprefill=flowprefill,
                prefill_args=args,
                log_dir=self._directory / kind,
                options=FlowPrefillConfig(event_log=str(event_log)),
            )
            if unified:
                config = dataclasses.replace(config, prefill=0, decode=0, unified=1, prefill_args=(), server_args=args)
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("PYTHONPATH", str(faults.PLUGIN), prepend=os.pathsep)
                self._cluster = self._stack.enter_context(Cluster(config, on_progress=print))
            self._kind = kind
        self._cluster.check()
        return self._cluster

    def close(self) -> None:
        self._stack.close()
        self._kind = None


@pytest.fixture(scope="session")
def wall_clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WallClock]:
    """Set back to the machine's by each test that sets it."""
    clock = WallClock(tmp_path_factory.mktemp("clock") / "offset")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WALL_CLOCK_FILE", str(clock.path))
        environment.setenv("PYTHONPATH", str(clock.folder), prepend=os.pathsep)
        yield clock


@pytest.fixture(scope="session")
def one_cluster(tmp_path_factory: pytest.TempPathFactory, wall_clock: WallClock) -> Iterator[OneCluster]:
    cluster = OneCluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture
def flowprefill_cluster(one_cluster: OneCluster) -> Cluster:
    """A cluster with FlowPrefill; its event log is ``cluster.config.options.event_log``."""
    return one_cluster.get(flowprefill=True)


@pytest.fixture
def stock_cluster(one_cluster: OneCluster) -> Cluster:
    """A cluster with SGLang's own scheduler, unchunked."""
    return one_cluster.get(flowprefill=False)


@pytest.fixture
def unified_server(one_cluster: OneCluster) -> Cluster:
    """One server that prefills and decodes, with FlowPrefill; its event log is as above."""
    return one_cluster.get(flowprefill=True, unified=True)


@pytest.fixture
def stock_unified_server(one_cluster: OneCluster) -> Cluster:
    """One server that prefills and decodes, with SGLang's own scheduler, unchunked."""
    return one_cluster.get(flowprefill=False, unified=True)


@pytest.fixture
def no_cluster(one_cluster: OneCluster) -> None:
    """For tests that start servers of their own."""
    one_cluster.close()


@pytest.fixture(scope="session")
def two_heads() -> Reference:
    """TWO_HEADS in transformers; what it has computed for one test, the others have."""
    return Reference(embedded_model_path(TWO_HEADS))
