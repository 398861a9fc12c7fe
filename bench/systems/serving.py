"""A system's servers, up for measurements: what demo, goodput, validate, breakdown and uncontended have in common."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import aiohttp
import requests

from sgl_flowprefill.bench.loadgen.calibrate import measure_isolated_ttft
from sgl_flowprefill.bench.loadgen.client import Client, GenerateApi, get_json
from sgl_flowprefill.bench.loadgen.decode_rate import measure_decode, measure_steps
from sgl_flowprefill.bench.loadgen.replay import Enough, OnProgress, ReplayRun, replay
from sgl_flowprefill.bench.metrics.event_log import summarise_log
from sgl_flowprefill.bench.metrics.requests import blocking_times_s, events_within
from sgl_flowprefill.bench.simulator.measured import Engine, best_profile
from sgl_flowprefill.bench.systems.endpoint import Reached, Say, connect
from sgl_flowprefill.bench.systems.slowed import slowed
from sgl_flowprefill.bench.systems.system import EndpointSystem, System
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest
from sgl_flowprefill.cluster import Cluster, ClusterConfig, ClusterError
from sgl_flowprefill.cluster.machine import available_memory_bytes
from sgl_flowprefill.config import FlowPrefillConfig, command_line
from sgl_flowprefill.events import of_decode_server, read_events
from sgl_flowprefill.live import PAGE
from sgl_flowprefill.profiling.steps import Step

EMBEDDED_MODEL: Final = "embedded Llama"
SETTINGS: Final = (
    "chunked_prefill_size", "schedule_policy", "enable_priority_scheduling", "max_total_tokens", "attention_backend",
    "disable_radix_cache", "enable_mixed_chunk", "prefill_decode_interval",
)  # fmt: skip
"""Settings of a server that prefills which matter to a comparison."""
METRICS: Final = "--enable-metrics"
"""The option of SGLang with which servers have ``/metrics``."""
BURST_REQUESTS: Final = 16
BURST_TOKENS: Final = 1024
USUAL_LAYERS: Final = 32
"""Layers of a model whose configuration is not at hand."""
REST_TIMEOUT_S: Final = 300.0
REST_POLL_S: Final = 0.2
WAKE_S: Final = 0.5
"""What servers that were stopped have to catch up with before they are measured."""


@dataclass(frozen=True)
class Servers:
    """What the command line says of every system's servers."""

    model_path: str | None = None
    server_args: tuple[str, ...] = ()
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    options: FlowPrefillConfig = field(default_factory=FlowPrefillConfig)

    @property
    def model(self) -> str:
        """The model's name for reports."""
        return self.model_path or EMBEDDED_MODEL

    def with_metrics(self) -> Servers:
        """The same with metrics, on servers of all systems alike."""
        if METRICS in self.server_args:
            return self
        return dataclasses.replace(self, server_args=(*self.server_args, METRICS))

    def settings(self) -> dict[str, Any]:
        """Options of the servers, for reports."""
        return {
            "server options": shlex.join(self.server_args),
            "prefill options": shlex.join(self.prefill_args),
            "decode options": shlex.join(self.decode_args),
            "FlowPrefill options": command_line(self.options.model_dump(exclude_defaults=True)),
        }

    def cluster(self, system: System, log_dir: Path, event_log: Path | None) -> ClusterConfig:
        """The cluster of ``system``: of those with its layout, only the scheduler that prefills differs. Raises
        ValueError for options of servers that it does not have.
        """
        options = system.config(self.options)
        if options is not None and event_log is not None:
            options = options.model_copy(update={"event_log": str(event_log.resolve())})
        config = ClusterConfig(
            flowprefill=options is not None,
            model_path=self.model_path,
            server_args=self.server_args,
            log_dir=log_dir,
            options=options or self.options,
        )
        if not system.is_unified:
            prefill_args = (*self.prefill_args, *system.prefill_args)
            return dataclasses.replace(config, prefill_args=prefill_args, decode_args=self.decode_args)
        for name in ("prefill_args", "decode_args"):
            if getattr(self, name):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{system.name} is one server and takes no {flag}: give --server-args")
        server_args = (*self.server_args, *system.prefill_args)
        return dataclasses.replace(config, prefill=0, decode=0, unified=1, server_args=server_args)


