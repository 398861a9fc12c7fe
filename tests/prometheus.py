"""A real Prometheus for tests, which scrapes a server and answers queries."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import requests
import yaml

from sgl_flowprefill.cluster.free_ports import free_port
from sgl_flowprefill.metrics import alerts, dashboard, queries
from sgl_flowprefill.metrics.table import PREFIX, TABLE
from tests.waiting import until

MONITORING: Final = Path(__file__).parents[1] / "deploy" / "monitoring"
WINDOW: Final = "30s"
"""What Grafana puts in place of its variables in tests: longer than a test's scrapes."""
VARIABLES: Final = {"$__rate_interval": WINDOW, "$__range": WINDOW, "$instance": ".*", "$slo_class": ".*"}
SCRAPES: Final = 3
START_S: Final = 120.0

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="prometheus and promtool are not installed: apt-get install prometheus",
)


class Prometheus:
    """One that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of an answer of its API; an AssertionError with its error for one that failed."""
        answer = requests.get(f"{self.url}/api/v1/{path}", params=parameters, timeout=60)
        body = answer.json()
        assert body["status"] == "success", f"{parameters}: {body.get('error')}"
        return body["data"]

    def query(self, expr: str) -> list[Any]:
        """What ``expr`` is now: its series."""
        return list(self.ask("query", query=expr)["result"])

    def value(self, expr: str) -> float:
        """What ``expr`` is now, where it is one number."""
        [series] = self.query(expr)
        return float(series["value"][1])

    @property
    def names(self) -> set[str]:
        """Names of all series that it has."""
        return set(self.ask("label/__name__/values"))

    def wait_for_scrapes(self, count: int = SCRAPES) -> None:
        """Wait for so many further scrapes."""
        expr = "count_over_time(up[1h])"
        before = self.value(expr) if self.query(expr) else 0
        until(
            lambda: self.query("up == 1") and self.value(expr) >= before + count,
            START_S,
            say=lambda: self.ask("targets"),
        )


@contextmanager
def scraping(url: str, directory: Path, interval_s: float = 1.0) -> Iterator[Prometheus]:
    """A Prometheus with the project's configuration that scrapes ``/metrics`` of ``url``, once it has."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    every = f"{round(1000 * interval_s)}ms"
    config["global"] = {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    [scrape] = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [url.removeprefix("http://")]}]
    file, port = directory / "prometheus.yaml", free_port("127.0.0.1", taken=())
    file.write_text(yaml.safe_dump(config))
    with open(directory / "prometheus.log", "wb") as log:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={file}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=log,
            stderr=log,
        )
        try:
            prometheus = Prometheus(f"http://127.0.0.1:{port}")
            give_up_s = time.monotonic() + START_S
            while True:
                assert process.poll() is None, (directory / "prometheus.log").read_text()
                try:
                    if requests.get(f"{prometheus.url}/-/ready", timeout=5).ok:
                        break
                except requests.ConnectionError:
                    pass
                assert time.monotonic() < give_up_s, (directory / "prometheus.log").read_text()
                time.sleep(0.1)
            prometheus.wait_for_scrapes()
            yield prometheus
        finally:
            process.terminate()
            process.wait(timeout=60)


def assert_everything_can_be_asked(prometheus: Prometheus, unified: bool) -> None:
    """Every query of the dashboard has an answer and every alert can be evaluated, as far as the server's kind has the
    metrics; and it has all of the table's.
    """
    there = [metric for metric in TABLE if unified or not metric.unified]
    expected = {name for metric in there for name in metric.samples}
    found = {name for name in prometheus.names if name.startswith(PREFIX)}
    found -= {f"{metric.full_name}_sum" for metric in there if f"{metric.full_name}_sum" not in metric.samples}
    assert found == expected, f"not exported: {sorted(expected - found)}; not in the table: {sorted(found - expected)}"
    for panel in dashboard.panels():
        for query in panel.queries:
            expr = query.expr
            for variable, value in VARIABLES.items():
                expr = expr.replace(variable, value)
            assert "$" not in expr, f"{panel.title}: a variable that is not known, in {expr}"
            answer = prometheus.query(expr)
            if not unified and any(metric.unified for metric in queries.metrics_in(expr)):
                assert answer == []
            else:
                assert answer, f"{panel.title}: no answer to {expr}"
    for alert in alerts.alerts():
        assert queries.metrics_in(alert.expr), alert.name
        prometheus.query(alert.expr)
