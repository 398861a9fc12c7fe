"""Open-loop replay of a trace over HTTP: every request is sent at its time, whatever became of those before.

Times count from the moment at which a request should have been sent, so that a client that falls behind cannot hide
the queue that it makes. How late the client was is measured; beyond a share of the tightest SLO the run is invalid.

SGLang's own benchmark (``sglang.benchmark.serving``, also known as ``bench_serving``; 0.5.23) is not used, for four
reasons:

* It counts TTFT from when it sends a request and does not say how late that was. In its Poisson mode it sleeps each
  interval after the request before, so that what it loses lowers the rate; a queue in the client shows nowhere.
* It has one SLO for all requests (``--goodput ttft:500``). Here each class has its own, the servers are told it, and a
  replay ends as soon as the verdict on its attainment cannot change.
* It replays timestamps of Mooncake's trace only, and not its prompts: each hash id becomes 128 words, whatever the
  length that the trace has, and the tokenizer runs in the event loop between two sends. Here bodies are token ids of
  exactly the trace's lengths and shared prefixes, serialised before the run.
* It opens a session for every request and parses every event in whole. Here the client shares a machine of two cores
  with the servers that it measures.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import aiohttp
import numpy as np
import orjson

from sgl_flowprefill.bench.loadgen.client import Client, Outcome
from sgl_flowprefill.bench.workloads.prompts import PromptBuilder
from sgl_flowprefill.bench.workloads.trace import Trace, TraceRequest

LEAD_S: Final = 0.5
"""From the start of a run to time zero of its trace."""
TICK_S: Final = 0.25
MAX_LATENESS_OF_SLO: Final = 0.1
"""A run is invalid if 1% of its requests were sent later than this share of the tightest TTFT SLO."""

STOPPED: Final = "late when the run was stopped"
"""Error of a request whose TTFT SLO had passed without a token when its run was stopped early."""

OnProgress = Callable[[int, int, int], None]
"""Called as (done, failed, in flight) while a replay runs."""
OnStart = Callable[[float], None]
"""Called with the ``time.monotonic()`` of the trace's time zero, shortly before."""


@dataclass(frozen=True)
class RequestResult:
    """One request of a replay. Times are seconds; ``scheduled_s`` counts from the run's time zero."""

    index: int
    request_class: str
    prompt_tokens: int
    output_tokens: int
    shared_tokens: int
    ttft_slo_s: float
    tbt_slo_s: float
    scheduled_s: float
    lateness_s: float
    """How much later than scheduled the client sent it."""
    ttft_s: float | None
    """From the scheduled time to the first token; None if no token came."""
    e2e_s: float
    tbt_s: tuple[float, ...]
    cached_tokens: int | None
    error: str | None
    retractions: int | None = None
    """How often its answer lost its KV cache to others, by the last event that came; None if no event says."""

    @property
    def completed(self) -> bool:
        """Whether the whole answer came."""
        return self.error is None

    def meets_ttft(self, slo_scale: float = 1.0) -> bool:
        """Whether it completed with its first token within ``slo_scale`` times its TTFT SLO."""
        return self.completed and self.ttft_s is not None and self.ttft_s <= self.ttft_slo_s * slo_scale

    def meets_tbt(self) -> bool:
        """Whether it completed with every later token within its TBT SLO."""
        return self.completed and all(gap_s <= self.tbt_slo_s for gap_s in self.tbt_s)


@dataclass(frozen=True)
class Enough:
    """When a replay may stop early."""

    known: Callable[[int, int], bool]
    """Asked as (requests that were served as wanted, requests that were not) whether that is all one needs to know."""
    meets: Callable[[RequestResult], bool] = RequestResult.meets_ttft
    """Whether a request was served as wanted."""


@dataclass(frozen=True)
class ClientReport:
    """What the client cost and how far it fell behind."""

    lateness_p50_s: float
    lateness_p99_s: float
    lateness_max_s: float
    cpu_share: float
    """CPU time of this process over the run's duration."""
    invalid_reason: str | None

    @property
    def valid(self) -> bool:
        """Whether the client kept up, so that the figures are the servers'."""
        return self.invalid_reason is None


