"""What can only be known on the device itself: the checks of ``launch.py doctor``, run in a prefill server's process.

Started with the environment and options of a prefill server. Writes a ``Finding`` as one JSON object a line to its
standard output.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import torch

from sgl_flowprefill.config import FlowPrefillConfig
from sgl_flowprefill.hub.loop import Hub
from sgl_flowprefill.hub.task import NO_TASK, PrefillTask
from sgl_flowprefill.processes import own_stdout
from sgl_flowprefill.profiling.measure import SchedulerEngine
from sgl_flowprefill.profiling.process import make_scheduler, serving_stream
from sgl_flowprefill.runtime.cuda_device import CudaDevice
from sgl_flowprefill.runtime.executor import Executor
from sgl_flowprefill.runtime.memory import MIB
from sgl_flowprefill.runtime.prefill_role import PrefillRole
from sgl_flowprefill.runtime.tiled_attention import TiledAttention, prefill_backend

TASKS: Final = 8
SUSPEND_PROBABILITY: Final = 0.5
COST_TOKENS: Final = 2048
COST_PAIRS: Final = 25
CHECKPOINT_CALLS: Final = 2000
MAX_COST: Final = 0.03
"""Share of a forward pass for its preemption checkpoints when nobody waits; above the goal, so that noise does not fail
it.
"""
BLOCKING_TOKENS: Final = {"cuda": 65_536, "cpu": 16_384}
"""On a GPU so many that attention would block for tens of milliseconds if it ran whole."""
TILED_TOKENS: Final = 8192
TILES: Final = 16
"""Tiles of an attention operator over TILED_TOKENS, about."""
BLOCKING_SAMPLES: Final = 60
ARRIVALS: Final = 16
"""While a prompt runs once, about."""
HOST_S: Final = 1e-3
"""What the host may take on top of operators before a preemptor's first kernel could run."""
SPIN_S: Final = 0.05


@dataclass(frozen=True)
class Finding:
    """Outcome of one check."""

    check: str
    passed: bool
    figures: str


class Blocking(NamedTuple):
    """Times from arrivals at random moments of a prefill."""

    noticed_s: list[float]
    """Until the hub knew of it."""
    blocked_s: list[float]
    """Until all that was queued before it had run."""
    forward_s: float
    """Time of the whole prefill, when nobody arrives."""