@dataclass(frozen=True)
class Served:
    """A system whose servers are up."""

    system: System
    cluster: Cluster
    client: Client
    event_log: Path | None
    """FlowPrefill's event log; None for SGLang's own scheduler."""

    def solo_ttft_s(self, prompts: PromptBuilder, say: Say | None = None) -> dict[int, float]:
        """Median TTFT (s) of isolated requests by prompt tokens. Raises CalibrationError."""
        return measure_isolated_ttft(self.client, prompts, say)

    def decode_tokens_per_s(self, prompts: PromptBuilder) -> float:
        """What the decode server carries. Raises CalibrationError."""
        return measure_decode(self.client, prompts)

    def decode_steps(self, prompts: PromptBuilder) -> Sequence[Step]:
        """Times of decode steps beside which nothing else runs, as clients see them. Raises CalibrationError."""
        return measure_steps(self.client, prompts)

    def replay(
        self,
        trace: Trace,
        prompts: PromptBuilder,
        on_progress: OnProgress | None = None,
        enough: Enough | None = None,
        slower: float = 0.0,
    ) -> ReplayRun:
        """Replay ``trace``; a server that ends meanwhile is a ClusterError. In the middle of the arrivals, the machine
        becomes slower by the share ``slower`` for the servers.
        """

        def watch(done: int, failed: int, in_flight: int) -> None:
            self.cluster.check()
            if on_progress:
                on_progress(done, failed, in_flight)

        with ExitStack() as stack:

            def start(zero_s: float) -> None:
                if slower:
                    pids = self.cluster.processes.values()
                    stack.enter_context(slowed(pids, slower, zero_s + trace.middle_s))

            return replay(trace, self.client, prompts, watch, enough, start)

    def come_to_rest(self) -> None:
        """End what is still under way and forget cached prefixes, so that the next run starts as the first one did.

        Raises ClusterError when the servers do not come to rest.
        """
        urls = self.cluster.server_urls
        give_up_s = time.monotonic() + REST_TIMEOUT_S
        while not all(_flushed(url) for url in urls):
            for url in urls:
                requests.post(f"{url}/abort_request", json={"rid": "", "abort_all": True}, timeout=60)
            self.cluster.check()
            if time.monotonic() > give_up_s:
                raise ClusterError(f"{self.system.name} still has requests {REST_TIMEOUT_S:.0f} s after its run")
            time.sleep(REST_POLL_S)

    def blocking_s(self, run: ReplayRun) -> list[float] | None:
        """Blocking time of each preemption of ``run``, once its servers are at rest; None without preemption."""
        return None if self.event_log is None else blocking_times_s(events_within(self.event_log, [run.span_s]))

    def engine(self, prompts: PromptBuilder) -> Engine:
        """What the simulator needs to know; a burst of requests shows what passes between forwards.

        Raises ValueError without a TTFT profile of the model.
        """
        model = Path(self.cluster.model_path)
        config = model / "config.json"
        layers = json.loads(config.read_text()).get("num_hidden_layers") if config.is_file() else None
        return Engine(
            profile=self.cluster.config.options.profile or str(best_profile(model.name)),
            layers=layers or USUAL_LAYERS,
            kv_tokens=self._server_info().get("max_total_num_tokens"),
            between_forwards_s=self._between_forwards_s(prompts),
        )

    def _between_forwards_s(self, prompts: PromptBuilder) -> float:
        """Median of a burst; 0 for SGLang's own scheduler, which keeps no log of it."""
        if self.event_log is None:
            return 0.0
        burst = TraceRequest(0.0, BURST_TOKENS, 1, "burst", ttft_slo_s=60.0, tbt_slo_s=60.0)
        run = self.replay(Trace("burst", [burst] * BURST_REQUESTS), prompts)
        self.come_to_rest()
        events = (event for event in read_events(self.event_log) if event.t_s >= run.start_monotonic_s)
        return summarise_log(events).between_forwards_p50_s or 0.0

    def settings(self) -> dict[str, Any]:
        """What the server that prefills says of the settings that matter to a comparison; empty if it says nothing."""
        info = self._server_info()
        return {name: info[name] for name in SETTINGS if name in info}

    def suspend(self) -> None:
        """Stop the servers (SIGSTOP)."""
        self.cluster.suspend()

    def resume(self) -> None:
        """Let the servers go on."""
        self.cluster.resume()

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Keep this process off the CPUs that the prefill scheduler has for itself. No cluster is to be started
        meanwhile: it would share only the CPUs that are left."""
        before = os.sched_getaffinity(0)
        if self.cluster.cpus:
            os.sched_setaffinity(0, self.cluster.cpus.others)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def _server_info(self) -> dict[str, Any]:
        try:
            return asyncio.run(get_json(f"{self.cluster.prefill_url}/server_info"))
        except (aiohttp.ClientError, TimeoutError, ValueError):
            return {}


Serve = Callable[[System], AbstractContextManager[Reached]]
"""A system, up for as long as the context is open."""


@contextmanager
def start(system: System, servers: Servers, out: Path, say: Say) -> Iterator[Served]:
    """Start the servers of ``system``, logs under ``out``, and end them. Raises ClusterError or ConfigError."""
    event_log = None if system.is_stock else out / f"{system.name}-events.jsonl"
    if event_log:
        for log in (event_log, of_decode_server(event_log)):
            log.unlink(missing_ok=True)
    config = servers.cluster(system, out / "logs" / system.name, event_log)
    with Cluster(config, on_progress=say) as cluster:
        if places := where_to_watch(config, cluster.prefill_url):
            say(f"watch it at {' and '.join(places)}")
        client = Client(cluster.url, GenerateApi(with_priority=system.wants_priority))
        yield Served(system, cluster, client, event_log)
        say("stopping the servers")


def where_to_watch(config: ClusterConfig, url: str) -> list[str]:
    """Where to look while the server of ``config`` at ``url`` runs, which prefills: its live page, and its metrics."""
    if not config.flowprefill:
        return []
    page = [url + PAGE] if config.options.recent_events else []
    return page + ([f"{url}/metrics"] if METRICS in config.server_args else [])


@contextmanager
def serve(system: System, servers: Servers, out: Path, say: Say) -> Iterator[Served]:
    """``start``, and this process leaves the prefill's CPUs alone meanwhile."""
    with start(system, servers, out, say) as served, served.beside():
        yield served