@dataclass(frozen=True)
class ReplayRun:
    """A finished replay."""

    results: Sequence[RequestResult]
    start_monotonic_s: float
    """``time.monotonic()`` of the trace's time zero."""
    duration_s: float
    """From time zero to the end of the last request."""
    client: ClientReport
    stopped_early: bool = False
    """Whether it was known to be enough: ``results`` leaves out what was then neither done nor late."""

    @property
    def span_s(self) -> tuple[float, float]:
        """Its begin and its end by ``time.monotonic()``."""
        return self.start_monotonic_s, self.start_monotonic_s + self.duration_s

    def write_jsonl(self, path: Path) -> None:
        """Write one JSON line for each request, in order of arrival."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for result in self.results:
                file.write(orjson.dumps(dataclasses.asdict(result), default=float) + b"\n")

    @classmethod
    def read_results(cls, path: Path) -> list[RequestResult]:
        """The requests that ``write_jsonl`` wrote."""
        rows: list[dict[str, Any]] = [orjson.loads(line) for line in path.read_bytes().splitlines()]
        return [RequestResult(**(row | {"tbt_s": tuple(row["tbt_s"])})) for row in rows]


def joined(runs: Sequence[ReplayRun], offsets: Sequence[int], starts_s: Sequence[float]) -> ReplayRun:
    """Parts of one trace, replayed with pauses between them, as one run that lasts as if they had followed one another.

    Part ``k`` begins with request ``offsets[k]`` of the trace, at ``starts_s[k]`` of its time.
    """
    results = [
        dataclasses.replace(result, index=result.index + offset, scheduled_s=result.scheduled_s + start_s)
        for run, offset, start_s in zip(runs, offsets, starts_s, strict=True)
        for result in run.results
    ]
    duration_s = starts_s[-1] + runs[-1].duration_s
    cpu_share = sum(run.client.cpu_share * run.duration_s for run in runs) / sum(run.duration_s for run in runs)
    reports = [run.client for run in runs]
    reason = next((report.invalid_reason for report in reports if report.invalid_reason), None)
    client = dataclasses.replace(_client_report(results, cpu_share), invalid_reason=reason)
    return ReplayRun(results, runs[0].start_monotonic_s, duration_s, client, any(run.stopped_early for run in runs))


def replay(
    trace: Trace,
    client: Client,
    prompts: PromptBuilder,
    on_progress: OnProgress | None = None,
    enough: Enough | None = None,
    on_start: OnStart | None = None,
) -> ReplayRun:
    """Replay ``trace`` (already scaled) against ``client`` and wait for every answer, or until it is ``enough``.

    Bodies are built and serialised first; the run starts after that. KeyboardInterrupt, or an error that
    ``on_progress`` raises, cancels what is under way. Meanwhile this process may have as many files open as the system
    lets it.
    """
    bodies = [
        client.api.body(prompts.build(request, index), request.output_tokens, request.ttft_slo_s, request.tbt_slo_s)
        for index, request in enumerate(trace.requests)
    ]
    on_progress = on_progress or (lambda done, failed, in_flight: None)
    enough = enough or Enough(lambda met, missed: False)
    on_start = on_start or (lambda zero_s: None)
    with _most_files():
        return asyncio.run(_Replay(trace, client, bodies, on_progress, enough, on_start).run())


@contextmanager
def _most_files() -> Iterator[None]:
    """Each request under way is an open file, and the soft limit is often 1,024. Processes that are started later have
    it as it was.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class _Known(Exception):
    """Ends a run early."""


