"""Prometheus metrics of the scheduler, on SGLang's ``/metrics`` with ``--enable-metrics``.

``metrics/table.py`` says what there is. Writing a value takes more than a microsecond of CPU time, and only the next
scrape reads it: what is counted is gathered, and written from time to time with the gauges, a few series at an event.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter as Counts
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from itertools import chain, islice, product
from typing import Any, Final, NamedTuple

from sgl_flowprefill.events import AnyEvent, Arrival, Fail
from sgl_flowprefill.metrics import table
from sgl_flowprefill.metrics.table import CAUSES, CLASS, MOST_CLASSES, OTHER, TABLE, Kind, Metric
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.outcomes import Outcome
from sgl_flowprefill.slo import DEFAULT

WRITTEN_EVERY_S: Final = 0.5
"""How often gauges and what is gathered are written, at most."""
OVERLOADED: Final = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
"""What a request is refused with because there is too much to do."""
VALUES_AT_ONCE: Final = 4
"""Series that an event writes of those that are gathered, or of the TTFT model's state."""


class Situation(NamedTuple):
    """What waits and what has started, for the gauges."""

    queue: Mapping[str, int]
    """Requests by ``state``."""
    live_tasks: int
    suspended_tasks: int
    suspended_bytes: int
    oldest_suspended_s: float


NOTHING: Final = Situation({}, 0, 0, 0, 0.0)


class Gathered:
    """What a series of a counter or a histogram is told between two times at which it is written."""

    def __init__(self, series: Any, bounds: tuple[float, ...], told: Callable[[Gathered], object]) -> None:
        """``series``: the client library's. ``bounds``: of a histogram's buckets; none for a counter. ``told`` is
        called when there is something to write.
        """
        self._series, self._bounds, self._told = series, bounds, told
        self._is_told = False
        self._sum = 0.0
        self._counts: Counts[int] = Counts()
        """Values by the bucket."""

    def inc(self, amount: float = 1.0) -> None:
        if not self._is_told:
            self._is_told = True
            self._told(self)
        self._sum += amount

    def observe(self, value: float) -> None:
        self.inc(value)
        self._counts[bisect_left(self._bounds, value)] += 1

    def write(self) -> None:
        if self._counts:  # the library's own method takes one value at a time
            for bucket, count in self._counts.items():
                self._series._buckets[bucket].inc(count)
            self._series._sum.inc(self._sum)
            self._counts.clear()
        else:
            self._series.inc(self._sum)
        self._sum, self._is_told = 0.0, False