class Tasks(SchedulerEngine):
    """Starts and suspends prefills on an idle scheduler, below the hub."""

    def __init__(self, hub: Hub[Any]) -> None:
        super().__init__(hub.role)
        self.hub = hub
        assert isinstance(hub.executor, Executor)
        self.executor = hub.executor
        self._started = 0

    @property
    def blocking_limit_s(self) -> float:
        """For how long what has been queued may keep an arrival, or a decode step, waiting."""
        config = FlowPrefillConfig.from_env()
        ahead = config.lookahead if self.scheduler.device == "cuda" else 0
        return (ahead + 1) * config.max_blocking_ms * 1e-3 + HOST_S

    def start(self, prompt: list[int], answer_tokens: int = 1, tbt_slo_s: float | None = None) -> PrefillTask:
        self._started += 1
        batch = self._role.make_batch([self._req(self._started, prompt, answer_tokens, tbt_slo_s)])
        return PrefillTask(
            id=self._started,
            batch=batch,
            members=(),
            shapes=self._role.shapes(batch),
            arrival_s=0.0,
            deadline_s=0.0,
            predicted_s=0.0,
            attn_backend=self.hub.slots.take(),
        )

    @torch.no_grad()
    def resume(self, task: PrefillTask) -> None:
        """Run ``task`` until it is done or interrupted."""
        self.hub.executor.run(task, self.hub.forward)

    def run_nested(
        self, prompts: Sequence[list[int]], rng: random.Random, probability: float
    ) -> tuple[list[PrefillTask], int, int]:
        """The tasks of prompts that are suspended inside one another, at any interruption point with ``probability``,
        when all are done; how often, and how many were live at a time at most.
        """
        suspensions = depth = 0
        with self.interrupted_by(lambda: rng.random() < probability):
            started = [self.start(prompt) for prompt in prompts]
            live = list(started)
            while live:
                task = rng.choice(live)
                self.resume(task)
                depth = max(depth, sum(one.has_run and not one.done for one in started))
                if task.done:
                    live.remove(task)
                else:
                    suspensions += 1
        return started, suspensions, depth

    def finish(self, task: PrefillTask) -> int:
        """First token of a task that is done."""
        if task.result.copy_done is not None:
            task.result.copy_done.synchronize()
        [token] = task.result.next_token_ids.tolist()
        self.hub.slots.give_back(task.attn_backend)
        self.free(task.batch)
        return int(token)

    def forward_s(self, prompt: list[int], *, checkpoints: bool = True) -> float:
        """Time from the start of a prompt's forward pass until its token is on the host; without ``checkpoints``, as a
        scheduler without FlowPrefill runs it.
        """
        task = self.start(prompt)
        self.synchronize()
        begin_s = time.perf_counter()
        if checkpoints:
            with self.interrupted_by(lambda: False):
                self.resume(task)
        else:
            with torch.no_grad():
                task.result = self.hub.forward(task.batch)
        self.finish(task)
        return time.perf_counter() - begin_s

    def blocking(self, prompt: list[int], enough: Callable[[int], bool]) -> Blocking:
        """Let requests arrive while ``prompt`` runs, again and again, until so many samples are ``enough``."""
        arrived = threading.Event()
        arrival_s = 0.0

        def arrive() -> None:
            nonlocal arrival_s
            arrival_s = time.monotonic()
            arrived.set()

        rng = random.Random(2)
        found = Blocking([], [], min(self.forward_s(prompt) for _ in range(2)))
        with self.interrupted_by(arrived.is_set):
            while not enough(len(found.blocked_s)):
                arrived.clear()
                task = self.start(prompt)
                while not task.done:
                    timer = threading.Timer(rng.uniform(0.0, 2 * found.forward_s / ARRIVALS), arrive)
                    timer.start()
                    self.resume(task)
                    timer.cancel()
                    timer.join()
                    if arrived.is_set() and not task.done:
                        found.noticed_s.append(time.monotonic() - arrival_s)
                        self.synchronize()
                        found.blocked_s.append(time.monotonic() - arrival_s)
                    arrived.clear()
                self.finish(task)
        return found

    def checkpoint_s(self) -> float:
        """Host time of a preemption checkpoint with nothing pending and nothing to wait for."""
        executor = self.executor
        executor.running = SimpleNamespace(id=NO_TASK, operators_passed=0, points_passed=0)  # type: ignore[assignment]
        begin_s = time.perf_counter()
        for _ in range(CHECKPOINT_CALLS):
            executor.checkpoint()
        each_s = (time.perf_counter() - begin_s) / CHECKPOINT_CALLS
        executor.running = None
        return each_s

    @contextmanager
    def interrupted_by(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        """Ask ``interrupted``, at interruption points and while the CPU waits there for the device."""
        executor = self.executor
        usual = executor.interrupted, executor.ends_waiting
        executor.interrupted = executor.ends_waiting = interrupted
        try:
            yield
        finally:
            executor.interrupted, executor.ends_waiting = usual

    def prompt(self, tokens: int) -> list[int]:
        return self._random_ids(min(tokens, self.limit_tokens))


def check_events(tasks: Tasks) -> Finding:
    """An event is passed when the kernels before it have run, and waiting for it ends early on an interruption."""
    device = CudaDevice(lookahead=0)
    cycles_per_s = _spin_cycles_per_s()
    interrupted = threading.Event()
    begin = device.stamp()
    torch.cuda._sleep(int(SPIN_S * cycles_per_s))
    device.record()
    end = device.stamp()
    threading.Timer(SPIN_S / 5, interrupted.set).start()
    begin_s = time.monotonic()
    early = not device.catch_up(interrupted.is_set)
    early_s = time.monotonic() - begin_s
    whole = device.catch_up(lambda: False)
    whole_s = time.monotonic() - begin_s
    spun_s = begin.seconds_until(end)
    passed = early and whole and early_s < SPIN_S / 2 < whole_s and 0.5 * SPIN_S < spun_s < 2 * SPIN_S
    figures = f"{spun_s * 1e3:.1f} ms on the device, interrupted after {early_s * 1e3:.1f}, over at {whole_s * 1e3:.1f}"
    return Finding("CUDA events", passed, figures)


def check_slots(tasks: Tasks) -> Finding:
    """Attention state of more tasks takes little memory, and none of them shares its plans."""
    slots = tasks.hub.slots
    before_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    taken = [slots.take() for _ in range(TASKS)]
    after_bytes = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    for backend in taken:
        slots.give_back(backend)
    each_mib = (after_bytes - before_bytes) / TASKS / MIB
    distinct = len({id(backend) for backend in taken}) == TASKS
    name = type(taken[0]).__name__
    return Finding("attention slots", distinct and each_mib < 128, f"{name}: {each_mib:.1f} MiB of device memory each")


def check_tokens(tasks: Tasks) -> Finding:
    """Prefills suspended at random inside one another give the tokens that each gives alone."""
    rng = random.Random(1)
    prompts = [tasks.prompt(rng.randrange(100, 3000)) for _ in range(TASKS)]
    with tasks.interrupted_by(lambda: False):
        alone = []
        for prompt in prompts:
            task = tasks.start(prompt)
            tasks.resume(task)
            alone.append(tasks.finish(task))
    started, suspensions, _ = tasks.run_nested(prompts, rng, SUSPEND_PROBABILITY)
    together = [tasks.finish(task) for task in started]
    same = sum(a == b for a, b in zip(alone, together, strict=True))
    return Finding(
        "tokens under preemption",
        same == len(prompts) and suspensions >= 3 * TASKS and len(set(alone)) > 1,
        f"{same} of {len(prompts)} the same, {suspensions} suspensions, {len(set(alone))} different tokens",
    )


def check_tiled_attention(tasks: Tasks) -> Finding:
    """Attention in query tiles gives the tokens that it gives whole, with and without a cached prefix."""
    backend = prefill_backend(tasks.scheduler.tp_worker.model_runner.attn_backend)
    if not isinstance(backend, TiledAttention):
        return Finding("tiled attention", True, f"{type(backend).__name__} runs whole, however long it takes")
    gaps = 0

    def count() -> None:
        nonlocal gaps
        gaps += 1

    tasks.cache_prefix(len(tasks.prompt(TILED_TOKENS)) // 2)
    prompts = [tasks.prompt(TILED_TOKENS), tasks.prompt(TILED_TOKENS - 1001)]
    prompts.append(tasks.cached_prompt + tasks.prompt(TILED_TOKENS // 2))
    tokens: dict[bool, list[int]] = {False: [], True: []}
    for tiled in tokens:
        for prompt in prompts:
            task = tasks.start(prompt)
            backend = prefill_backend(task.attn_backend)
            usual = backend.between_tiles, backend.tile_pairs
            backend.between_tiles = count if tiled else _nothing
            backend.tile_pairs = len(prompt) ** 2 / 2 / TILES if tiled else math.inf
            tasks.resume(task)
            tokens[tiled].append(tasks.finish(task))
            backend.between_tiles, backend.tile_pairs = usual
    same = sum(a == b for a, b in zip(tokens[False], tokens[True], strict=True))
    return Finding(
        "tiled attention",
        same == len(prompts) and gaps > TILES,
        f"{type(backend).__name__}: {same} of {len(prompts)} tokens the same, {gaps} gaps between tiles",
    )


def _nothing() -> None:
    pass


def check_cost(tasks: Tasks) -> Finding:
    """What preemption checkpoints cost a forward pass when nobody waits, as the median of pairs in turn."""
    prompt = tasks.prompt(COST_TOKENS)
    ratios = []
    for pair in range(COST_PAIRS + 1):
        order = (True, False) if pair % 2 else (False, True)
        times_s = {checkpoints: tasks.forward_s(prompt, checkpoints=checkpoints) for checkpoints in order}
        if pair:  # the first warms up
            ratios.append(times_s[True] / times_s[False])
    cost = statistics.median(ratios) - 1
    figures = f"{cost:+.2%} of a prefill of {len(prompt)} tokens, {tasks.checkpoint_s() * 1e6:.1f} us each on the host"
    return Finding("cost of preemption checkpoints", cost < MAX_COST, figures)


def check_blocking(tasks: Tasks) -> Finding:
    """How long after an arrival a preemptor's first kernel could run: what was queued before it is over by then."""
    prompt = tasks.prompt(BLOCKING_TOKENS[tasks.scheduler.device])
    found = tasks.blocking(prompt, lambda samples: samples >= BLOCKING_SAMPLES)
    p50 = statistics.median(found.blocked_s)
    p99 = statistics.quantiles(found.blocked_s, n=100, method="inclusive")[98]
    limit_s = tasks.blocking_limit_s
    figures = (
        f"{len(prompt)} tokens, {found.forward_s:.3f} s: p50 {p50 * 1e3:.1f}, p99 {p99 * 1e3:.1f}, "
        f"max {max(found.blocked_s) * 1e3:.1f} ms (bound {limit_s * 1e3:.0f}); "
        f"the hub knew after {statistics.median(found.noticed_s) * 1e3:.1f} ms"
    )
    return Finding("blocking", p99 <= limit_s, figures)


def checks(hub: Hub[PrefillRole]) -> Iterator[Finding]:
    """All findings about the engine that ``hub`` drives."""
    tasks = Tasks(hub)
    all_checks: Sequence[Callable[[Tasks], Finding]] = (
        *((check_events,) if tasks.scheduler.device == "cuda" else ()),
        *(check_slots, check_tokens, check_tiled_attention, check_cost, check_blocking),
    )
    for check in all_checks:
        try:
            yield check(tasks)
        except Exception as error:
            yield Finding(check.__name__.removeprefix("check_"), False, f"{type(error).__name__}: {error}")
            return  # what it left behind would fail the others


def _spin_cycles_per_s() -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = 20_000_000
    torch.cuda._sleep(cycles)
    begin.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (float(begin.elapsed_time(end)) * 1e-3)


def main(server_options: Sequence[str]) -> None:
    findings = os.fdopen(own_stdout(), "w", buffering=1)
    scheduler = make_scheduler(server_options)
    with serving_stream(scheduler):
        for finding in checks(scheduler.hub):
            findings.write(json.dumps(asdict(finding)) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Exception, SystemExit) as error:
        print(error, file=sys.stderr)
        os._exit(1)
    # SGLang's scheduler leaves threads behind that would keep the process.
    sys.stderr.flush()
    os._exit(0)
