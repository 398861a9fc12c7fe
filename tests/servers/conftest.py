"""Real clusters for the tests: one at a time, started when a test first asks for it."""

from __future__ import annotations

import dataclasses
import gc
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest
from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX

from sgl_flowprefill.cluster import Cluster, ClusterConfig
from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.events import read_events
from tests import faults, served_models
from tests.otlp import Collector, collecting
from tests.wall_clock import WallClock


def objectives_since(cluster: Cluster, start_s: float) -> list[float]:
    """The objectives of the requests that the scheduler was given since then, in the order in which they came."""
    time.sleep(0.5)  # the log reaches the file when the scheduler turns idle
    log = cluster.config.options.event_log
    assert log is not None
    return [
        event.ttft_slo_s
        for event in read_events(log)
        if event.kind == "arrival" and event.t_s > start_s and not event.rid.startswith(HEALTH_CHECK_RID_PREFIX)
    ]


@pytest.fixture
def programs() -> Iterator[None]:
    """For a test that runs programs of SGLang's in this process: nothing is collected meanwhile.

    A program ends its thread as it is collected (``StreamExecutor.__del__``), for which it asks whether that is alive.
    If the collection comes while another thread begins or ends, in CPython's own bookkeeping, that waits for itself.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


SLO_POLICY = """
classes:
  interactive: {ttft_s: 0.75, tbt_s: 0.3, weight: 4, min_ttft_s: 0.2}
  batch: {base_s: 20, per_1k_tokens_s: 1000, sheddable: true}
priorities: {10: interactive, 0: batch}
service_tiers: {priority: interactive, flex: batch}
smg_priorities: {bulk: batch}
"""
"""Of all servers with FlowPrefill: it has nothing to say of requests that name no class, priority or service tier."""


QUICK_START: Final = {served_models.VARIABLE: served_models.all_but("llama"), "GARBAGE_THRESHOLD": "100000"}
"""Environment of servers of the embedded model, a Llama: they import no other models, and seldom look for garbage in
what they import.
"""


class OneCluster:
    """Holds the cluster that runs; asking for another kind ends it first, since both want the same cores."""

    def __init__(self, directory: Path, collector: Collector) -> None:
        self._directory = directory
        self._collector = collector
        self._stack = ExitStack()
        self._kind: str | None = None
        self.since_s = 0.0
        """When the one that runs began to be started."""
        self.said: list[str] = []
        """What was said while it was started."""

    def get(self, *, flowprefill: bool, unified: bool = False, fresh: bool = False) -> Cluster:
        """A cluster of that kind; if it shall be ``fresh``, no test has had it before."""
        kind = ("flowprefill" if flowprefill else "stock") + ("-unified" if unified else "")
        if self._kind != kind or fresh:
            self.close()
            self.since_s, self.said = time.monotonic(), []
            unchunked = () if flowprefill else ("--chunked-prefill-size", "-1")  # as stock comes, FlowPrefill sets it
            args = (*unchunked, "--enable-metrics")
            traced = ("--enable-trace", "--otlp-traces-endpoint", self._collector.endpoint) if flowprefill else ()
            event_log = self._directory / ("events-unified.jsonl" if unified else "events.jsonl")
            policy = self._directory / "slo-policy.yaml"
            policy.write_text(SLO_POLICY)
            config = ClusterConfig(
                flowprefill=flowprefill,
                server_args=traced,
                prefill_args=args,
                log_dir=self._directory / kind,
                # The CPU time of idle servers is measured, for seconds only.
                options=FlowPrefillConfig(event_log=str(event_log), exploration_share=0, slo_policy=str(policy)),
            )
            if unified:
                config = dataclasses.replace(
                    config, prefill=0, decode=0, unified=1, prefill_args=(), server_args=args + traced
                )
            with pytest.MonkeyPatch.context() as environment:
                environment.setenv("PYTHONPATH", str(faults.PLUGIN), prepend=os.pathsep)
                for name, value in QUICK_START.items():
                    environment.setenv(name, value)
                self._cluster = self._stack.enter_context(Cluster(config, on_progress=self._say))
            self._kind = kind
        self._cluster.check()
        return self._cluster

    def close(self) -> None:
        self._stack.close()
        self._kind = None

    def _say(self, line: str) -> None:
        print(line)
        self.said.append(line)


@pytest.fixture(scope="session")
def wall_clock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WallClock]:
    """Set back to the machine's by each test that sets it."""
    clock = WallClock(tmp_path_factory.mktemp("clock") / "offset")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WALL_CLOCK_FILE", str(clock.path))
        environment.setenv("PYTHONPATH", str(clock.folder), prepend=os.pathsep)
        yield clock


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Has the request traces of servers with FlowPrefill."""
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="session")
def one_cluster(
    tmp_path_factory: pytest.TempPathFactory, wall_clock: WallClock, collector: Collector
) -> Iterator[OneCluster]:
    cluster = OneCluster(tmp_path_factory.mktemp("cluster"), collector)
    yield cluster
    cluster.close()


@pytest.fixture
def flowprefill_cluster(one_cluster: OneCluster) -> Cluster:
    """A cluster with FlowPrefill; its event log is ``cluster.config.options.event_log``."""
    return one_cluster.get(flowprefill=True)


@pytest.fixture
def ending_cluster(one_cluster: OneCluster) -> Iterator[Cluster]:
    """As ``flowprefill_cluster``, for tests that end it: no other has it afterwards."""
    yield one_cluster.get(flowprefill=True)
    one_cluster.close()


@pytest.fixture
def stock_cluster(one_cluster: OneCluster) -> Cluster:
    """A cluster with SGLang's own scheduler, unchunked."""
    return one_cluster.get(flowprefill=False)


@pytest.fixture
def unified_server(one_cluster: OneCluster) -> Cluster:
    """One server that prefills and decodes, with FlowPrefill; its event log is as above."""
    return one_cluster.get(flowprefill=True, unified=True)


@pytest.fixture
def fresh_unified_server(one_cluster: OneCluster) -> Cluster:
    """As ``unified_server``, which nobody has asked for anything yet but SGLang itself, when it starts."""
    return one_cluster.get(flowprefill=True, unified=True, fresh=True)


@pytest.fixture
def stock_unified_server(one_cluster: OneCluster) -> Cluster:
    """One server that prefills and decodes, with SGLang's own scheduler, unchunked."""
    return one_cluster.get(flowprefill=False, unified=True)


@pytest.fixture(params=["flowprefill_cluster", "unified_server"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    """The gateway of a cluster, or one server without a gateway."""
    cluster: Cluster = request.getfixturevalue(request.param)
    return cluster


@pytest.fixture
def no_cluster(one_cluster: OneCluster) -> None:
    """For tests that start servers of their own."""
    one_cluster.close()