class _Replay:
    """The state of one run."""

    def __init__(
        self,
        trace: Trace,
        client: Client,
        bodies: Sequence[bytes],
        on_progress: OnProgress,
        enough: Enough,
        on_start: OnStart,
    ) -> None:
        self._requests = trace.requests
        self._client = client
        self._bodies = bodies
        self._on_progress = on_progress
        self._enough = enough
        self._on_start = on_start
        self._results: list[RequestResult | None] = [None] * len(trace.requests)
        self._outcomes: dict[int, Outcome] = {}
        self._done = self._failed = self._met = self._out_of_files = 0
        self._zero_s = 0.0

    async def run(self) -> ReplayRun:
        gc.collect()
        gc.freeze()
        cpu_s = time.process_time()
        stopped = False
        self._zero_s = time.monotonic() + LEAD_S
        self._on_start(self._zero_s)
        try:
            async with self._client.session() as session, asyncio.TaskGroup() as group:
                ticker = group.create_task(self._tick())
                sent = []
                for index, request in enumerate(self._requests):
                    await _sleep_until(self._zero_s + request.arrival_s)
                    sent.append(group.create_task(self._one(session, index, request)))
                await asyncio.wait(sent)
                ticker.cancel()
        except BaseExceptionGroup as errors:  # from the ticker: sending a request never raises
            stopped = isinstance(errors.exceptions[0], _Known)
            if not stopped:
                raise errors.exceptions[0] from None
        finally:
            gc.unfreeze()
        now_s = time.monotonic()
        duration_s = now_s - self._zero_s
        for index in self._late(now_s):
            outcome = dataclasses.replace(self._outcomes[index], error=STOPPED, end_s=now_s)
            self._results[index] = _result(index, self._requests[index], outcome, self._zero_s)
        cpu_s = time.process_time() - cpu_s
        self._report_progress()
        results = [result for result in self._results if result is not None]
        report = _client_report(results, cpu_s / duration_s, self._out_of_files)
        return ReplayRun(results, self._zero_s, duration_s, report, stopped)

    async def _one(self, session: aiohttp.ClientSession, index: int, request: TraceRequest) -> None:
        outcome = self._outcomes[index] = Outcome(sent_s=time.monotonic())
        await self._client.stream(session, self._bodies[index], outcome)
        del self._outcomes[index]
        result = self._results[index] = _result(index, request, outcome, self._zero_s)
        self._done += 1
        self._failed += not result.completed
        self._out_of_files += outcome.out_of_files
        self._met += self._enough.meets(result)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._report_progress()
            if self._enough.known(self._met, self._done - self._met + len(self._late(time.monotonic()))):
                raise _Known

    def _late(self, now_s: float) -> list[int]:
        """Requests under way whose TTFT SLO has passed without a token."""
        return [
            index
            for index, outcome in self._outcomes.items()
            if outcome.first_token_s is None
            and now_s - self._zero_s - self._requests[index].arrival_s > self._requests[index].ttft_slo_s
        ]

    def _report_progress(self) -> None:
        self._on_progress(self._done, self._failed, len(self._outcomes))


async def _sleep_until(when_s: float) -> None:
    delay_s = when_s - time.monotonic()
    if delay_s > 0:
        await asyncio.sleep(delay_s)


def _result(index: int, request: TraceRequest, outcome: Outcome, zero_s: float) -> RequestResult:
    due_s = zero_s + request.arrival_s
    return RequestResult(
        index=index,
        request_class=request.request_class,
        prompt_tokens=outcome.prompt_tokens or request.prompt_tokens,
        output_tokens=outcome.tokens,
        shared_tokens=request.shared_tokens,
        ttft_slo_s=request.ttft_slo_s,
        tbt_slo_s=request.tbt_slo_s,
        scheduled_s=request.arrival_s,
        lateness_s=outcome.sent_s - due_s,
        ttft_s=None if outcome.first_token_s is None else outcome.first_token_s - due_s,
        e2e_s=outcome.end_s - due_s,
        tbt_s=tuple(outcome.tbt_s),
        cached_tokens=outcome.cached_tokens,
        error=outcome.error,
        retractions=outcome.retractions,
    )


def _client_report(results: Sequence[RequestResult], cpu_share: float, out_of_files: int = 0) -> ClientReport:
    lateness_s = np.array([result.lateness_s for result in results] or [0.0])
    p50_s, p99_s = (float(value) for value in np.percentile(lateness_s, [50, 99]))
    limit_s = MAX_LATENESS_OF_SLO * min((result.ttft_slo_s for result in results), default=float("inf"))
    reason = None
    if out_of_files:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        reason = (
            f"the client could not send {out_of_files} requests: it may have {files:,} files open, and each request "
            "under way is one; let it have more (ulimit -Hn) or lower the rate"
        )
    elif p99_s > limit_s:
        reason = (
            f"the client fell behind: p99 of its lateness is {p99_s:.3f} s, and {limit_s:.3f} s "
            f"({MAX_LATENESS_OF_SLO:.0%} of the tightest SLO) is allowed; give it more CPU or lower the rate"
        )
    return ClientReport(p50_s, p99_s, float(lateness_s.max()), cpu_share, reason)