@contextmanager
def reach(system: System, servers: Servers, out: Path, say: Say) -> Iterator[Reached]:
    """``start`` for systems whose servers are ours, ``connect`` for endpoints of others."""
    if isinstance(system, EndpointSystem):
        yield connect(system, say)
        return
    with start(system, servers, out, say) as served:
        yield served


class SideBySide:
    """Systems whose servers stay up and take turns on the same CPUs: all but one are stopped (SIGSTOP).

    What is compared is then seconds apart, where a start for each turn takes most of a minute. As a context manager,
    leaving it ends them all.
    """

    def __init__(self, start: Serve) -> None:
        self._start = start
        self._up: dict[str, Reached] = {}
        self._most_bytes = 0
        self._stack = ExitStack()

    def __enter__(self) -> SideBySide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def serving(self, system: System) -> Iterator[Reached]:
        """The servers of ``system``, started if they are not up, while those of all others are stopped; this process
        leaves the prefill's CPUs alone. Raises ClusterError, also when there is no memory for one more system.
        """
        if system.name in self._up:
            served = self._up[system.name]
            served.resume()
            time.sleep(WAKE_S)
        else:
            served = self._up[system.name] = self._started(system)
        try:
            with served.beside():
                yield served
        finally:
            served.suspend()

    def _started(self, system: System) -> Reached:
        free_bytes = available_memory_bytes()
        if free_bytes < self._most_bytes:
            raise ClusterError(
                f"there is no memory for {system.name} beside {', '.join(self._up)}: a system takes "
                f"{self._most_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB are left; compare fewer systems at a time"
            )
        served = self._stack.enter_context(self._start(system))
        self._stack.callback(served.resume)  # what is stopped does not end
        self._most_bytes = max(self._most_bytes, free_bytes - available_memory_bytes())
        return served


@contextmanager
def serving(servers: Servers, out: Path, say: Say, *, side_by_side: bool) -> Iterator[Serve]:
    """How each system comes up: its servers start each time anew, or once, to take turns ``side_by_side``."""
    start_one = partial(reach, servers=servers, out=out, say=say)
    if side_by_side:
        with SideBySide(start_one) as systems:
            yield systems.serving
        return

    @contextmanager
    def serve_one(system: System) -> Iterator[Reached]:
        with start_one(system) as served, served.beside():
            yield served

    yield serve_one


def _flushed(url: str) -> bool:
    """Whether a server was idle and its cache is empty now."""
    return requests.post(f"{url}/flush_cache", timeout=60).ok
