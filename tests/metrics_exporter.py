"""``python -m tests.metrics_exporter``: the metrics of a server that prefills and decodes, exported as SGLang does it.

They are kept in files, and what answers ``/metrics`` collects them from there. Prints its URL; for each line that it is
sent, something of everything happens, after which it prints a line.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence

from sgl_flowprefill.events import AnyEvent, Arrival, Complete, Leave, Ready, Start
from sgl_flowprefill.outcomes import Outcomes
from sgl_flowprefill.runtime.metrics import Metrics, Situation

LABELS = {"model_name": "tiny", "engine_type": "unified"}


def served(rid: str, received_s: float, slo_s: float, ready_s: float, began_s: float, task: int, took_s: float,
           slo_class: str = "default") -> list[AnyEvent]:  # fmt: skip
    """A request by itself: heard of at once, run for as long as predicted, and sent."""
    predicted_s, ended_s = took_s, began_s + took_s
    return [
        Arrival(received_s, rid, 100, slo_s, received_s + slo_s, received_s, slo_class),
        Ready(ready_s, rid, ready_s, 100, 0, predicted_s),
        Start(began_s, task, [rid], 100, 0, predicted_s),
        Complete(ended_s, task, [rid], 9, took_s, predicted_s, predicted_s, predicted_s),
        Leave(ended_s, rid),
    ]


class Told:
    """Metrics that are told of events and of what becomes of requests, as an event recorder does it."""

    def __init__(self, metrics: Metrics, decodes: bool = False) -> None:
        self._metrics = metrics
        self._outcomes = Outcomes(decodes)

    def of(self, events: Sequence[AnyEvent]) -> None:
        for event in events:
            self._metrics.read(event)
            for outcome in self._outcomes.read(event):
                self._metrics.ended(outcome)
        self._metrics.rest(now_s=0.0)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory  # before the client library is imported
        from prometheus_client import CollectorRegistry, multiprocess, start_http_server

        metrics = Metrics(LABELS, decodes=True)
        state = {"correction": 1.25, "margin": 1.1}
        metrics.watch(lambda now_s: Situation({"feasible": 3, "infeasible": 1}, 2, 1, 4096, 0.5), lambda: state)
        metrics.rest(0.0)
        told, tasks = Told(metrics, decodes=True), 0
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        server, thread = start_http_server(0, "127.0.0.1", registry)
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        for _ in sys.stdin:
            for began_s in (0.1, 0.8):  # in time, and not
                told.of(served(f"{tasks}", 0.0, 1.0, 0.1, began_s, tasks, took_s=0.5))
                tasks += 1
            metrics.preempted(0.004, 0.003)
            metrics.resumed(0.3)
            metrics.ran(0.5)
            metrics.completed(0.5, 0.4)
            metrics.decided(80e-6, now_s=1.0)
            metrics.stepped(0.02, 0.001, tokens=4, late_tokens=1)
            metrics.rest(now_s=1.0)
            print("it has happened", flush=True)
        server.shutdown()
        thread.join()


if __name__ == "__main__":
    main()
