"""One table of metrics: what is made of it is current, and exporter and dashboard have all of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from sgl_flowprefill.events import Abort, Arrival, Fail
from sgl_flowprefill.metrics import alerts, dashboard, queries
from sgl_flowprefill.metrics.table import CAUSES, MOST_CLASSES, OTHER, PREFIX, SHED, TABLE, TTFT_MISSED, Kind, Unit
from sgl_flowprefill.misses import Cause
from sgl_flowprefill.runtime.metrics import WRITTEN_EVERY_S, Metrics, Situation
from tests.metrics_exporter import Told, served

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "deploy" / "monitoring"
LABELS = {"model_name": "tiny", "engine_type": "prefill"}


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """Values by name and own labels."""
    found = {}
    for family in registry.collect():
        for sample in family.samples:
            own = ",".join(f"{name}={value}" for name, value in sample.labels.items() if name not in LABELS)
            found[f"{sample.name}{{{own}}}" if own else sample.name] = sample.value
    return found


@pytest.mark.parametrize("module", ["metrics", "metrics.dashboard", "metrics.alerts"])
def test_docs_dashboard_and_alerts_are_those_that_a_command_makes_of_the_table(module: str) -> None:
    printed = subprocess.run(
        [sys.executable, "-m", f"sgl_flowprefill.{module}"], capture_output=True, text=True, check=True, timeout=120
    )
    files = {
        "metrics": "docs/metrics.md",
        "metrics.dashboard": "deploy/monitoring/grafana/dashboards/json/flowprefill-dashboard.json",
        "metrics.alerts": "deploy/monitoring/alerts.yaml",
    }
    current = f"python -m sgl_flowprefill.{module} > {files[module]}"
    assert printed.stdout == (ROOT / files[module]).read_text(), current


def test_names_are_unique_and_say_their_unit_as_sglangs_do() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)
    for metric in TABLE:
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", metric.name)
        assert "total" not in metric.name.split("_"), "the client library adds it"
        for unit in (Unit.SECONDS, Unit.BYTES, Unit.RATIO):
            assert metric.name.endswith(f"_{unit}") == (metric.unit is unit), metric.name
        assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.help.endswith(".")


def test_every_cause_of_a_miss_is_a_label() -> None:
    no_misses = {Cause.ABORTED, Cause.INVALID}
    assert set(CAUSES) == set(Cause) - no_misses


def test_the_dashboard_shows_every_metric_and_no_two_panels_overlap() -> None:
    shown = {metric for panel in dashboard.panels() for metric in panel.metrics}
    assert [metric.name for metric in TABLE if metric not in shown] == []
    taken: set[tuple[int, int]] = set()
    ids = set()
    for panel in dashboard.dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert place["x"] + place["w"] <= dashboard.WIDTH
        assert not cells & taken, panel["title"]
        taken |= cells
        ids.add(panel["id"])
    assert len(ids) == len(dashboard.dashboard()["panels"])


def test_an_alert_leads_to_a_panel_of_what_it_watches() -> None:
    """TBT objectives are those of servers that decode, and so is what their panel shows."""
    panels = {panel.title: panel for panel in dashboard.panels()}
    named = [
        (alert.name, title) for alert in alerts.alerts() for title in re.findall(r"panel '(.+)'", alert.description)
    ]
    assert len(named) == 2 * len(alerts.BURNS)
    for alert, title in named:
        assert {metric.unified for metric in panels[title].metrics} == {alert.startswith("FlowPrefillTBT")}, alert


def test_no_stack_has_requests_twice() -> None:
    for panel in dashboard.panels():
        assert not panel.stacked or not {SHED, TTFT_MISSED} <= set(panel.metrics), panel.title


def test_a_query_with_a_name_that_no_metric_has_is_refused() -> None:
    with pytest.raises(ValueError, match="flowprefill:preemption_total"):
        queries.metrics_in(f"rate({PREFIX}preemption_total[5m])")


def test_compose_mounts_what_is_there_and_grafana_finds_the_dashboard() -> None:
    services = yaml.safe_load((MONITORING / "docker-compose.yaml").read_text())["services"]
    mounts = {}
    for service in services.values():
        for mount in service["volumes"]:
            source, target, _ = mount.split(":")
            assert (MONITORING / source).exists(), source
            mounts[target] = MONITORING / source
    [provider] = yaml.safe_load(
        next(mounts["/etc/grafana/provisioning/dashboards"].glob("*.yaml")).read_text()
    )["providers"]  # fmt: skip
    found = list(mounts[provider["options"]["path"]].glob("*.json"))
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert [f"{provider['options']['path']}/{path.name}" for path in found] == [home]
    config = yaml.safe_load(mounts["/etc/prometheus/prometheus.yml"].read_text())
    assert [f"/etc/prometheus/{name}" for name in config["rule_files"]] == ["/etc/prometheus/alerts.yaml"]
    assert "/etc/prometheus/alerts.yaml" in mounts


@pytest.mark.parametrize("decodes", [False, True])
def test_the_exporter_has_all_of_the_table_from_the_start(decodes: bool) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, decodes=decodes, registry=registry)
    metrics.watch(lambda now_s: Situation({}, 0, 0, 0, 0.0), lambda: {"correction": 1.0})
    metrics.rest(0.0)
    names = {name.split("{")[0] for name in samples(registry)}
    expected = {name for metric in TABLE if decodes or not metric.unified for name in metric.samples}
    assert {name for name in names if not name.endswith("_created")} == expected
    types = re.findall(r"# TYPE (\S+) (\S+)", generate_latest(registry).decode())
    assert dict(types).items() >= {metric.series: str(metric.kind) for metric in TABLE
                                   if decodes or not metric.unified}.items()  # fmt: skip


def test_requests_count_once_by_class_and_cause() -> None:
    registry = CollectorRegistry()
    Told(Metrics(LABELS, registry=registry)).of(
        [
            *served("in time", 0.0, 1.0, ready_s=0.1, began_s=0.1, task=0, took_s=0.5),
            *served("waited", 0.0, 1.0, ready_s=0.1, began_s=0.7, task=1, took_s=0.5),
            *served("no place", 2.0, 1.0, ready_s=2.9, began_s=2.9, task=2, took_s=0.5),
            Arrival(10.0, "gone", 100, 1.0, 11.0, 10.0),
            Abort(10.5, ["gone"]),
            Arrival(11.0, "refused", 100, 1.0, 12.0, 11.0),
            Fail(11.0, ["refused"], 400, "too long"),
            Arrival(11.0, "broken", 100, 1.0, 12.0, 11.0),
            Fail(11.5, ["broken"], 500, "raised"),
            Arrival(12.0, "shed", 100, 1.0, 13.0, 12.0, "batch"),
            Fail(12.0, ["shed"], 429, "overloaded"),
            *served("of a class", 20.0, 1.0, ready_s=20.1, began_s=20.1, task=3, took_s=0.5, slo_class="batch"),
        ],
    )
    found = samples(registry)
    counted = {name: value for name, value in found.items() if value and name.startswith(f"{PREFIX}ttft_slo_")
               and "_created" not in name}  # fmt: skip
    assert counted == {
        "flowprefill:ttft_slo_met_total{slo_class=default}": 1,
        "flowprefill:ttft_slo_missed_total{slo_class=default,cause=overload}": 1,
        "flowprefill:ttft_slo_missed_total{slo_class=default,cause=not_ready}": 1,
        "flowprefill:ttft_slo_missed_total{slo_class=default,cause=failed}": 1,
        "flowprefill:ttft_slo_met_total{slo_class=batch}": 1,
        "flowprefill:ttft_slo_missed_total{slo_class=batch,cause=failed}": 1,
    }
    assert found["flowprefill:num_shed_requests_total{slo_class=batch}"] == 1
    assert found["flowprefill:num_shed_requests_total{slo_class=default}"] == 0
    assert found["flowprefill:num_aborted_requests_total{slo_class=default}"] == 1
    assert found["flowprefill:num_invalid_requests_total{slo_class=default}"] == 1
    assert found["flowprefill:num_invalid_requests_total{slo_class=batch}"] == 0
    assert found["flowprefill:time_to_first_token_seconds_count{slo_class=default}"] == 3
    assert found["flowprefill:time_to_first_token_seconds_sum{slo_class=default}"] == pytest.approx(0.6 + 1.2 + 1.4)
    assert found["flowprefill:admission_slack_seconds_count{slo_class=default}"] == 3
    assert found["flowprefill:admission_slack_seconds_bucket{slo_class=default,le=0.0}"] == 1, "no place until too late"


def test_a_class_that_is_met_has_its_series_before_its_first_outcome_and_further_ones_are_other() -> None:
    registry = CollectorRegistry()
    told = Told(Metrics(LABELS, registry=registry))
    told.of(served("first", 0.0, 1.0, 0.1, 0.1, task=0, took_s=0.5, slo_class="chat")[:1])
    assert samples(registry)["flowprefill:ttft_slo_met_total{slo_class=chat}"] == 0
    for number in range(1, 101):
        told.of(served(f"{number}", 0.0, 1.0, 0.1, 0.1, task=number, took_s=0.5, slo_class=f"class_{number}"))
    found = {
        name: value for name, value in samples(registry).items() if name.startswith("flowprefill:ttft_slo_met_total")
    }
    apart = MOST_CLASSES - 2
    assert len(found) == MOST_CLASSES + 1, "the first ones, of which two are chat and default, and other"
    assert found[f"flowprefill:ttft_slo_met_total{{slo_class=class_{apart}}}"] == 1
    assert found[f"flowprefill:ttft_slo_met_total{{slo_class={OTHER}}}"] == 100 - apart


def test_a_server_that_decodes_has_the_first_token_when_the_prefill_is_over() -> None:
    registry = CollectorRegistry()
    told = Told(Metrics(LABELS, decodes=True, registry=registry), decodes=True)
    events = served("a", 0.0, 1.0, ready_s=0.1, began_s=0.1, task=0, took_s=0.5)
    told.of(events[:-1])
    assert samples(registry)["flowprefill:ttft_slo_met_total{slo_class=default}"] == 1
    told.of(events[-1:])
    assert samples(registry)["flowprefill:ttft_slo_met_total{slo_class=default}"] == 1


def test_gauges_are_written_some_at_each_event_and_all_before_a_sleep() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, registry=registry)
    state = {f"value_{number}": float(number) for number in range(10)}
    asked = []

    def situation(now_s: float) -> Situation:
        asked.append(True)
        return Situation({"feasible": 3, "infeasible": 2, "not_ready": 1}, 2, 1, 4096, 0.5)

    metrics.watch(situation, lambda: state)

    def shown() -> int:
        return sum(name.startswith("flowprefill:ttft_model{") for name in samples(registry))

    written = []
    for event in range(8):
        metrics.decided(1e-5, now_s=event / 100)
        written.append(shown())
    assert written == [0, 0, 0, 4, 8, 10, 10, 10]
    assert len(asked) == 1, "not asked again within half a second"
    found = samples(registry)
    assert found["flowprefill:num_queue_reqs{state=feasible}"] == 3
    assert found["flowprefill:num_queue_reqs{state=not_ready}"] == 1
    assert found["flowprefill:suspended_bytes"] == 4096
    state["value_0"] = 7.0
    metrics.rest(now_s=0.4)
    assert samples(registry)["flowprefill:ttft_model{value=value_0}"] == 0.0
    metrics.rest(now_s=0.6)
    assert samples(registry)["flowprefill:ttft_model{value=value_0}"] == 7.0


def test_what_is_counted_is_written_from_time_to_time_and_none_of_it_is_lost_or_written_twice() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, registry=registry)

    def shown() -> tuple[float, float, float, float]:
        found = samples(registry)
        name = "flowprefill:scheduling_event_seconds"
        in_time = found[f"{name}_bucket{{le=5e-05}}"]
        return found[f"{name}_count"], in_time, found[f"{name}_sum"], found["flowprefill:preemptions_total"]

    costs_s = [25e-6, 26e-6, 50e-6, 51e-6, 1.0]  # at the upper bound of a bucket, and beyond the last one
    for event, cost_s in enumerate(costs_s):
        metrics.preempted(0.004, 0.003)
        metrics.decided(cost_s, now_s=event / 100)
    assert shown() == (2, 2, pytest.approx(51e-6), 2), "with the second event, and then not for half a second"
    metrics.decided(0.5, now_s=0.6)
    metrics.decided(0.5, now_s=0.61)
    assert shown() == (7, 3, pytest.approx(sum(costs_s) + 1.0), 5)
    metrics.preempted(0.004, 0.003)
    metrics.rest(now_s=0.62)
    assert shown() == (7, 3, pytest.approx(sum(costs_s) + 1.0), 6), "at once where there is nothing to do"
    metrics.rest(now_s=2.0)
    assert shown() == (7, 3, pytest.approx(sum(costs_s) + 1.0), 6)


def test_where_events_are_few_the_next_one_writes_what_is_left() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, registry=registry)
    metrics.decided(1e-5, now_s=0.0)
    metrics.preempted(0.004, 0.003)
    metrics.decided(1e-5, now_s=10.0)
    assert samples(registry)["flowprefill:preemptions_total"] == 1


def test_whoever_decides_hears_when_there_is_more_to_write() -> None:
    metrics = Metrics(LABELS, registry=CollectorRegistry())
    assert metrics.decided(1e-5, now_s=10.0) == 10.0 + WRITTEN_EVERY_S
    assert metrics.decided(1e-5, now_s=10.1) == 10.0 + WRITTEN_EVERY_S
    assert metrics.decided(1e-5, now_s=10.6) == 10.6 + WRITTEN_EVERY_S


def test_tokens_and_steps_count_on_a_server_that_decodes() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(LABELS, decodes=True, registry=registry)
    metrics.stepped(0.03, 0.004, tokens=5, late_tokens=2)
    metrics.stepped(0.02, None, tokens=1, late_tokens=0)
    metrics.got_tokens(2, late_tokens=1)
    metrics.given_back()
    metrics.rest(now_s=0.0)
    found = samples(registry)
    assert found["flowprefill:tbt_slo_met_total"] == 5
    assert found["flowprefill:tbt_slo_missed_total"] == 3
    assert found["flowprefill:decode_step_seconds_total"] == pytest.approx(0.05)
    assert found["flowprefill:decode_step_lateness_seconds_count"] == 1
    assert found["flowprefill:given_back_total"] == 1