class Metrics:
    """What operators of a server watch. One per process."""

    def __init__(
        self,
        labels: Mapping[str, str],
        decodes: bool = False,
        registry: Any = None,
    ) -> None:
        """``labels`` are the labels of SGLang's own metrics (``SchedulerMetricsCollector.labels``). ``decodes``:
        whether the server prefills and decodes. ``registry``: Prometheus' own if None.
        """
        from prometheus_client import REGISTRY, Counter, Gauge, Histogram  # after SGLang has chosen where they are kept

        registry = REGISTRY if registry is None else registry
        self._labels = tuple(labels.values())
        self._classes: set[str] = set()
        self._shed: set[str] = set()
        """Requests that were refused and whose outcome is about to be told."""
        self._families: dict[Metric, Any] = {}
        self._of: dict[Metric, dict[tuple[str, ...], Any]] = {}
        self._told: list[Gathered] = []
        """Series that have something to write."""
        self._situation: Callable[[float], Situation] = lambda now_s: NOTHING
        self._ttft_state: Callable[[], Mapping[str, float]] = dict
        self._writing: Iterator[None] = iter(())
        """What is still to be written of what was to be at ``_written_s``."""
        self._written_s = -math.inf
        for metric in TABLE:
            if metric.unified and not decodes:
                continue
            names = [*labels, *(label.name for label in metric.labels)]
            family: Any
            if metric.kind is Kind.COUNTER:
                family = Counter(metric.full_name, metric.help, names, registry=registry)
            elif metric.kind is Kind.GAUGE:
                family = Gauge(metric.full_name, metric.help, names, registry=registry, multiprocess_mode="mostrecent")
            else:
                family = Histogram(metric.full_name, metric.help, names, registry=registry, buckets=metric.buckets)
            self._families[metric], self._of[metric] = family, {}
            if CLASS not in metric.labels:
                self._begin(metric)
        for slo_class in (DEFAULT, OTHER):
            self._meet(slo_class)

    def _meet(self, slo_class: str) -> None:
        """Tell the requests of this class from those of others from now on."""
        self._classes.add(slo_class)
        for metric in self._of:
            if CLASS in metric.labels:
                self._begin(metric, slo_class)

    def _begin(self, metric: Metric, slo_class: str = DEFAULT) -> None:
        """Series of ``metric`` that are there before something happens: one that appears with its first event has no
        rate of it.
        """
        for own in product(*((slo_class,) if label is CLASS else label.values or () for label in metric.labels)):
            series = self._families[metric].labels(*self._labels, *own)
            is_gauge = metric.kind is Kind.GAUGE
            self._of[metric][own] = series if is_gauge else Gathered(series, metric.buckets, self._told.append)

    def watch(self, situation: Callable[[float], Situation], ttft_state: Callable[[], Mapping[str, float]]) -> None:
        """Where gauges come from: ``situation(now_s)``, and ``ttft_state`` as ``AdaptiveTTFT.state`` gives it."""
        self._situation, self._ttft_state = situation, ttft_state

    # ---- requests ---------------------------------------------------------------------------------------------------

    def read(self, event: AnyEvent) -> None:
        """An event has been recorded; the outcome of the requests that it ends is told after it."""
        if isinstance(event, Arrival):
            if event.slo_class not in self._classes and len(self._classes - {OTHER}) < MOST_CLASSES:
                self._meet(event.slo_class)
        elif isinstance(event, Fail) and event.http_status in OVERLOADED:
            self._shed.update(event.rids)

    def ended(self, outcome: Outcome) -> None:
        """It is known what became of a request."""
        of_class = outcome.arrival.slo_class if outcome.arrival.slo_class in self._classes else OTHER
        if self._shed and outcome.rid in self._shed:
            self._shed.remove(outcome.rid)
            self._of[table.SHED][of_class,].inc()
        if outcome.cause is Cause.INVALID:
            self._of[table.INVALID][of_class,].inc()
        elif outcome.met is None:
            self._of[table.ABORTED][of_class,].inc()
        elif outcome.met:
            self._of[table.TTFT_MET][of_class,].inc()
        else:
            assert outcome.cause is not None, "a miss has a cause"
            self._of[table.TTFT_MISSED][of_class, CAUSES[outcome.cause]].inc()
        if outcome.ttft_s is not None:
            self._of[table.TTFT][of_class,].observe(outcome.ttft_s)
        if outcome.slack_at_admission_s is not None:
            self._of[table.SLACK][of_class,].observe(outcome.slack_at_admission_s)

    # ---- tasks ------------------------------------------------------------------------------------------------------

    def preempted(self, blocking_s: float, stop_wait_s: float) -> None:
        """A running prefill is suspended for a request, which was blocked for ``blocking_s``; for ``stop_wait_s`` of
        that, the prefill ran on.
        """
        self._one(table.PREEMPTIONS).inc()
        self._one(table.BLOCKING).observe(blocking_s)
        self._one(table.STOP_WAIT).observe(stop_wait_s)

    def resumed(self, suspended_s: float) -> None:
        """A prefill goes on that was suspended for ``suspended_s``."""
        self._one(table.SUSPENSION).observe(suspended_s)

    def ran(self, forward_s: float) -> None:
        """A prefill has run for ``forward_s`` since that was told last: it goes on after a suspension, or is over."""
        self._one(table.FORWARD).inc(forward_s)

    def completed(self, forward_s: float, expected_s: float) -> None:
        """A prefill has run to its end, for ``forward_s``, and was expected to run for ``expected_s``."""
        if expected_s > 0:
            self._one(table.PREDICTION_ERROR).observe(forward_s / expected_s)

    def explored(self, time_s: float) -> None:
        """Prefills that nobody asked for took ``time_s``."""
        self._one(table.EXPLORATION).inc(time_s)

    def given_back(self) -> None:
        """A task was given up for streams."""
        self._one(table.GIVEN_BACK).inc()

    # ---- decode steps -----------------------------------------------------------------------------------------------

    def stepped(self, step_s: float, lateness_s: float | None, tokens: int, late_tokens: int) -> None:
        """A decode step took ``step_s``, and brought ``tokens``, ``late_tokens`` of them too late (``got_tokens``);
        ``lateness_s`` is None where it began before it had to.
        """
        self._one(table.STEP).inc(step_s)
        if lateness_s is not None:
            self._one(table.STEP_LATENESS).observe(lateness_s)
        self.got_tokens(tokens, late_tokens)

    def got_tokens(self, tokens: int, late_tokens: int) -> None:
        """Streams have got ``tokens``; ``late_tokens`` of them came later after the ones before them than the
        objectives of their requests say.
        """
        self._one(table.TBT_MET).inc(tokens - late_tokens)
        self._one(table.TBT_MISSED).inc(late_tokens)

    # ---- gauges -----------------------------------------------------------------------------------------------------

    def decided(self, cost_s: float, now_s: float) -> float:
        """Something has happened, and what runs next was chosen, all in ``cost_s``. Goes on with the writing. Returns
        when there is more to write.
        """
        self._one(table.EVENT_COST).observe(cost_s)
        if self._is_due(now_s):
            for _ in self._writing:  # what is left of the last time: there were few events since
                pass
            self._writing = self._write(now_s)
        next(self._writing, None)
        return self._written_s + WRITTEN_EVERY_S

    def rest(self, now_s: float) -> None:
        """Nothing can run: there is time for all that is to be written."""
        for _ in chain(self._writing, self._write_told(), self._write(now_s) if self._is_due(now_s) else ()):
            pass

    def _is_due(self, now_s: float) -> bool:
        if now_s - self._written_s < WRITTEN_EVERY_S:
            return False
        self._written_s = now_s
        return True

    def _write(self, now_s: float) -> Iterator[None]:
        """Write the gauges and what has been told by then, in steps of which an event makes one."""
        situation = self._situation(now_s)
        for (state,), gauge in self._of[table.QUEUE].items():
            gauge.set(situation.queue.get(state, 0))
        self._one(table.LIVE_TASKS).set(situation.live_tasks)
        self._one(table.SUSPENDED_TASKS).set(situation.suspended_tasks)
        self._one(table.SUSPENDED_BYTES).set(situation.suspended_bytes)
        self._one(table.OLDEST_SUSPENDED).set(situation.oldest_suspended_s)
        yield
        yield from self._write_told()
        values = iter(self._ttft_state().items())
        while part := list(islice(values, VALUES_AT_ONCE)):
            yield
            for name, value in part:
                self._value_of_model(name).set(value)

    def _write_told(self) -> Iterator[None]:
        told = iter(self._told.copy())
        self._told.clear()
        while part := list(islice(told, VALUES_AT_ONCE)):
            for series in part:
                series.write()
            yield

    def _value_of_model(self, name: str) -> Any:
        of_model = self._of[table.TTFT_MODEL]
        if (name,) not in of_model:
            of_model[name,] = self._families[table.TTFT_MODEL].labels(*self._labels, name)
        return of_model[name,]

    def _one(self, metric: Metric) -> Any:
        """The series of a metric that has no labels of its own."""
        return self._of[metric][()]
