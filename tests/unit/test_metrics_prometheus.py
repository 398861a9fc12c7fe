"""Dashboard and alerts, evaluated by a real Prometheus on what an exporter like a server's says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sgl_flowprefill.metrics import alerts, dashboard, queries
from sgl_flowprefill.metrics.table import PREDICTION_ERROR, PREFIX, TTFT_MET, TTFT_MISSED, TTFT_MODEL
from tests.prometheus import Prometheus, assert_everything_can_be_asked, needs_prometheus, scraping

pytestmark = needs_prometheus
MONITORING = Path(__file__).parents[2] / "deploy" / "monitoring"


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """One that has seen things happen."""
    exporter = subprocess.Popen(
        [sys.executable, "-m", "tests.metrics_exporter"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert exporter.stdin is not None
    assert exporter.stdout is not None
    try:
        url = exporter.stdout.readline().strip()
        assert url
        with scraping(url, tmp_path_factory.mktemp("prometheus"), interval_s=0.4) as prometheus:
            print(file=exporter.stdin, flush=True)
            assert exporter.stdout.readline()
            prometheus.wait_for_scrapes()
            yield prometheus
    finally:
        exporter.stdin.close()
        exporter.wait(timeout=60)
        exporter.stdout.close()


def test_every_panel_and_alert_has_an_answer(prometheus: Prometheus) -> None:
    assert_everything_can_be_asked(prometheus, unified=True)


def test_attainment_and_quantiles_are_those_of_what_happened(prometheus: Prometheus) -> None:
    assert prometheus.value(queries.ttft_missed("1h", "")) == pytest.approx(0.5)
    assert prometheus.value(queries.tbt_missed("1h")) == pytest.approx(0.25)
    [cause] = prometheus.query(f"{TTFT_MISSED.series} > 0")
    assert cause["metric"]["cause"] == "overload"
    assert cause["metric"]["slo_class"] == "default"


def test_a_name_that_no_server_exports_has_no_answer(prometheus: Prometheus) -> None:
    """What the tests above would say of a panel with such a query."""
    assert prometheus.query(f"rate({PREFIX}preemption_total[60s])") == []
    with pytest.raises(AssertionError, match="parse error"):
        prometheus.query("sum by (le (up)")


def promtool(*arguments: str, cwd: Path) -> None:
    ended = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_promtool_finds_nothing_wrong_with_config_and_rules() -> None:
    promtool("check", "config", "prometheus.yaml", cwd=MONITORING)


@pytest.mark.parametrize("target", [0.9, 0.95, 0.999])
def test_promtool_finds_nothing_wrong_with_rules_for_other_targets(target: float, tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(alerts.rules(target))
    promtool("check", "rules", "alerts.yaml", cwd=tmp_path)


class TestAlerts:
    """Series that are made up, and which alerts fire of them."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self.path = tmp_path
        (tmp_path / "alerts.yaml").write_text(alerts.rules())

    def fires(self, minute: int, met: str, missed: str, names: set[str]) -> None:
        """Of a class with so many requests met and missed by then, in Prometheus' notation, these alerts fire."""
        series = [
            {"series": f'{TTFT_MET.series}{{slo_class="chat"}}', "values": met},
            {"series": f'{TTFT_MISSED.series}{{slo_class="chat", cause="overload"}}', "values": missed},
        ]
        samples = [{"labels": f'{{alertname="{name}", slo_class="chat"}}', "value": 1} for name in sorted(names)]
        self.evaluate(minute, series, "alertname, slo_class", samples)

    def evaluate(self, minute: int, series: list[dict[str, str]], by: str, samples: list[dict[str, Any]]) -> None:
        """Of these series, alerts with the labels of these samples fire by then, told apart by the labels ``by``."""
        firing = f'count by ({by}) (ALERTS{{alertstate="firing"}})'
        test: dict[str, Any] = {
            "rule_files": ["alerts.yaml"],
            "evaluation_interval": "5m",
            "tests": [
                {
                    "interval": "1m",
                    "input_series": series,
                    "promql_expr_test": [{"expr": firing, "eval_time": f"{minute}m", "exp_samples": samples}],
                }
            ],
        }
        (self.path / "test.yaml").write_text(json.dumps(test))
        promtool("test", "rules", "test.yaml", cwd=self.path)

    def test_nothing_fires_while_the_target_is_met(self) -> None:
        self.fires(100, met="0+100x100", missed="0+4x100", names=set())

    def test_misses_that_go_on_fire_in_all_windows(self) -> None:
        names = {f"FlowPrefillTTFT{name}Burn" for name in ("Fast", "Steady", "Slow", "Creeping")}
        self.fires(100, met="0+10x100", missed="0+90x100", names=names)

    def test_misses_that_have_stopped_page_nobody(self) -> None:
        """For an hour nearly all were late, and for the last forty minutes none."""
        self.fires(100, met="0+10x60 610+100x40", missed="0+90x60 5400+0x40",
                   names={"FlowPrefillTTFTSlowBurn", "FlowPrefillTTFTCreepingBurn"})  # fmt: skip

    def test_a_service_that_misses_fires_beside_a_large_one_that_does_not(self) -> None:
        def series(job: str, met: str, missed: str) -> list[dict[str, str]]:
            labels = f'slo_class="chat", model_name="tiny", job="{job}"'
            return [
                {"series": f"{TTFT_MET.series}{{{labels}}}", "values": met},
                {"series": f'{TTFT_MISSED.series}{{{labels}, cause="overload"}}', "values": missed},
            ]

        names = ("Creeping", "Fast", "Slow", "Steady")
        self.evaluate(
            100,
            [*series("large", "0+10000x100", "0+0x100"), *series("small", "0+10x100", "0+90x100")],
            "alertname, job",
            [{"labels": f'{{alertname="FlowPrefillTTFT{name}Burn", job="small"}}', "value": 1} for name in names],
        )

    def test_a_slow_correction_fires_only_where_prefills_have_run_since(self) -> None:
        series = []
        for instance, prefills in (("busy", "0+3x100"), ("idle", "500+0x100")):
            labels = f'job="sglang", instance="{instance}"'
            series.append({"series": f'{TTFT_MODEL.series}{{value="correction", {labels}}}', "values": "3+0x100"})
            series.append({"series": f"{PREDICTION_ERROR.full_name}_count{{{labels}}}", "values": prefills})
        fires = {"labels": '{alertname="FlowPrefillSlowerThanProfiled", instance="busy"}', "value": 1}
        self.evaluate(100, series, "alertname, instance", [fires])

    def test_a_few_requests_page_nobody(self) -> None:
        self.fires(60, met="0+0x60", missed="0+0.2x60", names=set())

    def test_a_class_that_nobody_uses_fires_nothing(self) -> None:
        self.fires(60, met="0+0x60", missed="0+0x60", names=set())


def test_the_panels_are_those_of_the_file_that_grafana_reads() -> None:
    file = json.loads((MONITORING / "grafana/dashboards/json/flowprefill-dashboard.json").read_text())
    shown = [target["expr"] for panel in file["panels"] for target in panel.get("targets", ())]
    assert shown == [query.expr for panel in dashboard.panels() for query in panel.queries]
