"""Prometheus metrics of the scheduler, on SGLang's ``/metrics`` with ``--enable-metrics``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

BLOCKING_BUCKETS_S: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


class Metrics:
    """What operators of a server watch. One per process."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        """``labels`` are the labels of SGLang's own metrics (``SchedulerMetricsCollector.labels``)."""
        from prometheus_client import Counter, Gauge, Histogram  # after SGLang has chosen where they are kept

        names = list(labels)
        self._labels = dict(labels)
        self._preemptions = Counter("flowprefill:preemptions", "Running prefills suspended for others.", names)
        self._blocking_s = Histogram(
            "flowprefill:blocking_seconds",
            "From when a request that wins could be read, to when it takes the place of the running prefill.",
            names,
            buckets=BLOCKING_BUCKETS_S,
        )
        self._live_tasks = Gauge(
            "flowprefill:live_tasks", "Prefills that run or are suspended.", names, multiprocess_mode="mostrecent"
        )
        self._ttft = Gauge(
            "flowprefill:ttft_model",
            "State of the TTFT model's online correction: factors by new tokens, margin, completed tasks.",
            [*names, "value"],
            multiprocess_mode="mostrecent",
        )
        self._step_s = Counter("flowprefill:decode_step_seconds", "Time in decode steps.", names)
        self._step_lateness_s = Histogram(
            "flowprefill:decode_step_lateness_seconds",
            "How much later decode steps began than they had to.",
            names,
            buckets=BLOCKING_BUCKETS_S,
        )
        self._given_back = Counter(
            "flowprefill:given_back", "Started prefills given up because streams needed their KV cache.", names
        )

    def stepped(self, step_s: float, lateness_s: float | None) -> None:
        """A decode step took ``step_s``; ``lateness_s`` is None where it began before it had to."""
        self._step_s.labels(**self._labels).inc(step_s)
        if lateness_s is not None:
            self._step_lateness_s.labels(**self._labels).observe(lateness_s)

    def given_back(self) -> None:
        """A task was given up for streams."""
        self._given_back.labels(**self._labels).inc()

    def preempted(self, blocking_s: float | None) -> None:
        """``blocking_s`` is None where nobody was blocked."""
        self._preemptions.labels(**self._labels).inc()
        if blocking_s is not None:
            self._blocking_s.labels(**self._labels).observe(blocking_s)

    def completed(self, ttft_state: Mapping[str, float], live_tasks: int) -> None:
        """``ttft_state`` as ``AdaptiveTTFT.state`` gives it."""
        self._live_tasks.labels(**self._labels).set(live_tasks)
        for name, value in ttft_state.items():
            self._ttft.labels(**self._labels, value=name).set(value)
